"""Busy-aware dynamic batching: a batch closes when the engine is free, or when it is full.

While the engine computes, requests gather; the moment it is free it takes what waits, up to
``max_batch_rows``. There is no timer: an idle engine starts at once, a busy one gets ever larger
batches. Requests are served in order of arrival, share a batch only with requests of the same
block, and never split.

    event loop:    offer() -> [queue] ..................... deliver callbacks
    engine thread:            take() -> Engine.run() ------^
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datamix.errors import DataMixError, DeadlineExceeded, Overloaded, Unavailable
from deployments.engine import Engine, Rows

Array = npt.NDArray[Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """How one request's batch went; the response carries it.

    Attributes:
        queue_s: from this request's arrival to the start of its batch, in seconds.
        compute_s: the engine's time for the whole batch, in seconds.
        batch_rows: rows of the whole batch.
        close_reason: ``engine_free``, ``full`` or ``drain``.
    """

    queue_s: float
    compute_s: float
    batch_rows: int
    close_reason: str


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
        arrived: when it was offered, on the batcher's clock.
        cancelled: set by the owner when nobody waits any more; the job is then dropped unanswered.
    """

    block: int
    rows: Rows
    done: Callable[[Computed | DataMixError], None]
    deadline: float | None = None
    arrived: float = 0.0
    cancelled: bool = False

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(self.rows.features)


@dataclass(slots=True)
class Taken:
    """What left the queue at once: a batch of one block, and those too late to compute."""

    batch: list[Job] = field(default_factory=list)
    expired: list[Job] = field(default_factory=list)
    close_reason: str = "engine_free"


class Queue:
    """The waiting requests: first come, first served, bounded in rows. Not thread-safe."""

    def __init__(self, *, max_batch_rows: int, max_queue_rows: int) -> None:
        """Take batches of at most ``max_batch_rows`` from at most ``max_queue_rows`` waiting."""
        self.max_batch_rows = max_batch_rows
        self.max_queue_rows = max_queue_rows
        self.rows = 0
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._jobs)

    def offer(self, job: Job) -> bool:
        """Queue a job; False where there is no room for its rows."""
        if self.rows + job.count > self.max_queue_rows:
            return False
        self._jobs.append(job)
        self.rows += job.count
        return True

    def take(self, now: float) -> Taken:
        """Take the next batch: the oldest live request and all that fit of the same block.

        Requests of other blocks keep their places. A request that does not fit ends the batch, so
        that a large one is not overtaken for ever by smaller ones.
        """
        taken = Taken()
        kept: list[Job] = []
        rows = 0
        while self._jobs:
            job = self._jobs.popleft()
            if job.cancelled:
                self.rows -= job.count
            elif job.deadline is not None and job.deadline <= now:
                self.rows -= job.count
                taken.expired.append(job)
            elif taken.batch and job.block != taken.batch[0].block:
                kept.append(job)
            elif taken.batch and rows + job.count > self.max_batch_rows:
                self._jobs.appendleft(job)
                taken.close_reason = "full"
                break
            else:
                taken.batch.append(job)
                self.rows -= job.count
                rows += job.count
                if rows >= self.max_batch_rows:
                    taken.close_reason = "full"
                    break
        self._jobs.extendleft(reversed(kept))
        return taken


@dataclass(slots=True)
class Statistics:
    """Running totals of one batcher; plain numbers, so that counting costs nothing.

    Attributes:
        busy_s: time the engine computed, in seconds.
        batches: batches computed.
        rows: rows computed.
        close_reasons: batches by why they closed.
        queue_s: summed wait of all requests that were computed, in seconds.
    """

    busy_s: float = 0.0
    batches: int = 0
    rows: int = 0
    close_reasons: Counter[str] = field(default_factory=Counter)
    queue_s: float = 0.0


class Batcher:
    """Joins the event loop, the queue and the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        on_batch: Callable[[Timing], None] = lambda timing: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the engine's thread.

        Args:
            engine: runs the batches, on the batcher's own thread.
            loop: the event loop on which every ``Job.done`` is called.
            max_batch_rows: rows per batch at most; a single request may not be larger.
            max_queue_rows: rows waiting at most; beyond it requests are shed.
            on_batch: called on the event loop after each batch with the timing of its oldest
                request, for metrics.
            clock: monotonic seconds.
        """
        self.statistics = Statistics()
        self._engine = engine
        self._loop = loop
        self._queue = Queue(max_batch_rows=max_batch_rows, max_queue_rows=max_queue_rows)
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
        self._batch_s = 0.0  # running mean duration of a batch, for the retry-after
        self._running_since: float | None = None
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
        since = self._running_since
        return self.statistics.busy_s + (0.0 if since is None else self._clock() - since)

    def offer(self, job: Job) -> None:
        """Queue a request; ``job.done`` is called exactly once unless it is cancelled.

        Raises:
            Overloaded: the queue is full; says when it should have room.
            Unavailable: the batcher is draining.
        """
        job.arrived = self._clock()
        with self._lock:
            if self._draining:
                raise Unavailable("this replica is draining, send the request again")
            if not self._queue.offer(job):
                raise Overloaded(
                    f"the queue holds {self._queue.rows} rows of at most "
                    f"{self._queue.max_queue_rows}, try again later",
                    retry_after_s=self.predicted_wait_s(),
                )
            # Not at once: requests that the same poll of the sockets brought share the first
            # batch, and the two threads do not fight for the GIL over each of them.
            self._wake(self._loop.call_soon)

    def predicted_wait_s(self) -> float:
        """How long a request that arrives now should wait, from the mean batch so far."""
        batches = 1 + self._queue.rows / self._queue.max_batch_rows
        return max(0.001, batches * self._batch_s)

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
            late = DeadlineExceeded("the deadline passed before the computation began")
            if taken.expired:
                self._post([(job, late) for job in taken.expired])
            if taken.batch:
                self._compute(taken.batch, taken.close_reason)
            if self._stopped:
                return
            del taken, probes  # an idle engine holds on to nobody's message

    def _compute(self, batch: list[Job], close_reason: str) -> None:
        start = self._running_since = self._clock()
        try:
            outputs = self._engine.run(batch[0].block, [job.rows for job in batch])
            if len(outputs) != len(batch):
                raise ValueError(f"{len(outputs)} outputs for {len(batch)} requests")
        except Exception as error:
            self._account(start)
            self._fail(batch, error)
            return
        compute_s = self._account(start)
        rows = sum(job.count for job in batch)
        self._batch_s += 0.1 * (compute_s - self._batch_s) if self._batch_s else compute_s
        statistics = self.statistics
        statistics.batches += 1
        statistics.rows += rows
        statistics.close_reasons[close_reason] += 1
        results: list[tuple[Job, Computed | DataMixError]] = []
        for job, output in zip(batch, outputs, strict=True):
            timing = Timing(start - job.arrived, compute_s, rows, close_reason)
            statistics.queue_s += timing.queue_s
            results.append((job, Computed(output, timing)))
        oldest = Timing(start - batch[0].arrived, compute_s, rows, close_reason)
        self._post(results, oldest)

    def _account(self, start: float) -> float:
        """Book the time since ``start`` as busy; return it in seconds."""
        elapsed = self._clock() - start
        self.statistics.busy_s += elapsed
        self._running_since = None
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
