"""The queue as a pure object, and the batcher around an engine that stops where a test wants."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
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
from deployments.engine import Block, Engine, Pending, Rows, Settled
from deployments.waiting import Computed, Job, Queue, Taken, Timing

PATIENCE_S = 10.0  # for what must happen at once; only a failing test waits so long


def make_job(
    rows: int = 1,
    *,
    block: int = 0,
    value: float = 0.0,
    deadline: float | None = None,
    priority: int = 0,
    arrived: float = 0.0,
    done: Callable[[Computed | DataMixError], None] = lambda outcome: None,
) -> Job:
    rows_of_it = Rows(np.full((rows, 1), value, np.float32), None)
    return Job(block, rows_of_it, done, deadline=deadline, priority=priority, arrived=arrived)


def counts(jobs: Sequence[Job]) -> list[int]:
    return [job.count for job in jobs]


def held(job: Job) -> int:
    """Bytes of a job's rows."""
    return sum(len(part.tobytes()) for part in job.rows if part is not None)


# --- the queue ----------------------------------------------------------------------------------


MAX_AGE_S = 3


class QueueMachine(RuleBasedStateMachine):
    """Any order of offers, takes, cancellations and passing time, beside a list that remembers."""

    @initialize(
        max_batch_rows=st.integers(1, 8),
        max_queue_rows=st.integers(1, 40),
        max_queue_bytes=st.integers(16, 200),
    )
    def build(self, max_batch_rows: int, max_queue_rows: int, max_queue_bytes: int) -> None:
        self.queue = Queue(
            max_batch_rows=max_batch_rows,
            max_queue_rows=max_queue_rows,
            max_queue_bytes=max_queue_bytes,
            max_age_s=MAX_AGE_S,
        )
        self.now = 0.0
        self.waiting: list[Job] = []  # in order of arrival
        self.left: list[Job] = []
        self.swept = False

    @rule(
        data=st.data(),
        block=st.integers(0, 2),
        life=st.none() | st.integers(0, 2 * MAX_AGE_S),
        priority=st.integers(0, 1),
        int8=st.booleans(),
    )
    def offer(
        self, data: st.DataObject, block: int, life: int | None, priority: int, int8: bool
    ) -> None:
        rows = data.draw(st.integers(1, self.queue.max_batch_rows))
        deadline = None if life is None else self.now + life
        job = make_job(rows, block=block, deadline=deadline, priority=priority, arrived=self.now)
        if int8:
            job.rows = Rows(np.zeros((rows, 1), np.int8), np.ones(rows, np.float32))
        fits = sum(counts(self.waiting)) + rows <= self.queue.max_queue_rows
        fits &= sum(map(held, self.waiting)) + held(job) <= self.queue.max_queue_bytes
        assert self.queue.offer(job) == fits
        assert fits or self.queue.refusal(job)
        if fits:
            self.waiting.append(job)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.waiting[data.draw(st.integers(0, len(self.waiting) - 1))].cancelled = True

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(data=st.data(), block=st.integers(0, 2))
    def set_limit(self, data: st.DataObject, block: int) -> None:
        self.queue.limits[block] = data.draw(st.integers(1, self.queue.max_batch_rows))

    @rule(block=st.integers(0, 2), seconds=st.integers(0, 2))
    def set_full_s(self, block: int, seconds: int) -> None:
        self.queue.full_s[block] = seconds

    @rule()
    def sweep(self) -> None:
        dead = [] if self.swept else [job for job in self.waiting if not self.is_live(job)]
        late = self.queue.sweep(self.now)
        assert set(map(id, late)) == {id(job) for job in dead if not job.cancelled}
        assert len(set(map(id, late))) == len(late)
        self.left += late
        self.keep(job for job in self.waiting if job not in dead)
        self.swept = True

    @rule()
    def take(self) -> None:
        live = [job for job in self.waiting if self.is_live(job)]
        crowd = self.queue.rows
        taken = self.queue.take(self.now)
        self.swept = False
        for job in taken.expired:
            assert not job.cancelled
            if not self.is_late(job):  # given up: it would be late by the end of a full batch
                assert job.deadline is not None
                assert job.deadline <= self.now + self.queue.full_s[job.block]
                assert crowd > self.limit(job.block)
        self.check_batch(taken, live, crowd)
        # What left was computed, too late or cancelled.
        remaining = list(self.queue)
        gone = [job for job in self.waiting if job not in remaining]
        answered = taken.batch + taken.expired
        assert len(set(map(id, answered))) == len(answered)
        assert set(map(id, answered)) == {id(job) for job in gone if not job.cancelled}
        self.left += answered
        self.keep(job for job in self.waiting if job in remaining)
        self.check_age(taken, [job for job in live if job in remaining])

    def check_batch(self, taken: Taken, live: list[Job], crowd: int) -> None:
        if not live:
            assert taken.batch == []
            assert len(self.queue) == 0  # nothing dead holds room where nothing lives
            return
        # The most urgent live request is in the batch, or was given up.
        best = min(map(self.urgency, live))
        given_up = [job for job in taken.expired if not self.is_late(job)]
        assert best in map(self.urgency, taken.batch + given_up)
        (block,) = {job.block for job in taken.batch + given_up}
        limit = self.limit(block)
        # One block, the most urgent first, in order of arrival where all else is equal; none that
        # is given up is computed all the same.
        until = self.now + (self.queue.full_s.get(block, 0.0) if crowd > limit else 0.0)
        same = [job for job in live if job.block == block]
        same = [job for job in same if job.deadline is None or job.deadline > until]
        same.sort(key=lambda job: (self.urgency(job, until), job.priority))
        assert taken.batch == same[: len(taken.batch)]
        if not taken.batch:
            assert not same
            return
        rows = sum(counts(taken.batch))
        assert rows <= limit or len(taken.batch) == 1
        assert rows <= self.queue.max_batch_rows
        follower = same[len(taken.batch) : len(taken.batch) + 1]
        full = rows + sum(counts(follower)) > limit
        assert full or not follower  # as large as it may be
        limited = "full" if limit == self.queue.max_batch_rows else "deadline"
        assert taken.close_reason == (limited if full or rows == limit else "engine_free")

    def check_age(self, taken: Taken, behind: list[Job]) -> None:
        """What came once another was due, however low that one's priority, may not go before it."""
        for old in behind:
            if self.now - old.arrived >= MAX_AGE_S:
                rivals = [job for job in taken.batch if job.block == old.block] + taken.batch[:1]
                assert all(job.arrived <= old.arrived + MAX_AGE_S for job in rivals)

    def limit(self, block: int) -> int:
        return self.queue.limits.get(block, self.queue.max_batch_rows)

    def urgency(self, job: Job, now: float | None = None) -> tuple[bool, float]:
        due = job.arrived + MAX_AGE_S
        due = due if job.deadline is None else min(due, job.deadline)
        return job.priority == 1 and due > (self.now if now is None else now), due

    def is_late(self, job: Job) -> bool:
        return job.deadline is not None and job.deadline <= self.now

    def is_live(self, job: Job) -> bool:
        return not job.cancelled and not self.is_late(job)

    def keep(self, jobs: Iterable[Job]) -> None:
        self.waiting = list(jobs)
        assert set(map(id, self.queue)) == set(map(id, self.waiting))

    @invariant()
    def rows_are_counted(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.rows == sum(counts(self.waiting)) <= self.queue.max_queue_rows
        assert self.queue.bytes == sum(map(held, self.waiting)) <= self.queue.max_queue_bytes
        assert len(self.queue) == len(self.waiting)
        for block in range(3):
            near = [
                job.count
                for job in self.waiting
                if job.block == block and job.priority == 0 and job.deadline is not None
                if job.deadline <= job.arrived + MAX_AGE_S
            ]
            assert self.queue._promised[block] == sum(near)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        while len(self.queue):
            self.take()
        assert len(set(map(id, self.left))) == len(self.left)  # nothing is answered twice
        assert self.queue.rows == self.queue.bytes == 0


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_an_empty_queue_gives_an_empty_batch() -> None:
    assert Queue(max_batch_rows=4, max_queue_rows=8).take(0.0).batch == []


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    queue = Queue(max_batch_rows=4, max_queue_rows=100)
    sizes = [3, 2, 1, 4, 1]
    for size in sizes:
        queue.offer(make_job(size))
    batches = []
    while len(queue):
        taken = queue.take(0.0)
        batches.append((counts(taken.batch), taken.close_reason))
    assert batches == [([3], "full"), ([2, 1], "full"), ([4], "full"), ([1], "engine_free")]


def test_other_blocks_keep_their_places() -> None:
    queue = Queue(max_batch_rows=4, max_queue_rows=100)
    for block in (1, 0, 1, 2, 0):
        queue.offer(make_job(block=block))
    batches = []
    while len(queue):
        batches.append([job.block for job in queue.take(0.0).batch])
    assert batches == [[1, 1], [0, 0], [2]]


def drained(queue: Queue, now: float) -> list[list[float]]:
    """The batches that are left, by the values of their requests."""
    batches = []
    while len(queue):
        batches.append([float(job.rows.features[0, 0]) for job in queue.take(now).batch])
    return batches


def test_the_earliest_deadline_goes_first_and_none_counts_as_the_age_bound() -> None:
    queue = Queue(max_batch_rows=1, max_queue_rows=100, max_age_s=2.0)
    deadlines = {1: None, 2: 1.5, 3: 1.0, 4: 60.0, 5: 1.5, 6: None, 7: 0.5}
    for value, deadline in deadlines.items():
        queue.offer(make_job(value=value, deadline=deadline))
    assert drained(queue, 0.0) == [[7], [3], [2], [5], [1], [4], [6]]


def test_low_priority_goes_last_until_it_is_due() -> None:
    def filled() -> Queue:
        queue = Queue(max_batch_rows=2, max_queue_rows=100, max_age_s=2.0)
        queue.offer(make_job(value=1, priority=1))
        queue.offer(make_job(value=2, priority=1, deadline=0.9, arrived=0.1))
        for value in (3, 4, 5):
            queue.offer(make_job(value=value, arrived=0.2))
        return queue

    assert drained(filled(), 0.5) == [[3, 4], [5, 2], [1]]
    assert drained(filled(), 2.0) == [[1, 3], [4, 5]]  # and 2 has expired


def test_low_priority_is_served_beside_an_endless_stream_of_normal_requests() -> None:
    queue = Queue(max_batch_rows=1, max_queue_rows=100, max_age_s=2.0)
    queue.offer(make_job(value=1, priority=1))
    queue.offer(make_job(arrived=0.0))
    for tick in range(1, 30):
        now = tick / 10
        queue.offer(make_job(arrived=now))
        (job,) = queue.take(now).batch
        if job.priority:
            break
    assert now == 2.0


def test_a_limit_below_the_bound_closes_a_batch_as_deadline() -> None:
    queue = Queue(max_batch_rows=8, max_queue_rows=100)
    queue.limits[0] = 3
    for size in (2, 2, 1, 5, 1):
        queue.offer(make_job(size))
    batches = []
    while len(queue):
        taken = queue.take(0.0)
        batches.append((counts(taken.batch), taken.close_reason))
    assert batches == [
        ([2], "deadline"),
        ([2, 1], "deadline"),
        ([5], "deadline"),  # never split, so it goes alone
        ([1], "engine_free"),
    ]


def test_what_goes_before_a_request() -> None:
    queue = Queue(max_batch_rows=8, max_queue_rows=100, max_age_s=2.0)
    for block, deadline, priority in ((0, 1.0, 0), (0, 1.5, 0), (1, None, 0), (1, None, 1)):
        job = make_job(3, block=block, deadline=deadline, priority=priority)
        assert queue.offer(job)
    assert queue.ahead(0.5) == {0: 6, 1: 6}
    assert queue.ahead(0.5, make_job(arrived=0.5)) == {0: 6, 1: 3}
    # The second of block 0 was accepted for a later deadline, and is not to miss it now.
    assert queue.ahead(0.5, make_job(arrived=0.5, deadline=1.2)) == {0: 6}
    assert queue.ahead(0.5, make_job(arrived=0.5, priority=1)) == {0: 6, 1: 6}
    assert queue.ahead(2.5, make_job(arrived=2.5)) == {0: 6, 1: 6}  # the low one is overdue


def test_a_crowded_queue_gives_up_what_would_be_late_after_a_full_batch() -> None:
    def filled(count: int) -> Queue:
        queue = Queue(max_batch_rows=2, max_queue_rows=100)
        queue.full_s[0] = 0.5
        for value in range(count):
            queue.offer(make_job(value=value, deadline=0.25 + 0.25 * value))
        return queue

    crowded = filled(4)
    taken = crowded.take(0.0)
    assert [float(job.rows.features[0, 0]) for job in taken.expired] == [0, 1]
    assert [float(job.rows.features[0, 0]) for job in taken.batch] == [2, 3]
    assert drained(filled(2), 0.0) == [[0, 1]]  # all fit in one batch, which may be quick


# --- the batcher --------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine(Engine):
    """Doubles its input. Closed, it stops inside each batch until a test lets one go."""

    closed: bool = False
    fails_on: Callable[[Sequence[Rows]], bool] = lambda requests: False
    during: Callable[[], None] = lambda: None
    name: str = "fake"
    blocks: Sequence[Block] = (Block((1,), (1,)),) * 3
    calls: list[tuple[int, list[int]]] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    release: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        self.calls.append((block, [len(request.features) for request in requests]))
        self.entered.release()
        if self.closed:
            self.release.acquire(timeout=PATIENCE_S)
        self.during()
        if self.fails_on(requests):
            raise RuntimeError("secret 0.1234 in /some/path")
        return Settled([2 * request.features for request in requests], 100)

    async def await_entry(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)

    def open(self) -> None:
        self.closed = False
        self.release.release(100)


def fails_on_value(value: float) -> Callable[[Sequence[Rows]], bool]:
    return lambda requests: any((request.features == value).any() for request in requests)


@asynccontextmanager
async def batching(
    engine: FakeEngine,
    *,
    max_batch_rows: int = 8,
    max_queue_rows: int = 100,
    max_queue_bytes: int = 1 << 30,
    target_batch_s: float | None = None,
    clock: Callable[[], float] | None = None,
    on_batch: Callable[[Timing], None] = lambda timing: None,
) -> AsyncIterator[Batcher]:
    batcher = Batcher(
        engine,
        asyncio.get_running_loop(),
        max_batch_rows=max_batch_rows,
        max_queue_rows=max_queue_rows,
        max_queue_bytes=max_queue_bytes,
        target_batch_s=target_batch_s,
        on_batch=on_batch,
        clock=clock or Clock(),
    )
    try:
        yield batcher
    finally:
        engine.open()
        await batcher.drain(PATIENCE_S)


Answer = asyncio.Future[Computed]


def submit(
    batcher: Batcher,
    value: float = 1.0,
    rows: int = 1,
    *,
    block: int = 0,
    deadline: float | None = None,
    priority: int = 0,
) -> Answer:
    """Offer a request; its answer, which fails if it is given twice."""
    job = submit_job(batcher, value, rows, block=block, deadline=deadline, priority=priority)
    return job[1]


def submit_job(
    batcher: Batcher,
    value: float = 1.0,
    rows: int = 1,
    *,
    block: int = 0,
    deadline: float | None = None,
    priority: int = 0,
) -> tuple[Job, Answer]:
    answer: Answer = asyncio.get_running_loop().create_future()

    def done(outcome: Computed | DataMixError) -> None:
        if isinstance(outcome, DataMixError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    job = make_job(rows, block=block, value=value, deadline=deadline, priority=priority, done=done)
    batcher.offer(job)
    return job, answer


async def settled(*answers: Answer) -> list[Computed | BaseException]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*answers, return_exceptions=True)


async def computed(*answers: Answer) -> list[Computed]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*answers)


