"""Any history of a batcher, step by step: offers, faults, drains and an engine of depth 1 or 2.

The engine's thread does not run. The machine does its steps one at a time; where it would sleep or
wait for the device, the machine notes so and goes on only when that would end. So every order of
events is one that can happen, and none takes time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from datamix.errors import DataMixError, DeadlineExceeded, Overloaded, Unavailable
from deployments.batcher import Batcher
from deployments.dispatch import Flight
from deployments.engine import Array, Block, Engine, Pending, Rows
from deployments.waiting import Computed, Job
from tests.jobs import Clock, held, make_job

MAX_AGE_S = 4
BAD = -1.0  # the value of a request that the engine fails on


class Sleeping(BaseException):
    """The thread would sleep here."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout


class Waiting(BaseException):
    """The thread would wait for the device here."""


class Signal:
    """What wakes the thread."""

    def __init__(self) -> None:
        self.count = 0

    def put(self, nothing: None) -> None:
        self.count += 1

    def get(self, timeout: float | None) -> None:
        if not self.count:
            raise Sleeping(timeout)
        self.count -= 1


class Loop:
    """An event loop whose callbacks run when the machine says so."""

    def __init__(self) -> None:
        self.callbacks: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def call_soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        self.callbacks.append((callback, arguments))

    call_soon_threadsafe = call_soon

    def run(self) -> None:
        while self.callbacks:
            callback, arguments = self.callbacks.popleft()
            callback(*arguments)


class Device(Engine):
    """An engine whose batches are done when the machine's clock says so."""

    name = "device"
    blocks: Sequence[Block] = (Block((1,), (1,)),) * 2

    def __init__(self, clock: Clock, depth: int) -> None:
        self.clock = clock
        self.depth = depth
        self.under_way: list[OnDevice] = []
        self.calls: list[tuple[int, list[Rows]]] = []
        self.lead_s, self.a_s, self.b_s = 0.25, 1.0, 0.125
        self.broken = False

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        assert len(self.under_way) < self.depth
        if self.broken and any((rows.features == BAD).any() for rows in requests):
            raise RuntimeError("secret")
        pending = OnDevice(self, requests)
        self.calls.append((block, list(requests)))
        self.under_way.append(pending)
        return pending


class OnDevice:
    """One batch of :class:`Device`."""

    copied_bytes = 4
    copy_s = 0.25

    def __init__(self, device: Device, requests: Sequence[Rows]) -> None:
        self.device = device
        self.requests = requests
        rows = sum(len(request.features) for request in requests)
        free = device.under_way[-1].ends if device.under_way else 0.0
        ready = max(free, device.clock.now + device.lead_s)
        self.ends: float = ready + device.a_s + device.b_s * rows

    def done(self) -> bool:
        return self.device.clock.now >= self.ends

    def wait(self) -> Sequence[Array]:
        assert self is self.device.under_way[0]  # in order
        if not self.done():
            raise Waiting
        self.device.under_way.pop(0)
        if any((rows.features == BAD).any() for rows in self.requests):
            raise RuntimeError("secret")
        return [2 * rows.features for rows in self.requests]


