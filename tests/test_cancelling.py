"""An operator's engine is tried with noise before it serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from datamix.bundle import SplitSpec, load_backbone
from datamix.errors import ConfigError
from deployments import cpu
from deployments.cancelling import check_cancelling, noise_error
from deployments.config import Config
from deployments.engine import Block, Engine, Pending, Rows, Settled
from deployments.model import build_engine

BUNDLE = str(Path(__file__).parents[1] / "bundles" / "fashion-mnist-mix")
SHAPE = (2, 4, 4)


class Coarse(Engine):
    """Runs a module and rounds its outputs to so many bits of significand."""

    name = "coarse"

    def __init__(self, module: torch.nn.Module, bits: int) -> None:
        self.blocks = [Block(SHAPE, SHAPE, linear=True)]
        self._module, self._bits = module, bits

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        outputs = []
        with torch.inference_mode():
            for rows in requests:
                exact = self._module(torch.from_numpy(rows.features)).numpy()
                fraction, exponent = np.frexp(exact)
                steps = np.float32(2**self._bits)
                outputs.append(np.ldexp(np.rint(fraction * steps) / steps, exponent))
        return Settled(outputs)


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(2, 2, 3, padding=1, bias=False).requires_grad_(False)


def test_the_error_is_what_rounding_leaves_of_noise_that_was_taken_off() -> None:
    module = linear()
    errors = [noise_error(Coarse(module, bits), [module], 300.0) for bits in (23, 15, 7)]
    assert errors[0] < 1e-3
    # Half a step of the largest answers, which are some hundred times the features.
    assert 0.2 < errors[1] / (300 * 2.0**-15) < 5
    assert errors[2] / errors[1] == pytest.approx(2.0**8, rel=0.8)


def test_an_engine_beyond_the_tolerance_is_refused_in_one_sentence() -> None:
    module = linear()
    split = SplitSpec(sigma=300.0, wire_dtype="float16", tolerance=0.5)
    check_cancelling(Coarse(module, 15), [module], split, name="small")
    with pytest.raises(ConfigError, match=r"engine coarse .* off by .* tolerates 0.5, expected"):
        check_cancelling(Coarse(module, 7), [module], split, name="small")


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_an_engine_that_answers_no_numbers_is_refused(broken: float) -> None:
    class Broken(Coarse):
        def start(self, block: int, requests: Sequence[Rows]) -> Pending:
            return Settled([np.full_like(rows.features, broken) for rows in requests])

    split = SplitSpec(sigma=300.0, wire_dtype="float16", tolerance=1.0)
    with np.errstate(invalid="ignore"), pytest.raises(ConfigError, match="expected dtype float32"):
        check_cancelling(Broken(linear(), 23), [linear()], split, name="small")


def test_an_operator_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: True)  # torch computes in it anywhere

    def build(**settings: str) -> str:
        config = Config.model_validate({"bundle": BUNDLE, **settings})
        return build_engine(config, BUNDLE).engine.name

    assert build(dtype="bfloat16") == "torch:cpu:bfloat16"
    assert build(dtype="auto") == "torch:cpu:bfloat16"
    assert build(dtype="auto", operator="acme") == "torch:cpu:float32"
    assert build(operator="acme") == "torch:cpu:float32"
    name = load_backbone(BUNDLE)[0].name
    with pytest.raises(ConfigError, match=f"bfloat16 of an operator is off by .*'{name}'"):
        build(dtype="bfloat16", operator="acme")