async def turn() -> None:
    """Let everything that is ready on the event loop happen."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "engine"] == []


def test_an_idle_engine_starts_at_once() -> None:
    async def go() -> None:
        engine = FakeEngine()
        async with batching(engine) as batcher:
            (answer,) = await computed(submit(batcher, 3.0, 2))
            np.testing.assert_array_equal(answer.output, np.full((2, 1), 6.0))
            assert answer.timing.batch_rows == 2
            assert answer.timing.close_reason == "engine_free"

    asyncio.run(go())


def test_requests_gather_while_the_engine_is_busy() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            first = submit(batcher, 1.0)
            await engine.await_entry()
            others = [submit(batcher, float(n), n) for n in (2, 3)]
            assert batcher.queue_rows == 5
            engine.open()
            answers = await computed(first, *others)
            assert engine.calls == [(0, [1]), (0, [2, 3])]
            for answer, n in zip(answers, (1, 2, 3), strict=True):
                np.testing.assert_array_equal(answer.output, np.full((n, 1), 2.0 * n))
            assert [answer.timing.batch_rows for answer in answers] == [1, 5, 5]
            assert {answer.timing.close_reason for answer in answers} == {"engine_free"}
            assert batcher.queue_rows == 0

    asyncio.run(go())


def test_a_full_batch_closes_as_full() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_batch_rows=4) as batcher:
            first = submit(batcher)
            await engine.await_entry()
            others = [submit(batcher, rows=2) for _ in range(3)]
            engine.open()
            answers = await computed(first, *others)
            assert engine.calls == [(0, [1]), (0, [2, 2]), (0, [2])]
            assert [answer.timing.close_reason for answer in answers] == [
                "engine_free",
                "full",
                "full",
                "engine_free",
            ]
            assert batcher.statistics.close_reasons == {"engine_free": 2, "full": 1}

    asyncio.run(go())


def test_blocks_are_never_mixed() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            first = submit(batcher)
            await engine.await_entry()
            others = [submit(batcher, float(n), block=n % 3) for n in range(6)]
            engine.open()
            answers = await computed(first, *others)
            assert engine.calls == [(0, [1]), (0, [1, 1]), (1, [1, 1]), (2, [1, 1])]
            for n, answer in enumerate(answers[1:]):
                assert answer.output == 2 * n

    asyncio.run(go())


def test_timings_and_totals() -> None:
    async def go() -> None:
        clock = Clock()

        def compute() -> None:
            clock.now += 0.5

        engine = FakeEngine(closed=True, during=compute)
        batches: list[Timing] = []
        async with batching(engine, clock=clock, on_batch=batches.append) as batcher:
            first = submit(batcher, rows=2)
            await engine.await_entry()
            clock.now += 0.25
            assert batcher.busy_s == 0.25  # the running batch counts
            second = submit(batcher, rows=3)
            clock.now += 0.25
            third = submit(batcher)
            engine.open()
            one, two, three = await computed(first, second, third)
            assert one.timing == Timing(0.0, 1.0, 2, "engine_free")
            assert two.timing == Timing(0.75, 0.5, 4, "engine_free")
            assert three.timing == Timing(0.5, 0.5, 4, "engine_free")
            statistics = batcher.statistics
            assert (statistics.batches, statistics.rows) == (2, 6)
            assert statistics.busy_s == batcher.busy_s == 1.5
            assert statistics.queue_s == 1.25
            assert statistics.copied_bytes == 200
            await turn()
            assert batches == [one.timing, two.timing]  # each by its oldest request

    asyncio.run(go())


def test_a_full_queue_sheds_at_once_and_says_when_to_come_back() -> None:
    async def go() -> None:
        clock = Clock()

        def compute() -> None:
            clock.now += 2.0

        engine = FakeEngine(closed=True, during=compute)
        async with batching(engine, max_batch_rows=4, max_queue_rows=6, clock=clock) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            waiting = [submit(batcher, rows=3), submit(batcher, rows=3)]
            with pytest.raises(Overloaded) as raised:
                submit(batcher)
            assert str(raised.value) == "the queue holds 6 rows of at most 6, try again later"
            assert raised.value.retry_after_s is not None
            assert raised.value.retry_after_s > 0
            engine.release.release()  # one batch passes, and now it is known how long one takes
            await engine.await_entry()
            submitted = submit(batcher, rows=3)
            with pytest.raises(Overloaded) as raised:
                submit(batcher)
            assert raised.value.retry_after_s == pytest.approx(2.0 * (1 + 6 / 4))
            engine.open()
            await computed(running, *waiting, submitted)
            assert [rows for _, rows in engine.calls] == [[1], [3], [3], [3]]

    asyncio.run(go())


def test_a_queue_that_is_full_in_bytes_sheds_too() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_queue_bytes=100) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            waiting = [submit(batcher, rows=8) for _ in range(3)]  # 32 bytes each
            with pytest.raises(Overloaded) as raised:
                submit(batcher, rows=2)
            assert str(raised.value) == ("the queue holds 96 bytes of at most 100, try again later")
            assert raised.value.retry_after_s is not None
            fits = submit(batcher, rows=1)
            engine.open()
            await computed(running, *waiting, fits)
            await computed(submit(batcher, rows=8))  # what left makes room

    asyncio.run(go())


def test_a_deadline_that_passed_is_answered_without_compute() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        async with batching(engine, clock=clock) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            late = submit(batcher, 2.0, deadline=clock.now + 1)
            alive = submit(batcher, 3.0, deadline=clock.now + 3)
            clock.now += 2
            engine.open()
            _, late_outcome, alive_outcome = await settled(running, late, alive)
            assert isinstance(late_outcome, DeadlineExceeded)
            assert isinstance(alive_outcome, Computed)
            assert engine.calls == [(0, [1]), (0, [1])]

    asyncio.run(go())


def test_a_deadline_that_passes_during_the_computation_changes_nothing() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        async with batching(engine, clock=clock) as batcher:
            answer = submit(batcher, 2.0, deadline=clock.now + 1)
            await engine.await_entry()
            clock.now += 2
            engine.open()
            assert (await computed(answer))[0].output == 4.0

    asyncio.run(go())


def test_a_cancelled_request_is_neither_computed_nor_answered() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            running, running_answer = submit_job(batcher)
            await engine.await_entry()
            waiting, waiting_answer = submit_job(batcher)
            other = submit(batcher, 5.0)
            running.cancelled = waiting.cancelled = True
            engine.open()
            assert (await computed(other))[0].output == 10.0
            assert engine.calls == [(0, [1]), (0, [1])]
            assert not running_answer.done()
            assert not waiting_answer.done()

    asyncio.run(go())


def test_urgent_requests_go_first() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        batches: list[Timing] = []
        async with batching(
            engine, max_batch_rows=3, clock=clock, on_batch=batches.append
        ) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            answers = [
                submit(batcher, rows=1, priority=1),
                submit(batcher, rows=2),
                submit(batcher, rows=3, deadline=clock.now + 1.5),
            ]
            clock.now += 0.5
            answers.append(submit(batcher, rows=1, deadline=clock.now + 1.2))
            engine.open()
            await computed(running, *answers)
            assert [rows for _, rows in engine.calls] == [[1], [3], [1, 2], [1]]
            await turn()
            assert batches[2].queue_s == 0.5  # of the oldest, which is not the most urgent

    asyncio.run(go())


# --- the cost model -----------------------------------------------------------------------------


def costly(clock: Clock, a_s: float, b_s: float) -> FakeEngine:
    """An engine whose batches take ``a_s + b_s * rows`` seconds of the test's clock."""

    def compute() -> None:
        clock.now += a_s + b_s * sum(engine.calls[-1][1])

    engine = FakeEngine(during=compute)
    return engine


