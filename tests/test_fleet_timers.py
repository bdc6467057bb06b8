"""Timers by a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from edge.fleet.timers import Timers


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def within(work: Callable[[Timers, Clock, list[Exception]], None]) -> None:
    async def go() -> None:
        clock, crashes = Clock(), list[Exception]()
        timers = Timers(clock, crashes.append)
        work(timers, clock, crashes)
        timers.close()

    asyncio.run(go())


def test_calls_come_in_time_and_in_order() -> None:
    def work(timers: Timers, clock: Clock, crashes: list[Exception]) -> None:
        called: list[str] = []
        for when_s, name in [(103, "c"), (101, "a"), (101, "b"), (102, "z")]:
            timers.at(when_s, called.append, name)
        timers.run_due()
        assert called == [] and len(timers) == 4
        clock.now_s = 101
        timers.run_due()
        assert called == ["a", "b"]
        clock.now_s = 200
        timers.run_due()
        assert called == ["a", "b", "z", "c"] and len(timers) == 0 and crashes == []

    within(work)


def test_what_is_added_while_others_are_called_is_called_in_its_turn() -> None:
    def work(timers: Timers, clock: Clock, crashes: list[Exception]) -> None:
        called: list[int] = []

        def again(left: int) -> None:
            called.append(left)
            if left:
                timers.at(clock.now_s + (0 if left > 2 else 5), again, left - 1)

        timers.at(99, again, 4)
        timers.run_due()
        assert called == [4, 3, 2]
        clock.now_s += 5
        timers.run_due()
        assert called == [4, 3, 2, 1]

    within(work)


def test_a_call_that_fails_is_heard_of() -> None:
    def work(timers: Timers, clock: Clock, crashes: list[Exception]) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        timers.at(1, fail)
        timers.run_due()
        assert [type(crash) for crash in crashes] == [ZeroDivisionError]

    within(work)


def test_the_loop_calls_when_the_earliest_is_due() -> None:
    async def go() -> float:
        loop = asyncio.get_running_loop()
        timers = Timers(loop.time, lambda error: None)
        done: asyncio.Future[float] = loop.create_future()
        begun_s = loop.time()
        timers.at(begun_s + 60, done.set_result, 0.0)
        timers.at(begun_s + 0.02, lambda: done.set_result(loop.time() - begun_s))
        found = await asyncio.wait_for(done, 10)
        timers.close()
        return found

    assert asyncio.run(go()) == pytest.approx(0.02, abs=0.5) and asyncio.run(go()) >= 0.02
