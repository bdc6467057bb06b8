"""What waits for the engine, and who goes first.

A request is due at its deadline or ``max_age_s`` after its arrival, whichever is earlier, and those
due first go first: earliest deadline first, and in order of arrival without deadlines. Normal goes
before low priority, until a low one is due; then it takes its turn among the normal ones. So
nothing starves: what arrives after a request was due can no longer overtake it.

Nothing here knows threads, event loops or engines, and the clock is passed in.
"""

from __future__ import annotations

import sys
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple

import numpy.typing as npt

from datamix.errors import DataMixError
from deployments.engine import Rows

Array = npt.NDArray[Any]

_DUE = attrgetter("due")


@dataclass(frozen=True, slots=True)
class Timing:
    """How one request's batch went; the response carries it.

    Attributes:
        queue_s: from this request's arrival to the start of its batch, in seconds.
        compute_s: the engine's time for the whole batch, in seconds.
        batch_rows: rows of the whole batch.
        close_reason: ``engine_free``, ``full``, ``deadline`` (more rows would have missed the
            target for a batch's time) or ``drain``.
        error_s: how much later than predicted the batch was done, in seconds; None where nothing
            was predicted, and in answers.
    """

    queue_s: float
    compute_s: float
    batch_rows: int
    close_reason: str
    error_s: float | None = None