async def teach(batcher: Batcher, engine: FakeEngine, batches: int = 8) -> None:
    """Run batches of 1, 2, 3, ... rows."""
    for rows in range(1, batches + 1):
        await computed(submit(batcher, rows=rows))
        await engine.await_entry()


def test_a_request_that_cannot_be_in_time_is_refused_at_once() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, max_batch_rows=8, clock=clock) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            running = submit(batcher, rows=4)  # 1.4 s
            await engine.await_entry()
            clock.now += 0.4
            waiting = submit(batcher, rows=3)  # with one more row 1.4 s after the running one
            with pytest.raises(
                Overloaded, match="predicted in 2.4 s, after the deadline in 2 s"
            ) as late:
                submit(batcher, deadline=clock.now + 2.0)
            wait_s = late.value.retry_after_s
            assert wait_s is not None
            assert wait_s == pytest.approx(0.4, rel=0.1)
            # What it says is true: when that time has passed, the same request is accepted.
            clock.now += wait_s
            accepted = submit(batcher, deadline=clock.now + 2.0)
            assert batcher.queue_rows == 4
            clock.now = 110.0
            engine.open()
            await settled(running, waiting, accepted)

    asyncio.run(go())


def test_an_urgent_request_is_measured_by_what_goes_before_it_only() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 0.1, 0.01)
        async with batching(engine, max_batch_rows=8, clock=clock) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            answers = [submit(batcher, rows=8)]
            await engine.await_entry()
            answers += [submit(batcher, rows=8) for _ in range(5)]
            assert batcher.predicted_wait_s() == pytest.approx(6 * 0.18, rel=0.1)
            answers.append(submit(batcher, deadline=clock.now + 0.5))
            with pytest.raises(Overloaded):
                submit(batcher, deadline=clock.now + 0.5, priority=1)
            with pytest.raises(Overloaded):
                submit(batcher, deadline=clock.now + 0.2)
            engine.open()
            await computed(*answers)
            assert [rows for _, rows in engine.calls[8:]] == [[8], [1], *5 * [[8]]]

    asyncio.run(go())


