"""The cloud's side of a trace: a span for each traced request, and one for the batch it was in.

    request      arrival to answer, a child of the device's round
    batch        what the engine computed at once, linked with all traced requests in it

Only requests that a device marked as sampled are traced, and no more than so many a second: whoever
may send requests may mark them all.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from datamix.errors import DataMixError
from datamix.tracing import Parent, open_provider
from deployments.allowance import Allowance
from deployments.waiting import Computed, Timing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from datamix.wire import Request
    from deployments.model import ServedModel

SERVICE = "datamix-cloud"
_CLOSING_S = 3.0

Done = Callable[[Computed | DataMixError], None]


class Followed:
    """A traced request; called with its outcome in place of whom it answers."""

    __slots__ = ("_tracing", "arrived_ns", "block", "done", "model", "span")

    def __init__(
        self, tracing: Tracing, model: ServedModel, block: int, done: Done, span: Span, at_ns: int
    ) -> None:
        """Pass on what becomes of a request that arrived at ``at_ns``, and end its span then."""
        self._tracing = tracing
        self.model = model
        self.block = block
        self.done = done
        self.span = span
        self.arrived_ns = at_ns

    def __call__(self, outcome: Computed | DataMixError) -> None:
        """Answer, then write down how it went."""
        try:
            self.done(outcome)
        finally:
            if isinstance(outcome, DataMixError):
                self.refuse(outcome)
            else:
                self._tracing.land(self, outcome.timing)

    def refuse(self, error: DataMixError) -> None:
        """End the span of a request that was not computed."""
        from opentelemetry.trace import StatusCode

        self.span.set_attribute("datamix.status", error.status)
        self.span.set_status(StatusCode.ERROR, type(error).__name__)
        self.span.end()


class Tracing:
    """Follows requests from their arrival to their answer; to be used on the event loop."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        per_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hand spans to ``provider``, of ``per_s`` requests per second at most."""
        self._provider = provider
        self._tracer = provider.get_tracer("datamix")
        self._allowance = Allowance(per_s, clock)
        self._landed: list[tuple[Followed, Timing]] = []

    @classmethod
    def to(cls, endpoint: str, per_s: float) -> Tracing:
        """Export to a collector.

        Raises:
            ConfigError: see :func:`datamix.tracing.open_provider`.
        """
        return cls(open_provider(SERVICE, endpoint), per_s=per_s)

    def follow(
        self, traceparent: str, model: ServedModel, request: Request, done: Done
    ) -> Followed | None:
        """Trace a request whose device traces it, if it is sampled and the allowance lasts."""
        parent = Parent.parse(traceparent)
        if not parent.sampled or not self._allowance.take():
            return None
        from opentelemetry import trace

        arrived_ns = time.time_ns()
        remote = trace.SpanContext(
            parent.trace_id, parent.span_id, is_remote=True, trace_flags=trace.TraceFlags(1)
        )
        span = self._tracer.start_span(
            "datamix.request",
            trace.set_span_in_context(trace.NonRecordingSpan(remote)),
            trace.SpanKind.SERVER,
            {
                "datamix.request_id": request.request_id,
                "datamix.model": model.name,
                "datamix.model_version": model.version,
                "datamix.block": request.block,
                "datamix.rows": request.rows,
            },
            start_time=arrived_ns,
        )
        return Followed(self, model, request.block, done, span, arrived_ns)

    def land(self, followed: Followed, timing: Timing) -> None:
        """Note that a request was computed and answered."""
        span = followed.span
        span.set_attribute("datamix.status", 200)
        span.set_attribute("datamix.queue_seconds", timing.queue_s)
        if not self._landed:
            # A batch is delivered in one go: by the loop's next turn all of it has landed.
            asyncio.get_running_loop().call_soon(self._tell_batches)
        self._landed.append((followed, timing))

    async def close(self) -> None:
        """Export what is left, as far as a few seconds allow."""
        # A thread that may be left behind: a collector that hangs must not keep a replica.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSING_S)

    def _tell_batches(self) -> None:
        """A span for each batch that has landed, and the end of those that were in it."""
        landed, self._landed = self._landed, []
        batches: dict[object, list[tuple[Followed, Timing]]] = {}
        for followed, timing in landed:
            # No two batches of a block take the same time to the last bit.
            key = (followed.model.name, followed.model.version, followed.block, timing.compute_s)
            batches.setdefault(key, []).append((followed, timing))
        for members in batches.values():
            self._tell(members)

    def _tell(self, members: list[tuple[Followed, Timing]]) -> None:
        from opentelemetry import context, trace

        followed, timing = members[0]
        # Each arrival was noted a little before its wait began: the latest sum is the nearest.
        begun_ns = max(one.arrived_ns + int(its.queue_s * 1e9) for one, its in members)
        batch = self._tracer.start_span(
            "datamix.batch",
            context.Context(),  # of nobody's trace: it belongs to all of them alike
            attributes={
                "datamix.model": followed.model.name,
                "datamix.model_version": followed.model.version,
                "datamix.block": followed.block,
                "datamix.batch_rows": timing.batch_rows,
                "datamix.close_reason": timing.close_reason,
                "datamix.compute_seconds": timing.compute_s,
            },
            links=[trace.Link(one.span.get_span_context()) for one, _ in members],
            start_time=begun_ns,
        )
        for one, _ in members:
            one.span.add_link(batch.get_span_context())
            one.span.end()
        batch.end(begun_ns + int(timing.compute_s * 1e9))
