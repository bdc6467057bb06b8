"""Which batch starts when, what is under way, and how long all that will take.

The batcher without its thread: decisions as steps, the clock passed in. With depth 1 a batch is
closed when the engine is free. With depth 2 a second one is staged while the first is computed, but
it is closed just in time: when the first has no more time left than the staging takes, or when it
is full. Earlier would gain nothing, and what arrives meanwhile would wait for a whole batch more.

    close      lead: staged, copied        cost: computed         landed
      |---------------------------------|----------------------|
                   (hidden behind the batch before it)
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from math import ceil, inf
from typing import NamedTuple

from datamix.errors import Overloaded
from deployments.cost import CostModel, Lateness
from deployments.engine import Pending
from deployments.waiting import Job, Queue

# How much earlier than the model says a batch is closed: predictions scatter, and a thread that
# sleeps until a moment wakes a little later.
_MARGIN, _MARGIN_S = 0.05, 0.0003
# How often it is looked whether the running batch is done already, in parts of its predicted time.
_LOOKS, _LOOK_S = 16, 0.0005


@dataclass(slots=True)
class Statistics:
    """Running totals of one batcher; plain numbers, so that counting costs nothing.

    Attributes:
        busy_s: time the engine had at least one batch, in seconds.
        batches: batches computed.
        rows: rows computed.
        close_reasons: batches by why they closed.
        queue_s: summed wait of all requests that were computed, in seconds.
        copied_bytes: bytes of rows that the engine copied on their way to where they are computed.
        copy_s: summed time of the batches' copies to the engine's device, in seconds.
        first_rows: rows computed of block 0: one for each input, however many rounds follow.
        shed_rows: rows refused on arrival, by why: ``queue`` or ``deadline``.
        expired_rows: rows that waited until their deadline had come.
    """

    busy_s: float = 0.0
    batches: int = 0
    rows: int = 0
    close_reasons: Counter[str] = field(default_factory=Counter)
    queue_s: float = 0.0
    copied_bytes: int = 0
    copy_s: float = 0.0
    first_rows: int = 0
    shed_rows: Counter[str] = field(default_factory=Counter)
    expired_rows: int = 0


@dataclass(slots=True, eq=False)
class Flight:
    """One batch from its close to its answers.

    Attributes:
        jobs: its requests, all of one block.
        close_reason: why it closed.
        probe: whether it only proves that the engine lives.
        rows: of all its requests.
        pending: the engine's side, once it has begun.
        started: when it was handed to the engine, on the batcher's clock.
        staged_s: how long the engine took to stage and launch it, in seconds.
        lead_s: how long staging and copy should take, in seconds.
        cost_s: how long it should take after that, in seconds.
        known: whether these two are worth anything.
    """

    jobs: list[Job]
    close_reason: str = "engine_free"
    probe: bool = False
    rows: int = 0
    pending: Pending | None = None
    started: float = 0.0
    staged_s: float = 0.0
    lead_s: float = 0.0
    cost_s: float = 0.0
    known: bool = False

    @property
    def block(self) -> int:
        """Which block it runs."""
        return self.jobs[0].block

    def ends(self, free: float) -> float:
        """When it should be done, where the engine has no older one from ``free`` on."""
        return max(free, self.started + self.lead_s) + self.cost_s


class Step(NamedTuple):
    """What the engine's thread is to do next.

    Attributes:
        start: a batch to hand to the engine.
        expired: requests to answer: they are too late.
        finish: whether to wait for the oldest batch under way.
        nap_s: how long to sleep, in seconds; infinity: until woken.
        wake_rows: with a nap, how many waiting rows end it.
        stop: whether nothing is left to be done ever.
    """

    start: Flight | None = None
    expired: list[Job] | None = None
    finish: bool = False
    nap_s: float = 0.0
    wake_rows: float = inf
    stop: bool = False


_FINISH = Step(finish=True)
_SLEEP = Step(nap_s=inf, wake_rows=0)
_STOP = Step(stop=True)


class Dispatch:
    """Decides over a queue and the batches under way; learns what both cost. Not thread-safe.

    Attributes:
        flights: batches under way, the oldest first. Replaced as a whole, so that another thread
            may read it.
        probes: proofs of life that are asked for.
        retries: halves of batches that failed, to be run again by themselves.
        statistics: running totals.
        costs: per block, what a batch takes after its lead, or with it where depth is 1.
        leads: per block, what staging and copying a batch takes.
        lateness: how much later than predicted answers are out.
    """

    def __init__(
        self, queue: Queue, *, blocks: int, depth: int, target_batch_s: float | None = None
    ) -> None:
        """Take batches of ``queue``, up to ``depth`` under way at once."""
        self.flights: tuple[Flight, ...] = ()
        self.probes: deque[Job] = deque()
        self.retries: deque[list[Job]] = deque()
        self.statistics = Statistics()
        self.costs = [CostModel() for _ in range(blocks)]
        self.leads = [CostModel() for _ in range(blocks)]
        self.lateness = Lateness()
        self._queue = queue
        self._depth = depth
        self._target_batch_s = target_batch_s
        self._since: float | None = None  # of the time that is not booked as busy yet
        self._landed = -inf  # when the last batch landed
        self._slowest_batch_s = self._slowest_row_s = 0.0  # of full batches, over all blocks

    # --- what to do ---

    def next(self, now: float, *, landed: bool = False, draining: bool = False) -> Step:
        """The next step at ``now``; ``landed``: the oldest batch under way is known to be done."""
        flights = self.flights
        if flights and (landed or len(flights) == self._depth):
            return _FINISH
        if (self.probes or self.retries) and (urgent := self._urgent()):
            return Step(urgent)
        if flights:
            return self._overlap(now, draining)
        if self._queue.rows:
            return self._close(now, draining)
        return _STOP if draining else _SLEEP

    def _urgent(self) -> Flight | None:
        """The next probe, or half of a batch that failed, that somebody still waits for."""
        while self.probes:
            job = self.probes.popleft()
            if not job.cancelled:
                return Flight([job], probe=True, rows=job.count)
        while self.retries:
            jobs = [job for job in self.retries.popleft() if not job.cancelled]
            if jobs:
                return Flight(jobs, rows=sum(job.count for job in jobs))
        return None

    def _close(self, now: float, draining: bool) -> Step:
        """Take the next batch, whatever its size."""
        taken = self._queue.take(now, self.remaining_s(now) + self.lateness.allowance_s)
        if not taken.batch:
            return Step(expired=taken.expired)
        rows = sum(job.count for job in taken.batch)
        reason = "drain" if draining else taken.close_reason
        return Step(Flight(taken.batch, reason, rows=rows), taken.expired)

    def _overlap(self, now: float, draining: bool) -> Step:
        """There is room for another batch beside those under way: take it, or wait for more."""
        if not all(self.costs[flight.block].warm for flight in self.flights):
            return _FINISH  # nobody knows yet how much time is left
        queue = self._queue
        block, rows = queue.peek(now)
        limit = queue.limit(block)
        if rows >= limit or (draining and rows):
            return self._close(now, draining)
        cost_s = self.flights[0].cost_s
        early_s = self.leads[block].predict(rows) + _MARGIN * cost_s + _MARGIN_S
        spare_s = self.remaining_s(now) - early_s
        if spare_s <= 0.0 or draining:
            # Where nothing waits, the answers of the running batch come first.
            return self._close(now, draining) if rows else _FINISH
        look_s = max(_LOOK_S, cost_s / _LOOKS)
        return Step(nap_s=min(spare_s, look_s), wake_rows=queue.rows + limit - rows)

    # --- what happened ---

    def launch(self, flight: Flight, now: float) -> None:
        """A batch is handed to the engine."""
        flight.started = now
        cost = self.costs[flight.block]
        flight.known = cost.warm
        flight.cost_s = cost.predict(flight.rows)
        if self._depth > 1:
            flight.lead_s = self.leads[flight.block].predict(flight.rows)
        if not self.flights:
            self._since = now
        self.flights += (flight,)

    def land(self, flight: Flight, now: float) -> float:
        """A batch is done, or has failed; since when the engine had no older one to do."""
        begun = max(flight.started, self._landed)
        if flight is self.flights[0]:  # a younger one has failed before its turn
            self._landed = now
        self.flights = tuple(other for other in self.flights if other is not flight)
        if self._since is not None:
            self.statistics.busy_s += now - self._since
        self._since = now if self.flights else None
        return begun

    def learn(self, flight: Flight, now: float, begun: float, copy_s: float) -> None:
        """A batch landed well at ``now``: book it, and learn from it what batches cost.

        Args:
            flight: the batch.
            now: when it landed.
            begun: since when the engine had no older one to do.
            copy_s: how long its rows travelled to the device.
        """
        statistics = self.statistics
        statistics.batches += 1
        statistics.rows += flight.rows
        statistics.close_reasons[flight.close_reason] += 1
        statistics.copy_s += copy_s
        block, cost = flight.block, self.costs[flight.block]
        if block == 0:
            statistics.first_rows += flight.rows
        if self._depth > 1:
            # What it took once its rows were there and the batch before it was out of the way.
            lead_s = flight.staged_s + copy_s
            self.leads[block].observe(flight.rows, lead_s)
            begun = max(begun, flight.started + lead_s)
        cost.observe(flight.rows, max(0.0, now - begun))
        if cost.warm:
            self._plan(block, cost)

    def _plan(self, block: int, cost: CostModel) -> None:
        """Tell the queue what the model has learned."""
        queue = self._queue
        if self._target_batch_s is not None:
            queue.limits[block] = cost.rows_within(self._target_batch_s, queue.max_batch_rows)
        limit = queue.limit(block)
        queue.full_s[block] = cost.predict(limit)
        self._slowest_batch_s = max(queue.full_s.values()) + self.leads[block].predict(limit)
        self._slowest_row_s = max(s / queue.limit(block) for block, s in queue.full_s.items())

    # --- how long it will take ---

    def busy_s(self, now: float) -> float:
        """Engine time so far in seconds, that of running batches included."""
        since = self._since
        return self.statistics.busy_s + (0.0 if since is None else now - since)

    def remaining_s(self, now: float) -> float:
        """Seconds until all that is under way should be done."""
        flights = self.flights
        if not flights:
            return 0.0
        end = self._landed
        for flight in flights:
            end = max(now, flight.ends(end))
        return end - now

    def wait_s(self, now: float) -> float:
        """Seconds until all that is under way or waits should be done."""
        return max(0.001, self._predict_s(self._queue.ahead(now), now))

    def _predict_s(self, waiting: dict[int, float], now: float) -> float:
        """Seconds for what is under way and for the waiting rows of each block."""
        seconds = self.remaining_s(now)
        for block, rows in waiting.items():
            batches = max(1.0, rows / self._queue.limit(block))
            seconds += batches * self.costs[block].predict(rows / batches)
        return seconds

    def longest_s(self, rows: int) -> float:
        """What no prediction for ``rows`` more exceeds: spares most the price of an exact one."""
        # The batches under way, the request's own, and one of each block that is not full.
        batches = 1 + self._depth + len(self.costs)
        compute_s = batches * self._slowest_batch_s
        compute_s += (self._queue.rows + rows) * self._slowest_row_s
        return compute_s + self.lateness.allowance_s

    def check_deadline(self, job: Job, deadline: float) -> None:
        """Refuse a request whose answer would come too late, as far as the model can tell.

        Where no other request of the block waits or runs it is accepted whatever the model says: a
        model that is wrong learns only from batches.

        Raises:
            Overloaded: says when a request like it would be in time.
        """
        block, now = job.block, job.arrived
        cost = self.costs[block]
        if not cost.warm:
            return
        ahead = self._queue.ahead(now, job)
        before = ahead.pop(block, 0.0)
        if not before and all(flight.block != block for flight in self.flights):
            return
        rows, limit = before + job.count, self._queue.limit(block)
        # Where a batch goes before its own, its own will be full too by the time it starts.
        own_s = ceil(rows / limit) * cost.predict(limit) if rows > limit else cost.predict(rows)
        # The first lead is hidden by nothing where nothing is under way.
        lead_s = 0.0 if self.flights else self.leads[block].predict(min(rows, limit))
        predicted_s = self._predict_s(ahead, now) + own_s + lead_s + self.lateness.allowance_s
        left_s = deadline - now
        if predicted_s > left_s:
            self.statistics.shed_rows["deadline"] += job.count
            raise Overloaded(
                f"the answer is predicted in {predicted_s:.3g} s, after the deadline in "
                f"{left_s:.3g} s, try again later",
                retry_after_s=max(0.001, predicted_s - left_s),
            )