def test_a_cold_model_refuses_nobody() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, clock=clock) as batcher:
            await teach(batcher, engine, 7)
            engine.closed = True
            running = submit(batcher)
            await engine.await_entry()
            hopeless = submit(batcher, deadline=clock.now + 0.001)
            other = submit(batcher, block=1, deadline=clock.now + 0.001)  # nothing known of block 1
            engine.open()
            outcomes = await settled(running, hopeless, other)
            assert [type(outcome) for outcome in outcomes] == [
                Computed,
                DeadlineExceeded,
                DeadlineExceeded,
            ]

    asyncio.run(go())


def test_each_block_has_a_model_of_its_own() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, clock=clock) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            answers = [submit(batcher, block=1)]
            await engine.await_entry()
            answers += [submit(batcher, block=1), submit(batcher, rows=7), submit(batcher, rows=2)]
            engine.release.release()
            await engine.await_entry()  # block 1 has seen one batch: still cold
            answers.append(submit(batcher, block=1, deadline=clock.now + 0.1))
            with pytest.raises(Overloaded):  # both blocks go before its answer
                submit(batcher, deadline=clock.now + 3.3)
            engine.open()
            await settled(*answers)

    asyncio.run(go())


def test_an_idle_engine_takes_what_the_model_thinks_hopeless() -> None:
    """Or a model that is wrong would refuse all, and never see the batch that corrects it."""

    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, clock=clock) as batcher:
            await teach(batcher, engine)
            await computed(submit(batcher, deadline=clock.now + 0.001))

    asyncio.run(go())


