"""Busy-aware dynamic batching: a batch closes when the engine is free, or when it is full.

While the engine computes, requests gather; the moment it is free it takes what waits, up to
``max_batch_rows``. There is no timer: an idle engine starts at once, a busy one gets ever larger
batches. The most urgent request goes first, with all that fit of the same block; requests never
split. :mod:`deployments.waiting` says which is the most urgent.

    event loop:    offer() -> [queue] ..................... deliver callbacks
    engine thread:            take() -> Engine.run() ------^
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from datamix.errors import DataMixError, DeadlineExceeded, Overloaded, Unavailable
from deployments.cost import CostModel
from deployments.engine import Engine, Rows
from deployments.waiting import Computed, Job, Queue, Timing

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Statistics:
    """Running totals of one batcher; plain numbers, so that counting costs nothing.

    Attributes:
        busy_s: time the engine computed, in seconds.
        batches: batches computed.
        rows: rows computed.
        close_reasons: batches by why they closed.
        queue_s: summed wait of all requests that were computed, in seconds.
        copied_bytes: bytes of rows that the engine copied on their way to where they are computed.
    """

    busy_s: float = 0.0
    batches: int = 0
    rows: int = 0
    close_reasons: Counter[str] = field(default_factory=Counter)
    queue_s: float = 0.0
    copied_bytes: int = 0


class Running(NamedTuple):
    """The batch that the engine computes now.

    Attributes:
        since: its start, on the batcher's clock.
        block: which block it runs.
        predicted_s: how long it should take, in seconds.
    """

    since: float
    block: int
    predicted_s: float


class Batcher:
    """Joins the event loop, the queue and the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        max_queue_bytes: int = sys.maxsize,
        target_batch_s: float | None = None,
        max_age_s: float = 2.0,
        on_batch: Callable[[Timing], None] = lambda timing: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the engine's thread.

        Args:
            engine: runs the batches, on the batcher's own thread.
            loop: the event loop on which every ``Job.done`` is called.
            max_batch_rows: rows per batch at most; a single request may not be larger.
            max_queue_rows: rows waiting at most; beyond it requests are shed.
            max_queue_bytes: bytes that these may hold, at most.
            target_batch_s: how long a batch should take at most, in seconds; it then gets fewer
                rows, but never less than one request. None: no such limit.
            max_age_s: what has waited so long goes before all that arrives from then on, in
                seconds; deadlines further away count as this one.
            on_batch: called on the event loop after each batch with the timing of its oldest
                request, for metrics.
            clock: monotonic seconds.
        """
        self.statistics = Statistics()
        self._engine = engine
        self._loop = loop
        self._queue = Queue(
            max_batch_rows=max_batch_rows,
            max_queue_rows=max_queue_rows,
            max_queue_bytes=max_queue_bytes,
            max_age_s=max_age_s,
        )
        self._target_batch_s = target_batch_s
        self._costs = [CostModel() for _ in engine.blocks]
        self._on_batch = on_batch
        self._clock = clock
        # The lock guards queue and flags; the signal wakes the thread, which says beforehand that
        # it sleeps. Both are C; a threading.Condition is Python and would cost more than the queue.
        self._lock = threading.Lock()
        self._signal: SimpleQueue[None] = SimpleQueue()
        self._asleep = False
        self._probes: list[asyncio.Future[None]] = []
        self._draining = False
        self._stopped = False
        self._running: Running | None = None
        self._slowest_batch_s = self._slowest_row_s = 0.0  # of full batches, over all blocks
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # --- the event loop's side ---

    @property
    def queue_rows(self) -> int:
        """Rows waiting now."""
        return self._queue.rows

    @property
    def busy_s(self) -> float:
        """Engine time so far in seconds, the running batch included."""
        running = self._running
        return self.statistics.busy_s + (self._clock() - running.since if running else 0.0)

    def offer(self, job: Job) -> None:
        """Queue a request; ``job.done`` is called exactly once unless it is cancelled.

        Raises:
            Overloaded: the queue is full, or the answer would come after the deadline; says when
                to try again.
            Unavailable: the batcher is draining.
        """
        job.arrived = self._clock()
        with self._lock:
            if self._draining:
                raise Unavailable("this replica is draining, send the request again")
            if job.deadline is not None and job.deadline - job.arrived < self._longest_s(job):
                self._check_deadline(job, job.deadline)
            if not self._queue.offer(job) and not (self._sweep() and self._queue.offer(job)):
                raise Overloaded(
                    f"{self._queue.refusal(job)}, try again later", retry_after_s=self._wait_s()
                )
            # Not at once: requests that the same poll of the sockets brought share the first
            # batch, and the two threads do not fight for the GIL over each of them.
            self._wake(self._loop.call_soon)

    def predicted_wait_s(self) -> float:
        """How long until all that runs and waits now is computed, in seconds."""
        with self._lock:
            return self._wait_s()

    def _wait_s(self) -> float:
        return max(0.001, self._predict_s(self._queue.ahead(self._clock())))

    def _predict_s(self, waiting: dict[int, float]) -> float:
        """Seconds for the rest of the running batch and for the waiting rows of each block."""
        running = self._running
        seconds = 0.0
        if running is not None:
            seconds = max(0.0, running.since + running.predicted_s - self._clock())
        for block, rows in waiting.items():
            batches = max(1.0, rows / self._queue.limit(block))
            seconds += batches * self._costs[block].predict(rows / batches)
        return seconds

    def _longest_s(self, job: Job) -> float:
        """What no prediction exceeds: spares most requests the microseconds of an exact one."""
        # The running batch, the request's own, and one of each block that is not full.
        batches = 2 + len(self._costs)
        rows = self._queue.rows + job.count
        return batches * self._slowest_batch_s + rows * self._slowest_row_s

    def _check_deadline(self, job: Job, deadline: float) -> None:
        """Refuse a request whose answer would come too late, as far as the model can tell.

        Where no other request of the block waits or runs it is accepted whatever the model says: a
        model that is wrong learns only from batches.

        Raises:
            Overloaded: says when a request like it would be in time.
        """
        block, running = job.block, self._running
        cost = self._costs[block]
        if not cost.warm:
            return
        ahead = self._queue.ahead(job.arrived, job)
        before = ahead.pop(block, 0.0)
        if not before and (running is None or running.block != block):
            return
        rows, limit = before + job.count, self._queue.limit(block)
        # Where a batch goes before its own, its own will be full too by the time it starts.
        own_s = ceil(rows / limit) * cost.predict(limit) if rows > limit else cost.predict(rows)
        predicted_s = self._predict_s(ahead) + own_s
        left_s = deadline - job.arrived
        if predicted_s > left_s:
            raise Overloaded(
                f"the answer is predicted in {predicted_s:.3g} s, after the deadline in "
                f"{left_s:.3g} s, try again later",
                retry_after_s=max(0.001, predicted_s - left_s),
            )

    def _sweep(self) -> bool:
        """Make room in the queue; whether that may have helped. Call with the lock held."""
        before = self._queue.rows
        now = self._clock()
        late: list[tuple[Job, Computed | DataMixError]] = [
            (job, _late(job, now)) for job in self._queue.sweep(now)
        ]
        if late:
            self._loop.call_soon(self._deliver, late)
        return self._queue.rows < before

    async def probe(self, timeout_s: float) -> None:
        """Prove that the thread is alive and the engine computes: one row through the engine.

        It goes before all waiting requests, so it waits for one batch at most.

        Raises:
            Unavailable: no sign of life within ``timeout_s``, or the engine raised.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            self._probes.append(future)
            self._wake()
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise Unavailable(f"the engine gave no sign of life in {timeout_s:g} s") from None

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, finish the waiting ones, stop the thread.

        Raises:
            Unavailable: requests were still waiting after ``timeout_s``.
        """
        with self._lock:
            self._draining = True
            self._wake()
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            raise Unavailable(f"the queue did not drain in {timeout_s:g} s")

    def _wake(self, call: Callable[..., object] | None = None) -> None:
        """Wake the engine's thread if it sleeps, by way of ``call``. Call with the lock held."""
        if self._asleep:
            self._asleep = False
            if call is None:
                self._signal.put(None)
            else:
                call(self._signal.put, None)

    def _deliver(self, results: list[tuple[Job, Computed | DataMixError]]) -> None:
        for job, outcome in results:
            if not job.cancelled:
                try:
                    job.done(outcome)
                except Exception as error:
                    # One caller's fault may not keep the others from their answers. Its text and
                    # traceback may hold values of the input, so the log gets its type.
                    logger.error("a request's callback failed: %s", type(error).__name__)

    # --- the engine thread's side ---

    def _work(self) -> None:
        while True:
            with self._lock:
                sleep = self._asleep = not (len(self._queue) or self._probes or self._draining)
            if sleep:
                self._signal.get()
            with self._lock:
                probes, self._probes = self._probes, []
                taken = self._queue.take(self._clock())
                if self._draining:
                    taken.close_reason = "drain"
                    self._stopped = not len(self._queue)
            for probe in probes:
                if not probe.done():  # else its caller gave up while the engine was busy
                    self._answer(probe)
            if taken.expired:
                now = self._clock()
                self._post([(job, _late(job, now)) for job in taken.expired])
            if taken.batch:
                self._compute(taken.batch, taken.close_reason)
            if self._stopped:
                return
            del taken, probes  # an idle engine holds on to nobody's message

    def _compute(self, batch: list[Job], close_reason: str) -> None:
        block = batch[0].block
        rows = sum(job.count for job in batch)
        cost = self._costs[block]
        start = self._clock()
        self._running = Running(start, block, cost.predict(rows))
        try:
            pending = self._engine.start(block, [job.rows for job in batch])
            self.statistics.copied_bytes += pending.copied_bytes
            outputs = pending.wait()
            if len(outputs) != len(batch):
                raise ValueError(f"{len(outputs)} outputs for {len(batch)} requests")
        except Exception as error:
            self._account(start)
            self._fail(batch, error)
            return
        compute_s = self._account(start)
        cost.observe(rows, compute_s)
        if cost.warm:
            self._plan(block, cost)
        statistics = self.statistics
        statistics.batches += 1
        statistics.rows += rows
        statistics.close_reasons[close_reason] += 1
        results: list[tuple[Job, Computed | DataMixError]] = []
        for job, output in zip(batch, outputs, strict=True):
            timing = Timing(start - job.arrived, compute_s, rows, close_reason)
            statistics.queue_s += timing.queue_s
            results.append((job, Computed(output, timing)))
        oldest = Timing(start - min(job.arrived for job in batch), compute_s, rows, close_reason)
        self._post(results, oldest)

    def _plan(self, block: int, cost: CostModel) -> None:
        """Tell the queue what the model has learned."""
        queue = self._queue
        if self._target_batch_s is not None:
            queue.limits[block] = cost.rows_within(self._target_batch_s, queue.max_batch_rows)
        queue.full_s[block] = cost.predict(queue.limit(block))
        self._slowest_batch_s = max(queue.full_s.values())
        self._slowest_row_s = max(s / queue.limit(block) for block, s in queue.full_s.items())

    def _account(self, start: float) -> float:
        """Book the time since ``start`` as busy; return it in seconds."""
        elapsed = self._clock() - start
        self.statistics.busy_s += elapsed
        self._running = None
        return elapsed

    def _fail(self, batch: list[Job], error: Exception) -> None:
        """An engine that raised: find the request to blame by running each one alone."""
        if len(batch) > 1:
            for job in batch:
                if not job.cancelled:
                    self._compute([job], "engine_free")
            return
        # The exception's text may hold values of the input or paths: it stays in the log's type.
        logger.error("engine failed on a request: %s", type(error).__name__)
        fault = Unavailable("the engine failed on this request")
        self._post([(batch[0], fault)])

    def _post(
        self, results: list[tuple[Job, Computed | DataMixError]], oldest: Timing | None = None
    ) -> None:
        """Hand results to the event loop, all of a batch in one wake-up."""

        def deliver() -> None:
            self._deliver(results)
            if oldest is not None:
                self._on_batch(oldest)

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: the process is on its way out
            logger.debug("event loop closed before %d results were delivered", len(results))

    def _answer(self, probe: asyncio.Future[None]) -> None:
        error: Exception | None = None
        try:
            shape = self._engine.blocks[0].input_shape
            self._engine.run(0, [Rows(np.zeros((1, *shape), np.float32), None)])
        except Exception as raised:
            error = Unavailable(f"the engine failed its health probe: {type(raised).__name__}")

        def settle() -> None:
            if not probe.done():
                probe.set_exception(error) if error else probe.set_result(None)

        try:
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:
            logger.debug("event loop closed before a probe was answered")


def _late(job: Job, now: float) -> DeadlineExceeded:
    if job.deadline is not None and job.deadline > now:
        return DeadlineExceeded("the computation would end after the deadline")
    return DeadlineExceeded("the deadline passed before the computation began")