class BatcherMachine(RuleBasedStateMachine):
    """One batcher, its loop, its device and its thread, and what was asked and answered."""

    @initialize(
        depth=st.sampled_from([2, 2, 1]),
        max_batch_rows=st.sampled_from([2, 5, 8, 8]),
        max_queue_rows=st.integers(8, 40),
        max_queue_bytes=st.integers(32, 200),
        target_batch_s=st.sampled_from([None, 1.5]),
        taught=st.sampled_from([True, True, False]),
    )
    def build(
        self,
        depth: int,
        max_batch_rows: int,
        max_queue_rows: int,
        max_queue_bytes: int,
        target_batch_s: float | None,
        taught: bool,
    ) -> None:
        logging.getLogger("deployments.batcher").setLevel(logging.CRITICAL)  # faults are wanted
        self.clock = Clock()
        self.loop = Loop()
        self.device = Device(self.clock, depth)
        with mock.patch("deployments.batcher.threading.Thread"):
            self.batcher = Batcher(
                self.device,
                self.loop,  # type: ignore[arg-type]
                max_batch_rows=max_batch_rows,
                max_queue_rows=max_queue_rows,
                max_queue_bytes=max_queue_bytes,
                target_batch_s=target_batch_s,
                max_age_s=MAX_AGE_S,
                clock=self.clock,
            )
        self.signal = Signal()
        self.batcher._signal = self.signal  # type: ignore[assignment]
        self.dispatch = self.batcher._dispatch
        self.queue = self.batcher._queue
        for rows in 8 * [1, 2] if taught else []:
            for cost, lead in zip(self.dispatch.costs, self.dispatch.leads, strict=True):
                cost.observe(rows, self.device.a_s + self.device.b_s * rows)
                lead.observe(rows, self.device.lead_s)
        self.accepted: list[Job] = []
        self.answers: dict[int, list[Computed | DataMixError]] = {}
        self.sleeps_until: float | None = None  # infinity: until it is woken
        self.wake_rows = float("inf")
        self.waits_for: Flight | None = None
        self.draining = self.stopped = False
        self.seen_calls = 0

    # --- the event loop's side ---

    @rule(
        data=st.data(),
        block=st.sampled_from([0, 0, 0, 1]),
        life=st.none() | st.integers(1, 3 * MAX_AGE_S),
        priority=st.integers(0, 1),
        bad=st.integers(0, 9).map(lambda number: number == 0),
    )
    def offer(
        self, data: st.DataObject, block: int, life: int | None, priority: int, bad: bool
    ) -> None:
        rows = data.draw(st.sampled_from([1, 1, 2, self.queue.max_batch_rows]))
        answers: list[Computed | DataMixError] = []
        job = make_job(
            rows,
            block=block,
            value=BAD if bad else float(len(self.accepted)),
            deadline=None if life is None else self.clock.now + life,
            priority=priority,
            done=answers.append,
        )
        waiting = list(self.queue)
        try:
            self.batcher.offer(job)
        except Overloaded as error:
            assert error.retry_after_s is not None
            assert error.retry_after_s > 0
            assert job not in list(self.queue)
        except Unavailable:
            assert self.draining
            assert list(self.queue) == waiting
        else:
            assert not self.draining
            self.accepted.append(job)
            self.answers[id(job)] = answers

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.accepted[data.draw(st.integers(0, len(self.accepted) - 1))]
        if not self.answers[id(job)]:
            job.cancelled = True

    @rule()
    def probe(self) -> None:
        """As :meth:`Batcher.probe` does it, which needs a real loop to wait in."""
        answers: list[Computed | DataMixError] = []
        job = make_job(1, done=answers.append)
        if self.draining:
            return
        self.accepted.append(job)
        self.answers[id(job)] = answers
        self.dispatch.probes.append(job)
        self.batcher._wake()

    @precondition(lambda self: len(self.accepted) > 20 and not self.draining)
    @rule()
    def drain(self) -> None:
        self.draining = self.batcher._draining = True
        self.batcher._wake()

    @rule()
    def run_callbacks(self) -> None:
        self.loop.run()

    @rule(eighths=st.integers(1, 16))
    def pass_time(self, eighths: int) -> None:
        self.clock.now += eighths / 8

    @rule(broken=st.booleans(), a_s=st.sampled_from([0.5, 1.0, 2.0]))
    def change_device(self, broken: bool, a_s: float) -> None:
        self.device.broken, self.device.a_s = broken, a_s

    # --- the thread's side ---

    @rule(times=st.integers(1, 3))
    def run_thread(self, times: int) -> None:
        for _ in range(times):
            self.step()

    def step(self) -> None:
        """What the thread does next, if it can do anything."""
        if self.stopped:
            return
        if self.waits_for is not None:
            assert self.waits_for.pending is not None
            if not self.waits_for.pending.done():
                return
            flight, self.waits_for = self.waits_for, None
            self.batcher._finish(flight)
        elif self.sleeps_until is not None:
            if self.signal.count:
                self.signal.count -= 1
            elif self.clock.now < self.sleeps_until:
                return
            self.sleeps_until = None
        else:
            self.advance()
        self.check_calls()

    @rule(times=st.integers(1, 20))
    def run_until_the_next_batch(self, times: int) -> None:
        """Let the time pass for which the thread sleeps or waits, a few times in a row."""
        calls = len(self.device.calls)
        for _ in range(times):
            if len(self.device.calls) == calls:
                self.step_to_the_end_of_a_wait()

    def step_to_the_end_of_a_wait(self) -> None:
        """Let the time pass for which the thread waits, then step."""
        if self.waits_for is not None:
            pending = self.waits_for.pending
            assert isinstance(pending, OnDevice)
            self.clock.now = max(self.clock.now, pending.ends)
        elif self.sleeps_until is not None and self.sleeps_until < float("inf"):
            self.clock.now = max(self.clock.now, self.sleeps_until)
        self.step()

    def advance(self) -> None:
        self.waiting = list(self.queue)
        self.before = self.dispatch.flights
        self.left_s = self.dispatch.remaining_s(self.clock.now)
        self.next_rows = self.queue.peek(self.clock.now)[1]
        try:
            self.stopped = not self.batcher._step()
        except Sleeping as sleep:
            forever = sleep.timeout is None
            self.sleeps_until = float("inf") if forever else self.clock.now + (sleep.timeout or 0)
            self.wake_rows = self.batcher._wake_rows
            # Nobody sleeps on work, and for ever only where nothing is under way.
            assert not (forever and (self.dispatch.flights or self.queue.rows))
            assert forever or self.device.depth == 2
        except Waiting:
            self.waits_for = self.dispatch.flights[0]
        if self.stopped:
            assert self.draining

    def check_calls(self) -> None:
        """What was handed to the engine since the last look."""
        for block, requests in self.device.calls[self.seen_calls :]:
            rows = sum(len(request.features) for request in requests)
            assert rows <= self.queue.max_batch_rows
            jobs = [job for job in self.accepted if any(job.rows is r for r in requests)]
            assert len(jobs) == len(requests)  # whole requests, each once
            assert {job.block for job in jobs} == {block}
            queued = [job for job in jobs if job in self.waiting]
            if queued:
                assert queued == jobs
                self.check_order(block, jobs)
                self.check_moment(block)
        self.seen_calls = len(self.device.calls)

    def check_order(self, block: int, jobs: list[Job]) -> None:
        """Nothing that still waits is more urgent than what was taken."""
        now = self.clock.now
        left = [job for job in self.queue if job.block == block and job.is_live(now)]
        if left:
            until = now
            if sum(job.count for job in self.waiting) > self.queue.limit(block):
                until += self.left_s + self.queue.full_s.get(block, 0.0)
            taken = [self.urgency(job, until) for job in jobs]
            assert max(taken) <= min(self.urgency(job, until) for job in left)
        assert not any(job.deadline is not None and job.deadline <= now for job in jobs)

    def check_moment(self, block: int) -> None:
        """Beside another batch only a full one is started before the time has come."""
        if not self.before or self.next_rows >= self.queue.limit(block) or self.draining:
            return
        assert all(self.dispatch.costs[flight.block].warm for flight in self.before)
        lead_s = self.dispatch.leads[block].predict(self.next_rows)
        assert self.left_s <= lead_s + 0.05 * self.before[0].cost_s + 0.001

    def urgency(self, job: Job, now: float) -> tuple[bool, float]:
        due = job.arrived + MAX_AGE_S
        due = due if job.deadline is None else min(due, job.deadline)
        return job.priority == 1 and due > now, due

    # --- what always holds ---

    @invariant()
    def bounds_are_held(self) -> None:
        if not hasattr(self, "batcher"):
            return
        waiting = list(self.queue)
        assert self.queue.rows == sum(job.count for job in waiting) <= self.queue.max_queue_rows
        assert self.queue.bytes == sum(map(held, waiting)) <= self.queue.max_queue_bytes
        assert len(self.dispatch.flights) <= self.device.depth
        assert self.batcher.busy_s <= self.clock.now - 100.0

    @invariant()
    def nobody_sleeps_while_there_is_work(self) -> None:
        if getattr(self, "sleeps_until", None) is None:
            return
        if 0 < self.queue.rows >= self.wake_rows or self.dispatch.probes or self.draining:
            puts = [callback for callback, _ in self.loop.callbacks]
            assert self.signal.count or self.signal.put in puts

    @invariant()
    def answers_are_right_and_come_once(self) -> None:
        for job in getattr(self, "accepted", ()):
            answers = self.answers[id(job)]
            assert len(answers) <= 1
            for answer in answers:
                if isinstance(answer, Computed):
                    np.testing.assert_array_equal(answer.output, 2 * job.rows.features)
                    timing = answer.timing
                    assert timing.queue_s >= 0
                    assert timing.compute_s >= 0
                elif isinstance(answer, DeadlineExceeded):
                    assert job.deadline is not None
                else:
                    assert isinstance(answer, Unavailable)
                    assert (job.rows.features == BAD).all()

    def teardown(self) -> None:
        logging.getLogger("deployments.batcher").setLevel(logging.NOTSET)
        if not hasattr(self, "batcher"):
            return
        if not self.draining:
            self.draining = self.batcher._draining = True
            self.batcher._wake()
        for _ in range(20 * (len(self.accepted) + 2)):
            self.loop.run()
            self.step_to_the_end_of_a_wait()
        self.loop.run()
        assert self.stopped  # nobody sleeps through a signal
        assert self.queue.rows == self.queue.bytes == 0
        assert self.dispatch.flights == ()
        assert self.device.under_way == []
        self.answers_are_right_and_come_once()
        for job in self.accepted:
            assert job.cancelled or len(self.answers[id(job)]) == 1  # nothing is lost
        statistics = self.batcher.statistics
        assert sum(statistics.close_reasons.values()) == statistics.batches


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