def test_batches_keep_to_the_target() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 0.1, 0.01)
        async with batching(
            engine, max_batch_rows=16, clock=clock, target_batch_s=0.145
        ) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            first = submit(batcher)
            await engine.await_entry()
            answers = [submit(batcher, rows=2) for _ in range(5)] + [submit(batcher, rows=9)]
            engine.open()
            timings = [answer.timing for answer in await computed(first, *answers)]
            assert [rows for _, rows in engine.calls[9:]] == [[2, 2], [2, 2], [2], [9]]
            assert [timing.close_reason for timing in timings] == ["engine_free"] + 6 * ["deadline"]
            assert batcher.statistics.close_reasons["deadline"] == 4

    asyncio.run(go())


def test_dead_requests_make_room_in_a_full_queue() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        async with batching(engine, max_queue_rows=4, clock=clock) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            alive = submit(batcher)
            late = submit(batcher, deadline=clock.now + 1)
            cancelled, unanswered = submit_job(batcher, rows=2)
            clock.now += 1.5
            cancelled.cancelled = True
            new = submit(batcher, rows=2)
            # It is answered while the engine is still busy with the first.
            assert isinstance((await settled(late))[0], DeadlineExceeded)
            assert batcher.queue_rows == 3
            engine.open()
            await computed(running, alive, new)
            assert not unanswered.done()

    asyncio.run(go())


