"""Batched against one by one, on the blocks that are really served: within the stated tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from datamix.bundle import load_backbone
from datamix.models import Architecture, block_shapes, build
from deployments.cpu import CpuEngine
from deployments.cuda import CudaEngine
from deployments.engine import ROUNDING, TOLERANCE, Array, Block, Engine, Rows
from deployments.fuse import Optimise
from tests.fake_gpu import FakeGpu
from tests.rows import requests
from tests.test_fuse import scattered

BUNDLE = Path(__file__).parents[1] / "bundles" / "fashion-mnist-mix"
SIZES = (1, 4, 2, 8, 1)
MAX_ROWS = 16


class Served(NamedTuple):
    """A block as its engine gets it."""

    module: torch.nn.Module
    block: Block


@cache
def served(name: str) -> Served:
    if name == "resnet18":
        torch.manual_seed(0)
        model = build(Architecture("resnet18", {"cut": 3}))
        return Served(scattered(model.blocks[0]), Block(*block_shapes(model)[0]))
    manifest, modules = load_backbone(BUNDLE)
    index = int(name.removeprefix("demo "))
    shapes = manifest.blocks[index]
    return Served(modules[index], Block(shapes.input_shape, shapes.output_shape))


def on_cpu(dtype: str, optimise: Optimise, channels_last: bool) -> Callable[[Served], Engine]:
    return lambda served: CpuEngine(
        torch.nn.ModuleList([served.module]),
        [served.block],
        max_batch_rows=MAX_ROWS,
        dtype=dtype,
        optimise=optimise,
        channels_last=channels_last,
        threads=1,
    )


def on_cuda(dtype: str, graphs: bool) -> Callable[[Served], Engine]:
    return lambda served: CudaEngine(
        torch.nn.ModuleList([served.module]),
        [served.block],
        FakeGpu(),
        max_batch_rows=MAX_ROWS,
        dtype=dtype,
        graphs=graphs,
    )


ENGINES = {
    **{
        f"cpu {dtype} {optimise} {'channels_last' if last else 'contiguous'}": (
            dtype,
            on_cpu(dtype, optimise, last),
        )
        for dtype in ("float32", "bfloat16")
        for optimise in ("none", "fuse")
        for last in (False, True)
    },
    **{
        f"cuda {dtype} {'graphs' if graphs else 'eager'}": (dtype, on_cuda(dtype, graphs))
        for dtype in ("float32", "bfloat16", "float16")
        for graphs in (False, True)
    },
}


def distance(got: Sequence[Array], expected: Sequence[Array]) -> float:
    """Largest difference, relative to max(1, |value|)."""
    one, other = (np.concatenate(list(part)).astype(np.float64) for part in (got, expected))
    assert one.shape == other.shape
    return float((np.abs(one - other) / np.maximum(1.0, np.abs(other))).max())


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.cpu.has_bfloat16", lambda: True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", ["demo 0", "demo 1", "resnet18"])
def test_a_request_gets_the_same_in_any_batch(engine: str, block: str) -> None:
    dtype, make = ENGINES[engine]
    target = served(block)
    runner = make(target)
    asked = requests(target.block.input_shape, sizes=SIZES)
    together = runner.run(0, asked)
    alone = [output for request in asked for output in runner.run(0, [request])]
    assert distance(together, alone) <= TOLERANCE[dtype]
    with torch.inference_mode():
        plain = [target.module(torch.from_numpy(rows.features)).numpy() for rows in asked]
    assert distance(together, plain) <= ROUNDING[dtype]


def test_the_distance_can_be_too_large() -> None:
    target = served("demo 0")
    runner = ENGINES["cpu float32 fuse channels_last"][1](target)
    asked = requests(target.block.input_shape, sizes=SIZES)
    moved = [Rows(rows.features * np.float32(1.001), None) for rows in asked]
    assert distance(runner.run(0, asked), runner.run(0, moved)) > TOLERANCE["float32"]
