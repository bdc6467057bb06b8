"""The emulated engine takes the time it should, on a clock that the tests own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import ConfigError
from deployments.emulated import Cost, EmulatedEngine, emulated
from tests.rows import requests

SHAPE = (2, 1, 1)


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def engine(clock: Clock, *costs: Cost, depth: int = 1) -> EmulatedEngine:
    return EmulatedEngine(
        [SHAPE] * len(costs), costs, name="x", depth=depth, clock=clock, sleep=clock.sleep
    )


def test_a_batch_takes_a_plus_b_per_row() -> None:
    clock = Clock()
    runner = engine(clock, Cost(0.25, 0.125), Cost(1.0, 0.0))
    for block, sizes, seconds in ((0, (1,), 0.375), (0, (1, 4, 2), 1.125), (1, (3,), 1.0)):
        before = clock.now
        asked = requests(SHAPE, sizes=sizes)
        pending = runner.start(block, asked)
        assert (clock.now, pending.done()) == (before, False)
        for output, request in zip(pending.wait(), asked, strict=True):
            np.testing.assert_array_equal(output, request.features)
        assert clock.now == pytest.approx(before + seconds)
        assert pending.done()


def test_copies_go_on_while_another_batch_is_computed() -> None:
    clock = Clock()
    runner = engine(clock, Cost(1.0, 0.0, 0.25, 0.125), depth=2)
    asked = requests(SHAPE, sizes=(2,))  # 0.5 s to copy, 1 s to compute
    first = runner.start(0, asked)
    second = runner.start(0, asked)
    first.wait()
    assert clock.now == 101.5
    assert first.copy_s == 0.5
    third = runner.start(0, asked)
    second.wait()
    assert clock.now == 102.5  # its copy was hidden
    third.wait()
    assert clock.now == 103.5
    runner.run(0, asked)
    assert clock.now == 105.0  # nothing to hide behind


@given(
    cost=st.tuples(*[st.floats(0, 10)] * 4),
    batches=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 20)), min_size=1, max_size=8),
)
def test_batches_finish_in_order_and_neither_unit_does_two_things_at_once(
    cost: tuple[float, float, float, float], batches: list[tuple[int, float]]
) -> None:
    clock = Clock()
    runner = engine(clock, Cost(*cost), depth=2)
    ends = [clock.now]
    copied = clock.now
    for rows, pause_s in batches:
        clock.now += pause_s
        a_s, b_s, copy_a_s, copy_b_s = cost
        copied = max(clock.now, copied) + copy_a_s + copy_b_s * rows
        ends.append(max(copied, ends[-1]) + a_s + b_s * rows)
        pending = runner.start(0, requests(SHAPE, sizes=(rows,)))
        pending.wait()
        assert clock.now == pytest.approx(ends[-1])


def test_it_is_named_by_its_cost() -> None:
    plain = emulated([SHAPE, SHAPE], 0.05, 0.0005)
    assert plain.name == "emulated:0.05,0.0005"
    assert plain.costs == [Cost(0.05, 0.0005)] * 2
    assert plain.depth == 1


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_impossible_durations(seconds: float, place: int) -> None:
    numbers = [0.0] * 4
    numbers[place] = seconds
    with pytest.raises(ConfigError, match=r"^emulated engine has a_s=.*, expected seconds >= 0$"):
        engine(Clock(), Cost(*numbers))


@pytest.mark.parametrize("costs", [[], [Cost(0, 0)] * 2])
def test_every_block_needs_its_cost(costs: Sequence[Cost]) -> None:
    with pytest.raises(ConfigError) as raised:
        EmulatedEngine([SHAPE], costs, name="x")
    assert str(raised.value) == (f"emulated engine has costs of {len(costs)} blocks, expected 1")
