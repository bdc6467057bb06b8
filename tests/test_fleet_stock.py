"""A stock sends what was mixed, and accepts what the tolerance says and no more.

And the memory it lies in: one copy, read-only, without a name, gone with the last process.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix import wire
from datamix.bundle import load_backbone
from datamix.errors import AnswerError, ConfigError
from edge.fleet.config import FleetConfig
from edge.fleet.prepare import prepare
from edge.fleet.shared import SharedBytes
from edge.fleet.stock import Layout, Leg, Prepared, Stock, StockWorkload, bounds, ordered, parts
from edge.fleet.workload import Outcome, Sealed
from tests.holding import hold
from tests.test_fleet_workload import complete, respond

ROOT = Path(__file__).parents[1]
BUNDLE = str(ROOT / "bundles" / "fashion-mnist-mix")

Array = npt.NDArray[Any]

every_float16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
finite = every_float16[np.isfinite(every_float16)]


def test_the_order_of_whole_numbers_is_that_of_the_floats() -> None:
    by_number = finite[np.argsort(ordered(finite), kind="stable")].astype(np.float64)
    assert (np.diff(by_number) >= 0).all()
    nan = every_float16[np.isnan(every_float16)]
    inside, outside = ordered(finite), ordered(nan)
    assert not ((outside >= inside.min()) & (outside <= inside.max())).any()


@settings(max_examples=200)
@given(st.floats(-60_000, 60_000, width=32), st.floats(0.001, 1), st.integers(0, 2**32 - 1))
def test_exactly_the_values_within_the_tolerance_are_accepted(
    expected: float, tolerance: float, seed: int
) -> None:
    leg = Leg((1, 2), (1, 1))
    prepared = Prepared(np.zeros((1, 2), np.float16), np.full((1, 1), expected, np.float32))
    layout = Layout(1, (leg,))
    stock = Stock(layout, b"".join(parts(layout, [[prepared]], tolerance)))
    width = tolerance * max(1.0, abs(expected))
    near = np.float16(np.clip(expected, -65504, 65504))
    edges = [np.float16(np.clip(expected + sign * width, -65504, 65504)) for sign in (-1, 1)]
    some = [near, *edges, np.float16(0.0), np.float16(-0.0), np.float16(np.nan), np.float16(np.inf)]
    some += [np.nextafter(e, np.float16(toward)) for e in edges for toward in (-65504, 65504)]
    some += list(np.random.default_rng(seed).choice(finite, 20))
    for value in some:
        accepted = stock.accepts(0, 0, np.full((1, 1), value, np.float16))
        assert accepted == (abs(float(value) - expected) <= width), value


def test_what_no_float16_can_answer_is_refused() -> None:
    for value in (1e6, -1e6, np.nan, np.inf):
        with pytest.raises(ConfigError, match="no float16"):
            bounds(np.array([value], np.float32), 0.01)
    with pytest.raises(ConfigError, match="no float16 value"):
        bounds(np.array([1.00048828125 / 2 + 0.0001], np.float32), 1e-9)


def make_stock(groups: int = 3) -> tuple[Stock, list[list[Prepared]]]:
    generator = np.random.default_rng(0)
    legs = (Leg((2, 3, 5), (2, 4)), Leg((2, 4), (2, 7)))
    prepared = [
        [
            Prepared(
                generator.standard_normal(leg.rows_shape).astype(np.float16),
                generator.standard_normal(leg.answer_shape).astype(np.float32),
            )
            for leg in legs
        ]
        for _ in range(groups)
    ]
    layout = Layout(groups, legs)
    memory = b"".join(parts(layout, prepared, 0.01))
    assert len(memory) == layout.size_bytes
    return Stock(layout, memory), prepared


def test_groups_are_sent_in_turn_and_their_answers_told_apart() -> None:
    stock, prepared = make_stock()
    workload = StockWorkload(stock, verify=True)
    assert (workload.rows, workload.rounds) == (2, 2)
    for index in range(7):
        right = prepared[index % 3]

        def cloud(block: int, rows: Array, right: list[Prepared] = right) -> Array:
            assert np.array_equal(rows, right[block].rows.astype(np.float32))
            return right[block].expected

        assert complete(workload, index, cloud) == Outcome()
        other = prepared[(index + 1) % 3]
        assert complete(workload, index, lambda b, r, o=other: o[b].expected).wrong

        def nudged(block: int, rows: Array, right: list[Prepared] = right) -> Array:
            answer = right[block].expected.copy()
            answer[-1, -1] += 0.02 if block == 1 else 0.0
            return answer

        assert complete(workload, index, nudged).wrong
        assert not complete(StockWorkload(stock, verify=False), index, nudged).wrong


@pytest.mark.parametrize("verify", [True, False])
def test_an_answer_of_another_kind_is_no_answer(verify: bool) -> None:
    stock, prepared = make_stock()
    workload = StockWorkload(stock, verify)
    with pytest.raises(AnswerError, match="expected \\(2, 4\\) float16"):
        complete(workload, 0, lambda block, rows: prepared[0][block].expected[:1])
    with pytest.raises(AnswerError, match="NaN"):
        complete(workload, 0, lambda block, rows: prepared[0][block].expected * np.nan)
    inference = workload.start(0)
    question = next(inference)
    assert isinstance(question, Sealed)
    answer = respond(question, prepared[0][0].expected)
    with pytest.raises(AnswerError, match="float32"):
        inference.send(answer._replace(features=answer.features.astype(np.float32)))


def test_memory_of_another_size_is_refused() -> None:
    stock, _ = make_stock()
    with pytest.raises(ConfigError, match="expected"):
        Stock(stock.layout, bytes(stock.layout.size_bytes - 1))
    leg = Leg((1, 2), (1, 3))
    with pytest.raises(ConfigError, match="expected \\(1, 2\\)"):
        list(parts(Layout(1, (leg,)), [[Prepared(np.zeros((1, 3)), np.zeros((1, 3)))]], 0.1))


def test_a_bundle_is_prepared_as_its_cloud_computes() -> None:
    """The backbone, run here anew on what a stock sends, is accepted; half a percent off is not."""
    import torch

    _, blocks = load_backbone(BUNDLE)
    config = FleetConfig("http://x", bundle=BUNDLE, precompute=3, seed=4)
    shelf = prepare(config)
    with shelf.memory:
        workload = StockWorkload(shelf.stock(), verify=True)

        def cloud(block: int, rows: Array) -> Array:
            with torch.inference_mode():
                answer: Array = blocks[block](torch.from_numpy(rows)).numpy()
            return answer

        sent = {next(workload.start(index)).features.tobytes() for index in range(6)}
        assert len(sent) == 3
        for index in range(3):
            assert complete(workload, index, cloud) == Outcome()
            assert complete(workload, index, lambda b, r: cloud(b, r) + 0.1).wrong
        message = next(workload.start(0))
        assert isinstance(message, Sealed)
        body = message.seal("r-1", 1.0)
        assert np.array_equal(wire.decode_request(body).features, message.features)
        del workload, message


def test_settings_that_make_no_stock_are_refused() -> None:
    with pytest.raises(ConfigError, match="precompute is 3"):
        FleetConfig("http://x", workload="echo", precompute=3)
    with pytest.raises(ConfigError, match="precompute is -1"):
        FleetConfig("http://x", bundle=BUNDLE, precompute=-1)


# --- memory -------------------------------------------------------------------------------------


def test_memory_is_one_read_only_copy_without_a_name() -> None:
    before = set(os.listdir("/dev/shm"))
    with SharedBytes.write([b"abc", bytes(5000), b"xyz"]) as memory:
        assert bytes(memory.view[:3]) == b"abc" and bytes(memory.view[-3:]) == b"xyz"
        assert len(memory.view) == 5006 and memory.view.readonly
        with pytest.raises(TypeError):
            memory.view[0] = 1
        assert set(os.listdir("/dev/shm")) == before
        descriptor = memory._descriptor
        with pytest.raises(OSError):
            os.write(descriptor, b"x")
        with contextlib.suppress(PermissionError), mmap.mmap(descriptor, 5006) as writable:
            writable[0] = 1
            pytest.fail("the memory could be written")
        with pytest.raises(TypeError, match="being spawned"):
            pickle.dumps(memory)
    with pytest.raises(ValueError):
        memory.view[0]
    with pytest.raises(OSError):
        os.fstat(descriptor)
    memory.close()
    with pytest.raises(ConfigError, match="no bytes"):
        SharedBytes.write([])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_spawned_processes_map_the_one_copy_and_a_killed_one_leaves_nothing() -> None:
    before = set(os.listdir("/dev/shm"))
    context = multiprocessing.get_context("spawn")
    with SharedBytes.write([b"stock", bytes(1 << 20)]) as memory:
        holders = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=hold, args=(theirs, memory), daemon=True)
            process.start()
            theirs.close()
            holders.append((process, ours))
        for _, ours in holders:
            assert ours.poll(60) and ours.recv() == (b"stock", ["r--s"])
        (killed, _), (other, line) = holders
        killed.kill()
        killed.join(10)
        assert killed.exitcode == -9 and other.is_alive()
        assert bytes(memory.view[:5]) == b"stock"
        line.close()
        other.join(10)
    assert other.exitcode == 0
    assert "memfd:datamix-fleet" not in Path("/proc/self/maps").read_text()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "datamix" in name}
