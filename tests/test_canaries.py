"""Canaries in a bundle, and what an engine has to do with them before it may serve."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from datamix.bundle import MANIFEST, add_canaries, load_backbone, load_canaries, read_manifest
from datamix.canaries import CANARIES, ROWS
from datamix.errors import BundleError, ConfigError
from deployments import model as models
from deployments.canaries import batch_s, check_canaries, check_slowdown, check_speed
from deployments.config import Config
from deployments.engine import Array, Block, Engine, Pending, Rows, Settled
from tests.jobs import Clock
from tests.test_bundle import replace_weights, write

SHIPPED = Path(__file__).parents[1] / "bundles"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def without_canaries(bundle: Path) -> None:
    """As an older release saved it."""
    (bundle / CANARIES).unlink()
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["hashes"][CANARIES]
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def change(bundle: Path, edit: Callable[[dict[str, Array]], Any]) -> None:
    tensors = load((bundle / CANARIES).read_bytes())
    edit(tensors)
    replace_weights(bundle, CANARIES, save(tensors))


# --- in the bundle ------------------------------------------------------------------------------


def test_a_saved_bundle_says_what_its_blocks_make_of_noise(bundle: Path) -> None:
    manifest, blocks = load_backbone(bundle)
    canaries = load_canaries(bundle)
    assert len(canaries) == len(manifest.blocks) == 2
    for canary, block, shapes in zip(canaries, blocks, manifest.blocks, strict=True):
        assert canary.inputs.dtype == np.float16
        assert canary.inputs.shape == (ROWS, *shapes.input_shape)
        with torch.inference_mode():
            expected = block(torch.from_numpy(canary.inputs.astype(np.float32))).numpy()
        np.testing.assert_array_equal(canary.outputs, expected)
    assert load_canaries(bundle.as_uri())[1].outputs.shape == canaries[1].outputs.shape


def test_a_model_in_training_is_left_alone(tmp_path: Path) -> None:
    from tests.test_bundle import small_model

    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tmp_path / "bundle", model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    models.load(config(tmp_path / "bundle"), str(tmp_path / "bundle"))


def test_an_older_bundle_gets_its_canaries_once(bundle: Path) -> None:
    saved, hashes = (bundle / CANARIES).read_bytes(), read_manifest(bundle).hashes
    without_canaries(bundle)
    assert load_canaries(bundle) == ()
    manifest = add_canaries(bundle)
    assert (bundle / CANARIES).read_bytes() == saved
    assert manifest == read_manifest(bundle)
    assert manifest.hashes == hashes
    assert {path.name for path in bundle.iterdir()} == {*hashes, MANIFEST}
    with pytest.raises(BundleError, match="has canaries already, expected none$"):
        add_canaries(bundle)


def _lose(tensors: dict[str, Array]) -> None:
    del tensors["blocks.1.input"]


def _add(tensors: dict[str, Array]) -> None:
    tensors["blocks.7.input"] = tensors["blocks.0.input"]


def _widen(tensors: dict[str, Array]) -> None:
    tensors["blocks.0.input"] = tensors["blocks.0.input"].astype(np.float32)


def _spoil(tensors: dict[str, Array]) -> None:
    tensors["blocks.1.output"] = np.full_like(tensors["blocks.1.output"], np.nan)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (_lose, "tensor 'blocks.1.input' is missing$"),
        (_add, "unknown tensor 'blocks.7.input'$"),
        (_widen, "tensor 'blocks.0.input' is float32 .* expected float16 "),
        (_spoil, "tensor 'blocks.1.output' holds NaN or Inf$"),
    ],
)
def test_canaries_that_do_not_fit_are_refused(
    bundle: Path, edit: Callable[[dict[str, Array]], None], sentence: str
) -> None:
    change(bundle, edit)
    with pytest.raises(BundleError, match=f"^{CANARIES}: {sentence}"):
        load_canaries(bundle)


def test_changed_and_broken_files_are_refused(bundle: Path) -> None:
    body = (bundle / CANARIES).read_bytes()
    (bundle / CANARIES).write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(BundleError, match="sha256 differs"):
        load_canaries(bundle)
    replace_weights(bundle, CANARIES, b"junk")
    with pytest.raises(BundleError, match="not valid safetensors"):
        load_canaries(bundle)
    replace_weights(bundle, CANARIES, bytes(1 << 20))
    with pytest.raises(BundleError, match="expected at most"):
        load_canaries(bundle)
    (bundle / CANARIES).unlink()
    with pytest.raises(BundleError, match=f"no {CANARIES} in bundle"):
        load_canaries(bundle)


@pytest.mark.parametrize("path", sorted(SHIPPED.iterdir()), ids=lambda path: str(path.name))
def test_shipped_bundles_have_canaries(path: Path) -> None:
    assert load_canaries(path)
    names = {p.name for p in path.iterdir()} - {"MODEL_CARD.md", MANIFEST}
    assert names == read_manifest(path).hashes.keys()
    assert hashlib.sha256((path / CANARIES).read_bytes()).hexdigest() in (
        read_manifest(path).hashes.values()
    )
    assert sum(p.stat().st_size for p in path.iterdir()) < 3 << 20


# --- on an engine -------------------------------------------------------------------------------


def config(bundle: Path, **options: Any) -> Config:
    return Config(
        bundle=str(bundle), max_batch_rows=4, max_request_rows=4,
        threads=torch.get_num_threads(), **options,
    )  # fmt: skip


def test_a_sound_bundle_is_loaded(bundle: Path) -> None:
    assert models.load(config(bundle), str(bundle)).entry.version == "1"
    without_canaries(bundle)
    assert models.load(config(bundle), str(bundle)).entry.version == "1"


def test_weights_that_are_not_those_of_the_canaries_are_refused(bundle: Path) -> None:
    def other(tensors: dict[str, Array]) -> None:
        tensors["blocks.1.output"] = tensors["blocks.1.output"] + 0.02

    change(bundle, other)
    with pytest.raises(
        BundleError,
        match=r"^block 1 fails its canaries: outputs differ by 0.0\d*, expected at most 0.01$",
    ):
        models.load(config(bundle), str(bundle))
    # An engine that computes nothing has nothing to be wrong about.
    models.load(config(bundle, engine="null"), str(bundle))


def test_a_deviation_within_the_tolerance_passes(bundle: Path) -> None:
    def other(tensors: dict[str, Array]) -> None:
        tensors["blocks.1.output"] = tensors["blocks.1.output"] + 0.005

    change(bundle, other)
    models.load(config(bundle), str(bundle))


class _Engine(Engine):
    """Says NaN, or takes a second for each row, by a clock."""

    name = "test:cpu:bfloat16"
    blocks: Sequence[Block] = (Block((2,), (2,)), Block((3,), (3,)))

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock
        self.runs: list[tuple[int, int]] = []

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        rows = len(requests[0].features)
        self.runs.append((block, rows))
        if self.clock is not None:
            # The first run is slow, as first runs are.
            self.clock.now += rows * (1.0 if len(self.runs) > 1 else 9.0)
        return Settled([np.full((rows, *self.blocks[block].output_shape), np.nan, np.float32)])


def test_nan_fails_the_canaries(bundle: Path) -> None:
    engine = _Engine()
    shapes = read_manifest(bundle).shapes
    engine.blocks = [Block(inputs, outputs) for inputs, outputs in shapes]
    with pytest.raises(BundleError, match="differ by nan, expected at most 0.03$"):
        check_canaries(engine, str(bundle))


def test_the_fastest_full_batch_of_every_block_counts() -> None:
    clock = Clock()
    engine = _Engine(clock)
    assert batch_s(engine, 4, clock) == 8.0
    assert engine.runs == [(0, 4)] * 3 + [(1, 4)] * 3


def test_limits_of_speed() -> None:
    check_speed(0.2, None)
    check_speed(0.2, 0.2)
    with pytest.raises(ConfigError, match=r"take 0.3 s, expected at most canary_batch_s \(0.2\)$"):
        check_speed(0.3, 0.2)
    check_slowdown(0.3, 0.1, "1", 3.0)
    check_slowdown(0.015, 0.000_1, "1", 3.0)  # fast enough for anybody
    with pytest.raises(ConfigError, match="take 0.31 s, and 0.1 s with the current version '1'"):
        check_slowdown(0.31, 0.1, "1", 3.0)


def test_a_version_that_is_too_slow_to_start_is_refused(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="expected at most canary_batch_s"):
        models.load(config(bundle, canary_batch_s=1e-9), str(bundle))
