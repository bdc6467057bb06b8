"""Sigma, wire type and tolerance of the mode split are chosen together, and bits are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamix.bundle import SplitSpec, load_backbone, read_manifest
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build
from edge import splitting
from edge.data import sample_for
from edge.evaluate import evaluate
from edge.modes import gaussian_bits
from edge.promises import promise
from edge.splitting import BITS_PER_INPUT, Fit, WireType, choose, measure, sigma_for
from tests.test_readme import ROOT

BUNDLES = sorted(path.parent for path in (ROOT / "bundles").glob("*/manifest.json"))


def small(cloud: str = "linear") -> SplitModel:
    torch.manual_seed(0)
    sizes: dict[str, int | str] = {"stem_width": 4, "widths": "8,8", "strides": "2,1", "rounds": 2}
    options = {**sizes, "input": "1,12,12", "cloud": cloud}
    return build(Architecture("bridgenet", options)).eval()


INPUTS = np.random.default_rng(0).standard_normal((32, 1, 12, 12)).astype(np.float32)


@given(st.integers(1, 10**7), st.floats(1e-6, 1))
def test_sigma_keeps_the_bits_and_is_hardly_more_than_needed(values: int, share: float) -> None:
    bits = share * values
    sigma = sigma_for(values, bits)
    assert gaussian_bits(values, sigma) <= bits * (1 + 1e-9)
    assert gaussian_bits(values, sigma / 1.2) > bits * (1 - 1e-9)


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf"), 1001.0])
def test_bits_that_are_none_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="bits"):
        sigma_for(100, bits)


def test_float32_is_more_exact_than_float16_and_more_noise_is_less_exact() -> None:
    errors = {
        (sigma, dtype): measure(small(), INPUTS, sigma, dtype).error
        for sigma in (30.0, 1000.0)
        for dtype in ("float16", "float32")
    }
    assert errors[30.0, "float32"] < errors[30.0, "float16"] < errors[1000.0, "float16"]
    assert errors[1000.0, "float32"] < 0.01


def test_integers_of_16_bits_are_more_exact_than_float16_and_chosen_before_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: tuple[WireType, ...] = ("float16", "int16", "float32")
    errors = [measure(small(), INPUTS, 300.0, dtype).error for dtype in kinds]
    assert errors[0] > 1.5 * errors[1] > errors[2]

    def changing(*arguments: Any) -> Fit:
        spec = SplitSpec(sigma=arguments[2], wire_dtype=arguments[3], tolerance=0.1)
        return Fit(spec, 0.0, {"float16": 0.02, "int16": share, "float32": 0.0}[arguments[3]])

    monkeypatch.setattr(splitting, "measure", changing)
    chosen = []
    for share in (0.0, 0.02):  # noqa: B007, which the closure above reads
        spec = choose(small(), INPUTS)
        chosen.append(spec and spec.wire_dtype)
    assert chosen == ["int16", "float32"]


def test_the_choice_keeps_the_bits_for_all_rounds_together() -> None:
    spec = choose(small(), INPUTS, bits=0.01)
    assert spec is not None
    assert gaussian_bits(4 * 36 + 8 * 9, spec.sigma) <= 0.01


def test_a_network_that_no_wire_type_is_exact_enough_for_is_not_made_for_two_operators() -> None:
    assert choose(small(), INPUTS, bits=1e-16) is None


def test_blocks_that_are_not_linear_are_refused() -> None:
    with pytest.raises(ConfigError, match="not linear"):
        choose(small("relu"), INPUTS)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_shipped_bundles_are_made_for_two_operators(bundle: object) -> None:
    manifest = read_manifest(str(bundle))
    assert "split" in manifest.modes
    assert promise(manifest, "split").bits_per_input <= BITS_PER_INPUT
    assert len(load_backbone(str(bundle))[1]) == len(manifest.blocks)


def test_two_operators_cost_hardly_any_accuracy() -> None:
    bundle = ROOT / "bundles" / "fashion-mnist-one-round"
    sample = sample_for(read_manifest(bundle).preprocessing)
    found = evaluate(bundle, sample, mode="split")
    assert found.mode == "split"
    assert abs(found.accuracy_mixed - found.accuracy_unmixed) <= 0.006
    with pytest.raises(ConfigError, match="was made for mix, split"):
        evaluate(bundle, sample, mode="bounded")
