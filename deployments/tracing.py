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
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from datamix.errors import DataMixError
from datamix.tracing import Parent, open_queue
from deployments.allowance import Allowance
from deployments.waiting import Computed, Timing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

    from datamix.wire import Request
    from deployments.model import ServedModel

SERVICE = "datamix-cloud"
_CLOSING_S = 3.0

Done = Callable[[Computed | DataMixError], None]


class Spans:
    """Makes ended spans and has them exported.

    OpenTelemetry's own tracer makes spans that can be told of things until they end, with a lock
    and a check each time. Here all is known at the end, and one made then takes a fraction of a
    tracer's time on the event loop (docs/decisions/0015).
    """

    def __init__(self, resource: Resource, queue: SpanProcessor) -> None:
        """Say of each span whose it is, and hand it to ``queue``."""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._api = trace
        self._sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._span = ReadableSpan
        self._ids = RandomIdGenerator()
        self._resource = resource
        self._scope = InstrumentationScope("datamix")
        self._queue = queue
        self.shutdown = queue.shutdown

    def remote(self, parent: Parent) -> SpanContext:
        """The caller's span."""
        return self._api.SpanContext(parent.trace_id, parent.span_id, True, self._sampled)

    def below(self, parent: SpanContext | None) -> SpanContext:
        """A new span's context: of the parent's trace, or the first of its own."""
        trace_id = self._ids.generate_trace_id() if parent is None else parent.trace_id
        return self._api.SpanContext(trace_id, self._ids.generate_span_id(), False, self._sampled)

    def tell(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        attributes: dict[str, str | int | float],
        start_ns: int,
        end_ns: int,
        *,
        links: Iterable[SpanContext] = (),
        error: str | None = None,
    ) -> None:
        """Export a span; one with a parent answers a request. Times are since 1970."""
        api = self._api
        span = self._span(
            f"datamix.{name}",
            context,
            parent,
            self._resource,
            {f"datamix.{key}": value for key, value in attributes.items()},
            links=[api.Link(one) for one in links],
            kind=api.SpanKind.INTERNAL if parent is None else api.SpanKind.SERVER,
            status=api.Status() if error is None else api.Status(api.StatusCode.ERROR, error),
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )
        self._queue.on_end(span)


class Followed:
    """A traced request; called with its outcome in place of whom it answers."""

    __slots__ = (
        *("_done", "_parent", "_tracing", "arrived_ns", "block", "context", "model"),
        *("request_id", "rows"),
    )

    def __init__(
        self,
        tracing: Tracing,
        parent: SpanContext,
        model: ServedModel,
        request: Request,
        done: Done,
    ) -> None:
        """Pass on what becomes of a request that has just arrived, and tell its span then."""
        self._tracing = tracing
        self._parent = parent
        self._done = done
        self.context = tracing.spans.below(parent)
        self.model = model
        self.block = request.block
        self.rows = request.rows
        self.request_id = request.request_id
        self.arrived_ns = time.time_ns()

    def __call__(self, outcome: Computed | DataMixError) -> None:
        """Answer, then write down how it went."""
        try:
            self._done(outcome)
        finally:
            if isinstance(outcome, DataMixError):
                self.refuse(outcome)
            else:
                self._tracing.land(self, outcome.timing, time.time_ns())

    def refuse(self, error: DataMixError) -> None:
        """Tell the span of a request that was not computed."""
        self._tell({"status": error.status}, time.time_ns(), error=type(error).__name__)

    def land(self, queue_s: float, end_ns: int, batch: SpanContext) -> None:
        """Tell the span of one that was, in this batch."""
        self._tell({"status": 200, "queue_seconds": queue_s}, end_ns, links=(batch,))

    def _tell(
        self,
        outcome: dict[str, int | float],
        end_ns: int,
        *,
        links: Iterable[SpanContext] = (),
        error: str | None = None,
    ) -> None:
        attributes: dict[str, str | int | float] = {
            "request_id": self.request_id,
            "model": self.model.name,
            "model_version": self.model.version,
            "block": self.block,
            "rows": self.rows,
            **outcome,
        }
        self._tracing.spans.tell(
            *("request", self.context, self._parent, attributes, self.arrived_ns, end_ns),
            links=links,
            error=error,
        )


class Tracing:
    """Follows requests from their arrival to their answer; to be used on the event loop."""

    def __init__(
        self, spans: Spans, *, per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Tell the spans of ``per_s`` requests per second at most."""
        self.spans = spans
        self._allowance = Allowance(per_s, clock)
        self._landed: list[tuple[Followed, Timing, int]] = []

    @classmethod
    def to(cls, endpoint: str, per_s: float) -> Tracing:
        """Export to a collector.

        Raises:
            ConfigError: see :func:`datamix.tracing.open_queue`.
        """
        return cls(Spans(*open_queue(SERVICE, endpoint)), per_s=per_s)

    def follow(
        self, traceparent: str, model: ServedModel, request: Request, done: Done
    ) -> Followed | None:
        """Trace a request whose device traces it, if it is sampled and the allowance lasts."""
        parent = Parent.parse(traceparent)
        if not parent.sampled or not self._allowance.take():
            return None
        return Followed(self, self.spans.remote(parent), model, request, done)

    def land(self, followed: Followed, timing: Timing, end_ns: int) -> None:
        """Note that a request was computed and answered."""
        if not self._landed:
            # A batch is delivered in one go: by the loop's next turn all of it has landed.
            asyncio.get_running_loop().call_soon(self._tell_batches)
        self._landed.append((followed, timing, end_ns))

    async def close(self) -> None:
        """Export what is left, as far as a few seconds allow."""
        # A thread that may be left behind: a collector that hangs must not keep a replica.
        closing = threading.Thread(target=self.spans.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSING_S)

    def _tell_batches(self) -> None:
        """A span for each batch that has landed, and for each of those that were in it."""
        landed, self._landed = self._landed, []
        batches: dict[object, list[tuple[Followed, Timing, int]]] = {}
        for followed, timing, end_ns in landed:
            # No two batches of a block take the same time to the last bit.
            key = (followed.model.name, followed.model.version, followed.block, timing.compute_s)
            batches.setdefault(key, []).append((followed, timing, end_ns))
        for members in batches.values():
            self._tell(members)

    def _tell(self, members: list[tuple[Followed, Timing, int]]) -> None:
        followed, timing, _ = members[0]
        # Each arrival was noted a little before its wait began: the latest sum is the nearest.
        begun_ns = max(one.arrived_ns + int(its.queue_s * 1e9) for one, its, _ in members)
        batch = self.spans.below(None)  # of nobody's trace: it belongs to all of them alike
        for one, its, end_ns in members:
            one.land(its.queue_s, end_ns, batch)
        self.spans.tell(
            "batch",
            batch,
            None,
            {
                "model": followed.model.name,
                "model_version": followed.model.version,
                "block": followed.block,
                "batch_rows": timing.batch_rows,
                "close_reason": timing.close_reason,
                "compute_seconds": timing.compute_s,
            },
            begun_ns,
            begun_ns + int(timing.compute_s * 1e9),
            links=[one.context for one, _, _ in members],
        )