# --- faults -------------------------------------------------------------------------------------


def test_only_the_request_that_the_engine_fails_on_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True, fails_on=fails_on_value(13.0))
        async with batching(engine) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            answers = [submit(batcher, value) for value in (2.0, 13.0, 3.0)]
            engine.open()
            _, two, thirteen, three = await settled(running, *answers)
            assert isinstance(two, Computed)
            assert isinstance(three, Computed)
            assert two.output == 4.0
            assert three.output == 6.0
            assert isinstance(thirteen, Unavailable)
            assert str(thirteen) == "the engine failed on this request"
            assert (await computed(submit(batcher, 7.0)))[0].output == 14.0

    asyncio.run(go())
    assert [record.message for record in caplog.records] == [
        "engine failed on a request: RuntimeError"
    ]
    assert "secret" not in caplog.text


def test_an_engine_that_always_fails_answers_everybody() -> None:
    async def go() -> None:
        engine = FakeEngine(fails_on=lambda requests: True)
        async with batching(engine) as batcher:
            outcomes = await settled(*(submit(batcher) for _ in range(20)))
            assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
            assert batcher.statistics.batches == 0
            engine.fails_on = lambda requests: False
            assert (await computed(submit(batcher, 7.0)))[0].output == 14.0

    asyncio.run(go())


