"""The queue as a pure object: any history beside a list that remembers, and each rule alone."""

from __future__ import annotations

from collections.abc import Iterable

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

from deployments.engine import Rows
from deployments.waiting import Job, Queue, Taken
from tests.jobs import counts, held, make_job

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
    def peek(self) -> None:
        """It sees the batch that would be taken where nothing is given up."""
        before = list(self.queue)
        block, rows = self.queue.peek(self.now)
        assert list(self.queue) == before
        live = [job for job in self.waiting if self.is_live(job)]
        if not live:
            assert rows == 0
            return
        limit = self.limit(block)
        first = min(map(self.urgency, live))
        assert first == min(self.urgency(job) for job in live if job.block == block)
        assert min(rows, limit) == min(sum(job.count for job in live if job.block == block), limit)

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