class Computed(NamedTuple):
    """A request's output rows, (rows, *output_shape) float16 or float32, and its timing."""

    output: Array
    timing: Timing


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the batcher.

    Attributes:
        block: which block to run.
        rows: the request's rows.
        done: called once, on the event loop, with what was computed or why it was not.
        deadline: when the answer is worth nothing any more, on the batcher's clock; None: never.
        priority: 0 normal, 1 low.
        arrived: when it was offered, on the batcher's clock.
        due: its place in the queue, on the batcher's clock; the queue sets it.
        promised: whether it is normal and due at its deadline; the queue sets it.
        size_bytes: what its rows hold in memory; the queue sets it.
        cancelled: set by the owner when nobody waits any more; the job is then dropped unanswered.
    """

    block: int
    rows: Rows
    done: Callable[[Computed | DataMixError], None]
    deadline: float | None = None
    priority: int = 0
    arrived: float = 0.0
    due: float = 0.0
    promised: bool = False
    size_bytes: int = 0
    cancelled: bool = False

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(self.rows.features)

    def is_live(self, now: float) -> bool:
        """Whether somebody still waits for it, and its deadline has not passed."""
        return not self.cancelled and (self.deadline is None or self.deadline > now)


@dataclass(slots=True)
class Taken:
    """What left the queue at once: a batch of one block, and those too late to compute."""

    batch: list[Job] = field(default_factory=list)
    expired: list[Job] = field(default_factory=list)
    close_reason: str = "engine_free"


class Queue:
    """The waiting requests, the most urgent first, bounded in rows and bytes. Not thread-safe.

    Per priority and block there is a lane: a list in the order of ``due``. Most requests come in
    that order and are appended; inserting one among thousands moves some kilobytes of pointers,
    which is less than what a heap would cost every request.

    Attributes:
        rows: rows waiting.
        bytes: what these hold in memory, in bytes; a message's framing is not counted.
        limits: blocks whose batches shall have fewer rows than ``max_batch_rows``, and how many.
        full_s: how long a full batch of a block should take, in seconds, where that is known.
    """

    def __init__(
        self,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        max_queue_bytes: int = sys.maxsize,
        max_age_s: float = 2.0,
    ) -> None:
        """Take batches of at most ``max_batch_rows``.

        At most ``max_queue_rows`` and ``max_queue_bytes`` wait. What has waited for ``max_age_s``
        goes before all that arrives from then on.
        """
        self.max_batch_rows = max_batch_rows
        self.max_queue_rows = max_queue_rows
        self.max_queue_bytes = max_queue_bytes
        self.max_age_s = max_age_s
        self.rows = 0
        self.bytes = 0
        self.limits: dict[int, int] = {}
        self.full_s: dict[int, float] = {}
        self._normal: defaultdict[int, list[Job]] = defaultdict(list)  # by block
        self._low: defaultdict[int, list[Job]] = defaultdict(list)
        self._promised: Counter[int] = Counter()  # rows of promised requests, by block
        self._swept = False

    def __len__(self) -> int:
        """Number of waiting requests."""
        return sum(map(len, self._lanes()))

    def __iter__(self) -> Iterator[Job]:
        """The waiting requests, lane by lane."""
        return chain.from_iterable(self._lanes())

    def offer(self, job: Job) -> bool:
        """Queue a job that arrived now; False where there is no room for its rows."""
        count = job.count
        features, scale = job.rows
        size = features.nbytes if scale is None else features.nbytes + scale.nbytes
        if self.rows + count > self.max_queue_rows or self.bytes + size > self.max_queue_bytes:
            return False
        due = job.due = self._due(job)
        lane = (self._low if job.priority else self._normal)[job.block]
        if lane and lane[-1].due > due:
            insort(lane, job, key=_DUE)
        else:
            lane.append(job)
        if due == job.deadline and not job.priority:
            job.promised = True
            self._promised[job.block] += count
        job.size_bytes = size
        self.rows += count
        self.bytes += size
        return True

    def refusal(self, job: Job) -> str:
        """Why there is no room for ``job``: which bound it meets."""
        if self.rows + job.count > self.max_queue_rows:
            return f"the queue holds {self.rows} rows of at most {self.max_queue_rows}"
        return f"the queue holds {self.bytes} bytes of at most {self.max_queue_bytes}"

    def peek(self, now: float) -> tuple[int, int]:
        """The block of the next batch, and its live rows counted up to its limit.

        As many as the limit or more: the batch would be full. Block 0 and no rows where nothing
        lives. Changes nothing.
        """
        first: Job | None = None
        for lane in self._lanes():
            for job in lane:
                if job.is_live(now):
                    if first is None or _urgency(job, now) < _urgency(first, now):
                        first = job
                    break
        if first is None:
            return 0, 0
        block, rows = first.block, 0
        limit = self.limit(block)
        for job in chain(self._normal.get(block, ()), self._low.get(block, ())):
            if job.is_live(now):
                rows += job.count
                if rows >= limit:
                    break
        return block, rows

    def take(self, now: float, busy_s: float = 0.0) -> Taken:
        """Take the next batch: the most urgent live request and all that fit of the same block.

        Requests of other blocks keep their places. A request that does not fit ends the batch, so
        that a large one is not overtaken for ever by smaller ones. One larger than its block's
        limit makes a batch of its own.

        Where more waits than one batch holds, what would be late by the end of a full batch counts
        as expired. Otherwise an overloaded engine would spend its time on the requests that are
        just about lost, and so lose the next ones as well. ``busy_s`` is how long the engine has
        still to do with what it was given before, and whatever else delays the answers, in seconds.
        """
        taken = Taken()
        self._swept = False
        crowd = self.rows
        block = self._turn(now, taken.expired)
        if block is None:
            return taken
        limit = self.limit(block)
        if crowd > limit:
            now += busy_s + self.full_s.get(block, 0.0)
        normal, low = self._normal.get(block, []), self._low.get(block, [])
        n = k = 0  # how far each lane is gone through
        rows = gone = gone_bytes = promised = 0
        while rows < limit:
            if n < len(normal) and not (
                k < len(low) and _urgency(low[k], now) < _urgency(normal[n], now)
            ):
                job = normal[n]
                n += 1
            elif k < len(low):
                job = low[k]
                k += 1
            else:
                break
            count = job.count
            gone += count
            gone_bytes += job.size_bytes
            if job.promised:
                promised += count
            if job.cancelled:
                continue
            if job.deadline is not None and job.deadline <= now:
                taken.expired.append(job)
                continue
            rows += count
            if rows > limit and taken.batch:
                # It stays, and the batch is as full as it can be.
                gone -= count
                gone_bytes -= job.size_bytes
                promised -= count if job.promised else 0
                n, k = (n, k - 1) if job.priority else (n - 1, k)
                break
            taken.batch.append(job)
        if rows >= limit:
            taken.close_reason = "full" if limit >= self.max_batch_rows else "deadline"
        del normal[:n], low[:k]
        self.rows -= gone
        self.bytes -= gone_bytes
        self._promised[block] -= promised
        return taken

    def limit(self, block: int) -> int:
        """Rows that a batch of this block has at most, unless it is a single larger request."""
        return self.limits.get(block, self.max_batch_rows)

    def sweep(self, now: float) -> list[Job]:
        """Make room: drop what is cancelled or late wherever it waits, and return the late ones.

        Once between two takes, so that a full queue is not searched for each request it refuses.
        """
        expired: list[Job] = []
        if self._swept:
            return expired
        self._swept = True
        for lane in self._lanes():
            live = []
            for job in lane:
                if job.is_live(now):
                    live.append(job)
                else:
                    self._drop(job, expired)
            lane[:] = live
        return expired

    def ahead(self, now: float, job: Job | None = None) -> dict[int, float]:
        """Rows that wait, by block; with ``job``, only those that it has to respect.

        These are the rows that go before it and, as those were accepted on the word that they will
        be in time, all normal ones due at their deadline: an urgent request may overtake them only
        where all can be in time. An estimate: requests are given the mean number of rows.
        """
        normal = low = inf  # what is due until then goes first
        if job is not None:
            due = self._due(job)
            normal, low = (inf, due) if job.priority else (due, min(due, now))
        counts: Counter[int] = Counter()
        for until, lanes in ((normal, self._normal), (low, self._low)):
            for block, lane in lanes.items():
                counts[block] += bisect_right(lane, until, key=_DUE)
        mean = self.rows / max(1, len(self))
        return {
            block: max(count * mean, self._promised[block])
            for block, count in counts.items()
            if count or self._promised[block]
        }

    def _due(self, job: Job) -> float:
        aged = job.arrived + self.max_age_s
        return aged if job.deadline is None or job.deadline > aged else job.deadline

    def _lanes(self) -> Iterator[list[Job]]:
        return chain(self._normal.values(), self._low.values())

    def _turn(self, now: float, expired: list[Job]) -> int | None:
        """The block of the most urgent live request; drops what is dead before it in each lane."""
        first: Job | None = None
        for lane in self._lanes():
            dead = 0
            for job in lane:
                if job.is_live(now):
                    if first is None or _urgency(job, now) < _urgency(first, now):
                        first = job
                    break
                self._drop(job, expired)
                dead += 1
            del lane[:dead]
        return None if first is None else first.block

    def _drop(self, job: Job, expired: list[Job]) -> None:
        """Count a dead job out; one that is late is still to be answered."""
        self.rows -= job.count
        self.bytes -= job.size_bytes
        if job.promised:
            self._promised[job.block] -= job.count
        if not job.cancelled:
            expired.append(job)


def _urgency(job: Job, now: float) -> tuple[bool, float]:
    """Smaller goes first: normal and overdue ones before low ones, each by when they are due."""
    return job.priority > 0 and job.due > now, job.due
