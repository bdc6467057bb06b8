"""The CUDA engine's logic, on a GPU that does everything in as odd an order as it may."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix import wire
from datamix.errors import ConfigError
from deployments.cpu import CpuEngine
from deployments.cuda import CudaEngine, buckets
from deployments.engine import ROUNDING, TOLERANCE, Array, Block, Pending, Rows
from deployments.gpu import CudaGpu
from tests.fake_gpu import FakeGpu
from tests.rows import SIZES, assert_close, requests, shapes
from tests.test_cpu import BLOCKS, backbone

MAX_ROWS = 16
HALF = 1e-3  # what rounding an answer to float16 costs


def engine(gpu: FakeGpu | None = None, **options: object) -> CudaEngine:
    gpu = gpu or FakeGpu()
    return CudaEngine(backbone(), BLOCKS, gpu, max_batch_rows=MAX_ROWS, **options)  # type: ignore[arg-type]


def reference() -> CpuEngine:
    return CpuEngine(backbone(), BLOCKS, max_batch_rows=MAX_ROWS, threads=1)


# --- buckets ------------------------------------------------------------------------------------


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert buckets(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert buckets(256)[-5:] == [64, 96, 128, 192, 256]


@given(st.integers(1, 5000))
def test_buckets_rise_to_the_largest_batch_and_pad_less_than_half(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for below, size in zip(sizes, sizes[1:], strict=False):
        assert size - (below + 1) < 0.5 * (below + 1)
    assert len(sizes) <= 2 * math.log2(most) + 2


# --- what it computes ---------------------------------------------------------------------------

batches = st.lists(
    st.tuples(
        st.integers(0, 1),  # block
        st.lists(
            st.tuples(st.sampled_from(wire.DTYPES), st.integers(1, 5)), min_size=1, max_size=3
        ),
        st.integers(0, 1),  # batches left under way after it
    ),
    min_size=1,
    max_size=8,
)


@given(batches=batches, seed=st.integers(0, 1 << 30), graphs=st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_the_order_of_the_streams_every_request_gets_its_own(
    batches: list[tuple[int, list[tuple[wire.Dtype, int]], int]], seed: int, graphs: bool
) -> None:
    runner = engine(FakeGpu(seed), graphs=graphs)
    plain = reference()
    generator = np.random.default_rng(seed)
    under_way: deque[tuple[Pending, int, list[Rows]]] = deque()
    finished: list[tuple[Sequence[Array], Sequence[Array], bool]] = []

    def finish() -> None:
        pending, block, asked = under_way.popleft()
        half = all(rows.features.dtype == np.float16 for rows in asked)
        finished.append((pending.wait(), plain.run(block, asked), half))

    for block, parts, left in batches:
        shape = BLOCKS[block].input_shape
        asked = [
            Rows(*wire.quantise(generator.normal(size=(rows, *shape)), dtype))
            for dtype, rows in parts
        ]
        under_way.append((runner.start(block, asked), block, asked))
        while len(under_way) > left:
            finish()
    while under_way:
        finish()
    for got, expected, half in finished:  # all of them once more: nothing overwrote them
        assert {output.dtype.name for output in got} == {"float16" if half else "float32"}
        assert_close(got, expected, HALF if half else TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("block", [0, 1])
def test_a_batch_gives_what_each_request_gets_alone(
    dtype: str, channels_last: bool, graphs: bool, block: int
) -> None:
    runner = engine(dtype=dtype, channels_last=channels_last, graphs=graphs)
    asked = requests(BLOCKS[block].input_shape)
    together = runner.run(block, asked)
    assert shapes(together) == [(n, *BLOCKS[block].output_shape) for n in SIZES]
    alone = [output for request in asked for output in runner.run(block, [request])]
    assert_close(together, alone, TOLERANCE[dtype])
    assert_close(together, reference().run(block, asked), ROUNDING[dtype])
    assert all(output.flags.c_contiguous for output in together)


def test_batches_are_padded_to_the_next_bucket_with_graphs_only() -> None:
    gpu = FakeGpu()
    runner = engine(gpu)
    # Every block and size is recorded before the first request, the largest first.
    assert [shape[0] for shape in gpu.captured] == 2 * buckets(MAX_ROWS)[::-1]
    gpu.replayed.clear()
    for rows, padded in ((1, 1), (5, 6), (9, 12), (13, 16), (16, 16)):
        runner.run(0, requests((3, 8, 8), sizes=(rows,)))
        assert gpu.replayed.pop() == (padded, 6, 4, 4)
    seen: list[int] = []

    class Look(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return x

    block = Block((2, 1, 1), (2, 1, 1))
    modules = torch.nn.ModuleList([Look()])
    runner = CudaEngine(modules, [block], gpu, max_batch_rows=7, graphs=False)
    assert sorted(seen) == list(range(1, 8))  # each size before the first request
    runner.run(0, requests((2, 1, 1), sizes=(5,)))
    assert seen.pop() == 5
    assert len(gpu.captured) == 2 * len(buckets(MAX_ROWS))


def test_a_third_batch_has_to_wait() -> None:
    runner = engine()
    asked = requests((3, 8, 8))
    assert runner.depth == 2
    first, second = runner.start(0, asked), runner.start(0, asked)
    with pytest.raises(RuntimeError, match="^2 batches are under way, expected fewer$"):
        runner.start(0, asked)
    expected = reference().run(0, asked)
    assert_close(first.wait(), expected, TOLERANCE["float32"])
    third = runner.start(0, asked)
    for pending in (second, third):
        assert_close(pending.wait(), expected, TOLERANCE["float32"])


def test_what_was_copied() -> None:
    asked = requests((3, 8, 8), "float16", (4,))
    pending = engine().start(0, asked)
    assert pending.copied_bytes == 2 * 4 * 192 * 2  # into pinned memory, and on to the GPU
    assert pending.copy_s == 0.0
    pending.wait()
    assert pending.copy_s == 0.25


class Broken(torch.nn.Module):
    """Fails where the first value is 13."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.flatten()[0] == 13:
            raise RuntimeError("broken")
        return 2 * x