def test_an_engine_that_loses_an_output_does_not_stop_the_batcher() -> None:
    class Forgetful(FakeEngine):
        def start(self, block: int, requests: Sequence[Rows]) -> Pending:
            return Settled(super().start(block, requests).wait()[1:])

    async def go() -> None:
        async with batching(Forgetful()) as batcher:
            for _ in range(2):
                (outcome,) = await settled(submit(batcher))
                assert isinstance(outcome, Unavailable)

    asyncio.run(go())


def test_a_callback_that_raises_does_not_hurt_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(outcome: Computed | DataMixError) -> None:
        raise ValueError("secret 0.1234")

    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            batcher.offer(make_job(done=broken))
            after = submit(batcher, 4.0)
            engine.open()
            assert (await computed(running, after))[1].output == 8.0
            assert engine.calls == [(0, [1]), (0, [1, 1])]

    asyncio.run(go())
    assert [record.message for record in caplog.records] == [
        "a request's callback failed: ValueError"
    ]
    assert "secret" not in caplog.text


# --- the probe ----------------------------------------------------------------------------------


def test_the_probe_passes_when_idle() -> None:
    async def go() -> None:
        engine = FakeEngine()
        async with batching(engine) as batcher:
            await batcher.probe(PATIENCE_S)
            assert engine.calls == [(0, [1])]
            assert batcher.statistics.batches == 0

    asyncio.run(go())


