"""Busy-aware dynamic batching: a batch closes when the engine is free, or when it is full.

While the engine computes, requests gather; the moment it is free it takes what waits, up to
``max_batch_rows``. There is no timer: an idle engine starts at once, a busy one gets ever larger
batches. The most urgent request goes first, with all that fit of the same block; requests never
split. :mod:`deployments.waiting` says which is the most urgent, :mod:`deployments.dispatch` when a
batch starts; here are the two threads.

    event loop:    offer() -> [queue] ............................ deliver callbacks
    engine thread:            take -> Engine.start, Pending.wait ------^
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from math import inf
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from datamix.errors import DataMixError, DeadlineExceeded, Overloaded, Unavailable
from deployments.dispatch import Dispatch, Flight
from deployments.engine import Array, Engine, Rows
from deployments.waiting import Computed, Job, Queue, Timing

logger = logging.getLogger(__name__)

Results = list[tuple[Job, Computed | DataMixError]]


class EngineHangs(Unavailable):
    """The engine gave no sign of life; what it is stuck in can't be ended but with its process."""


class BatchCost(NamedTuple):
    """A batch takes ``a_s + b_s`` times its rows in seconds, and has ``rows`` at most."""

    a_s: float
    b_s: float
    rows: int


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
        self._engine = engine
        self._loop = loop
        self._queue = Queue(
            max_batch_rows=max_batch_rows,
            max_queue_rows=max_queue_rows,
            max_queue_bytes=max_queue_bytes,
            max_age_s=max_age_s,
        )
        self._dispatch = Dispatch(
            self._queue,
            blocks=len(engine.blocks),
            depth=engine.depth,
            target_batch_s=target_batch_s,
        )
        self.statistics = self._dispatch.statistics
        self._on_batch = on_batch
        self._clock = clock
        # The lock guards queue and dispatch; the signal wakes the thread, which says beforehand how
        # many waiting rows shall do so. Both are C; a threading.Condition is Python and would cost
        # more than the queue.
        self._lock = threading.Lock()
        self._signal: SimpleQueue[None] = SimpleQueue()
        self._wake_rows = inf  # infinity: the thread is awake
        self._draining = False
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
        return self._dispatch.busy_s(self._clock())

    def offer(self, job: Job) -> None:
        """Queue a request; ``job.done`` is called exactly once unless it is cancelled.

        Raises:
            Overloaded: the queue is full, or the answer would come after the deadline; says when
                to try again.
            Unavailable: the batcher is draining.
        """
        job.arrived = self._clock()
        queue, dispatch = self._queue, self._dispatch
        with self._lock:
            if self._draining:
                raise Unavailable("this replica is draining, send the request again")
            deadline = job.deadline
            if deadline is not None and deadline - job.arrived < dispatch.longest_s(job.count):
                dispatch.check_deadline(job, deadline)
            if not queue.offer(job) and not (self._sweep() and queue.offer(job)):
                self.statistics.shed_rows["queue"] += job.count
                raise Overloaded(
                    f"{queue.refusal(job)}, try again later",
                    retry_after_s=dispatch.wait_s(self._clock()),
                )
            if queue.rows >= self._wake_rows:
                # Not at once: requests that the same poll of the sockets brought share the first
                # batch, and the two threads do not fight for the GIL over each of them.
                self._wake(self._loop.call_soon)

    def predicted_wait_s(self) -> float:
        """How long until all that runs and waits now is computed, in seconds."""
        with self._lock:
            return self._dispatch.wait_s(self._clock())

    def cost(self, block: int) -> BatchCost | None:
        """What batches of a block cost, and how many rows they may have; None: not known yet."""
        model = self._dispatch.costs[block]
        if not model.warm:
            return None
        return BatchCost(model.a_s, model.b_s, self._queue.limit(block))

    def _sweep(self) -> bool:
        """Make room in the queue; whether that may have helped. Call with the lock held."""
        before = self._queue.rows
        now = self._clock()
        late: Results = [(job, _late(job, now)) for job in self._queue.sweep(now)]
        if late:
            self.statistics.expired_rows += sum(job.count for job, _ in late)
            self._loop.call_soon(self._deliver, late)
        return self._queue.rows < before

    async def probe(self, timeout_s: float, *, block: int = 0, rows: int = 1) -> float:
        """Prove that the thread is alive and the engine computes; return how long that took.

        Zeros go through one block, before all waiting requests, so they wait for what is under way
        at most. The seconds are the computation's.

        Raises:
            EngineHangs: no sign of life within ``timeout_s``.
            Unavailable: the engine raised.
        """
        answer: asyncio.Future[float] = self._loop.create_future()

        def done(outcome: Computed | DataMixError) -> None:
            if answer.done():
                return  # its time is over, and who waited is about to learn so
            if isinstance(outcome, DataMixError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome.timing.compute_s)

        shape = self._engine.blocks[block].input_shape
        job = Job(block, Rows(np.zeros((rows, *shape), np.float32), None), done)
        with self._lock:
            self._dispatch.probes.append(job)
            self._wake()
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise EngineHangs(f"the engine gave no sign of life in {timeout_s:g} s") from None
        finally:
            job.cancelled = True  # answered, or nobody waits any more

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
        if self._wake_rows < inf:
            self._wake_rows = inf
            if call is None:
                self._signal.put(None)
            else:
                call(self._signal.put, None)

    def _deliver(self, results: Results) -> None:
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
        while self._step():
            pass

    def _step(self) -> bool:
        """Do the next thing there is to do; False when nothing ever will be."""
        dispatch = self._dispatch
        landed = False
        for flight in dispatch.flights[:1]:
            landed = flight.pending is not None and flight.pending.done()
        with self._lock:
            step = dispatch.next(self._clock(), landed=landed, draining=self._draining)
            self._wake_rows = step.wake_rows
        if step.expired:
            now = self._clock()
            self.statistics.expired_rows += sum(job.count for job in step.expired)
            self._post([(job, _late(job, now)) for job in step.expired])
        if step.start is not None:
            self._start(step.start)
        elif step.finish:
            self._finish(dispatch.flights[0])
        elif step.nap_s:
            # An idle engine holds on to nobody's message: no batch is in reach here.
            with contextlib.suppress(Empty):
                self._signal.get(timeout=None if step.nap_s == inf else step.nap_s)
        return not step.stop

    def _start(self, flight: Flight) -> None:
        """Hand a batch to the engine; one that can do one thing only has then done it."""
        started = self._clock()
        self._dispatch.launch(flight, started)
        try:
            flight.pending = self._engine.start(flight.block, [job.rows for job in flight.jobs])
        except Exception as error:
            self._fail(flight, error)
            return
        self.statistics.copied_bytes += flight.pending.copied_bytes
        if self._engine.depth == 1:
            self._finish(flight)
        else:
            flight.staged_s = self._clock() - started

    def _finish(self, flight: Flight) -> None:
        """Wait for the oldest batch and answer its requests."""
        pending = flight.pending
        assert pending is not None  # what did not start is not under way
        try:
            outputs = pending.wait()
            if len(outputs) != len(flight.jobs):
                raise ValueError(f"{len(outputs)} outputs for {len(flight.jobs)} requests")
        except Exception as error:
            self._fail(flight, error)
            return
        dispatch = self._dispatch
        now = self._clock()
        begun = dispatch.land(flight, now)
        if not flight.probe:
            dispatch.learn(flight, now, begun, pending.copy_s)
        self._answer(flight, outputs, begun, now - begun)

    def _answer(
        self, flight: Flight, outputs: Sequence[Array], begun: float, compute_s: float
    ) -> None:
        rows, reason = flight.rows, flight.close_reason
        results: Results = []
        queued_s = 0.0
        for job, output in zip(flight.jobs, outputs, strict=True):
            timing = Timing(begun - job.arrived, compute_s, rows, reason)
            queued_s += timing.queue_s
            results.append((job, Computed(output, timing)))
        if flight.probe:
            self._post(results)
            return
        self.statistics.queue_s += queued_s
        first = min(job.arrived for job in flight.jobs)
        expected = flight.ends(begun) if flight.known else None
        error_s = None if expected is None else begun + compute_s - expected
        self._post(results, Timing(begun - first, compute_s, rows, reason, error_s), expected)

    def _fail(self, flight: Flight, error: Exception) -> None:
        """An engine that raised: find the requests to blame by running each half by itself.

        One culprit among n costs 2 log2(n) more runs; n of them, 2 n.
        """
        self._dispatch.land(flight, self._clock())
        if flight.probe:
            text = f"the engine failed its health probe: {type(error).__name__}"
        elif len(flight.jobs) > 1:
            half = len(flight.jobs) // 2
            self._dispatch.retries.extend((flight.jobs[:half], flight.jobs[half:]))
            return
        else:
            # The exception's text may hold values of the input or paths: the log gets its type.
            logger.error("engine failed on a request: %s", type(error).__name__)
            text = "the engine failed on this request"
        self._post([(flight.jobs[0], Unavailable(text))])

    def _post(
        self, results: Results, oldest: Timing | None = None, expected: float | None = None
    ) -> None:
        """Hand results to the event loop, all of a batch in one wake-up.

        Args:
            results: requests and their outcomes.
            oldest: where they are a batch, the timing of its oldest request.
            expected: when that batch was predicted to be done, if that was known.
        """

        def deliver() -> None:
            self._deliver(results)
            if expected is not None:
                self._dispatch.lateness.observe(self._clock() - expected)
            if oldest is not None:
                self._on_batch(oldest)

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: the process is on its way out
            logger.debug("event loop closed before %d results were delivered", len(results))


def _late(job: Job, now: float) -> DeadlineExceeded:
    if job.deadline is not None and job.deadline > now:
        return DeadlineExceeded("the computation would end after the deadline")
    return DeadlineExceeded("the deadline passed before the computation began")