def test_a_batch_that_fails_gives_its_place_back() -> None:
    block = Block((2, 1, 1), (2, 1, 1))
    modules = torch.nn.ModuleList([Broken()])
    runner = CudaEngine(modules, [block], FakeGpu(), max_batch_rows=4, graphs=False)
    bad = [Rows(np.full((1, 2, 1, 1), 13, np.float32), None)]
    good = [Rows(np.full((3, 2, 1, 1), 2, np.float32), None)]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="^broken$"):
            runner.run(0, bad)
        (output,) = runner.run(0, good)
        assert (output == 4).all()
    wrong = [Rows(np.zeros((1, 3, 1, 1), np.float32), None)]  # cannot even be packed
    for _ in range(3):
        with pytest.raises(ValueError):
            runner.start(0, wrong)
    assert (runner.run(0, good)[0] == 4).all()


def test_a_block_that_hands_its_input_on() -> None:
    block = Block((2, 1, 1), (2, 1, 1))
    modules = torch.nn.ModuleList([torch.nn.Identity()])
    for graphs in (False, True):
        runner = CudaEngine(modules, [block], FakeGpu(), max_batch_rows=4, graphs=graphs)
        ones, sevens = (
            runner.start(0, [Rows(np.full((rows, 2, 1, 1), value, np.float16), None)])
            for rows, value in ((2, 1), (4, 7))
        )
        assert (ones.wait()[0] == 1).all()
        assert (sevens.wait()[0] == 7).all()


# --- what it refuses ----------------------------------------------------------------------------


def test_engines_are_named_by_device_and_dtype() -> None:
    assert engine(dtype="float16").name == "torch:cuda:float16"
    assert engine(dtype="auto").name == "torch:cuda:bfloat16"
    assert engine(FakeGpu(has_bfloat16=False), dtype="auto").name == "torch:cuda:float32"


@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        ("int8", "engine dtype is 'int8', expected float32, float16, bfloat16 or auto"),
        (
            "bfloat16",
            "engine dtype is 'bfloat16', but cuda has no instructions for it, expected 'float32', "
            "'float16' or 'auto'",
        ),
    ],
)
def test_a_dtype_it_cannot_compute_in(dtype: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        engine(FakeGpu(has_bfloat16=False), dtype=dtype)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(("device", "found"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there(
    device: str, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ConfigError) as raised:
        CudaGpu(device)
    assert str(raised.value) == (
        f"engine device is {device!r}, but torch finds {found} CUDA devices here"
    )