def test_the_probe_goes_before_waiting_requests() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_batch_rows=1) as batcher:
            answers = [submit(batcher, rows=1, block=1) for _ in range(3)]
            await engine.await_entry()
            probe = asyncio.create_task(batcher.probe(PATIENCE_S))
            await turn()
            engine.open()
            await probe
            await computed(*answers)
            assert [block for block, _ in engine.calls] == [1, 0, 1, 1]

    asyncio.run(go())


def test_the_probe_fails_when_the_engine_hangs() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            answer = submit(batcher)
            await engine.await_entry()
            for _ in range(3):
                with pytest.raises(Unavailable, match="no sign of life in 0.001 s"):
                    await batcher.probe(0.001)
            engine.open()
            await batcher.probe(PATIENCE_S)
            await computed(answer)
            # Nobody waits any more for the probes that failed, so they are not run.
            assert len(engine.calls) == 2

    asyncio.run(go())


def test_the_probe_fails_when_the_engine_raises() -> None:
    async def go() -> None:
        engine = FakeEngine(fails_on=lambda requests: True)
        async with batching(engine) as batcher:
            with pytest.raises(Unavailable) as raised:
                await batcher.probe(PATIENCE_S)
            assert str(raised.value) == "the engine failed its health probe: RuntimeError"

    asyncio.run(go())


def test_the_probe_fails_when_the_thread_is_gone() -> None:
    async def go() -> None:
        async with batching(FakeEngine()) as batcher:
            await batcher.drain(PATIENCE_S)
            with pytest.raises(Unavailable):
                await batcher.probe(0.001)

    asyncio.run(go())


# --- draining -----------------------------------------------------------------------------------


def test_draining_answers_what_waits_and_refuses_what_comes() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_batch_rows=2) as batcher:
            answers = [submit(batcher, float(n)) for n in range(5)]
            await engine.await_entry()
            drain = asyncio.create_task(batcher.drain(PATIENCE_S))
            await turn()
            with pytest.raises(Unavailable, match="draining"):
                submit(batcher)
            engine.open()
            await drain
            results = await computed(*answers)
            assert [float(result.output[0, 0]) for result in results] == [0, 2, 4, 6, 8]
            assert results[-1].timing.close_reason == "drain"
            with pytest.raises(Unavailable, match="draining"):
                submit(batcher)

    asyncio.run(go())


def test_draining_an_idle_batcher_stops_its_thread() -> None:
    async def go() -> None:
        async with batching(FakeEngine()) as batcher:
            await batcher.drain(PATIENCE_S)
            assert "engine" not in [thread.name for thread in threading.enumerate()]
            await batcher.drain(PATIENCE_S)  # twice does no harm

    asyncio.run(go())


def test_draining_gives_up_on_an_engine_that_hangs() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            answer = submit(batcher)
            await engine.await_entry()
            with pytest.raises(Unavailable, match="the queue did not drain in 0.01 s"):
                await batcher.drain(0.01)
            engine.open()
            await computed(answer)

    asyncio.run(go())


def test_an_event_loop_that_closed_does_not_break_the_thread() -> None:
    engine = FakeEngine(closed=True)

    async def begin() -> Batcher:
        batcher = Batcher(engine, asyncio.get_running_loop(), max_batch_rows=1, max_queue_rows=100)
        for _ in range(2):
            batcher.offer(make_job())
        await engine.await_entry()
        return batcher

    batcher = asyncio.run(begin())
    engine.open()
    asyncio.run(batcher.drain(PATIENCE_S))
    assert len(engine.calls) == 2


# --- many at once -------------------------------------------------------------------------------


def test_thousands_of_requests_each_get_their_own_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def go() -> None:
        engine = FakeEngine()
        async with batching(engine, max_batch_rows=64, max_queue_rows=10_000) as batcher:
            answers = []
            for n in range(3000):
                answers.append(submit(batcher, float(n), 1 + n % 4, block=n % 3))
                if n % 100 == 0:
                    await turn()
            for n, answer in enumerate(await computed(*answers)):
                assert answer.output.shape == (1 + n % 4, 1)
                assert (answer.output == 2 * n).all()
            assert batcher.statistics.rows == sum(1 + n % 4 for n in range(3000))
            assert max(sum(rows) for _, rows in engine.calls) <= 64

    asyncio.run(go())
    assert caplog.records == []
