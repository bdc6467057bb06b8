"""What does a traced message cost a replica's event loop, and what the export of its spans?

A request in a batch of its own is followed and answered, many times over, without a cluster: by
the product, which makes its two spans when they end, and by OpenTelemetry's tracer, which is told
of them as they go. CPU time of the loop's thread, and of the others, which export; both take turns.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider

from benchmarks import report
from benchmarks.telemetry import ROWS, SHAPE, TRACE, sink
from datamix import wire
from datamix.tracing import Parent, open_queue
from deployments.tracing import Tracing
from deployments.waiting import Computed, Timing

PAUSE_EVERY, PAUSE_S = 400, 0.3  # so that the exporter's queue never overflows


class _Model:
    name, version = "echo", "1"


def ours(tracing: Tracing, request: wire.Request, answer: Computed) -> None:
    """As a replica does it."""
    followed = tracing.follow(TRACE, _Model, request, lambda _: None)  # type: ignore[arg-type]
    assert followed is not None
    followed(answer)


def tracer(provider: TracerProvider, request: wire.Request, answer: Computed) -> None:
    """The same two spans by the SDK's own means."""
    made, parent, timing = provider.get_tracer("datamix"), Parent.parse(TRACE), answer.timing
    remote = trace.SpanContext(parent.trace_id, parent.span_id, True, trace.TraceFlags(1))
    model: dict[str, str | int] = {
        "datamix.model": "echo",
        "datamix.model_version": "1",
        "datamix.block": request.block,
    }
    span = made.start_span(
        "datamix.request",
        trace.set_span_in_context(trace.NonRecordingSpan(remote)),
        trace.SpanKind.SERVER,
        {**model, "datamix.request_id": request.request_id, "datamix.rows": request.rows},
    )
    span.set_attribute("datamix.status", 200)
    span.set_attribute("datamix.queue_seconds", timing.queue_s)
    batch = made.start_span(
        "datamix.batch",
        context.Context(),
        attributes={
            **model,
            "datamix.batch_rows": timing.batch_rows,
            "datamix.close_reason": timing.close_reason,
            "datamix.compute_seconds": timing.compute_s,
        },
        links=[trace.Link(span.get_span_context())],
    )
    span.add_link(batch.get_span_context())
    span.end()
    batch.end()


def measure(one: Callable[[], None], close: Callable[[], None], messages: int) -> dict[str, float]:
    """CPU microseconds of a message, of the loop's thread and of all others."""

    async def go() -> float:
        began = time.thread_time()
        for number in range(messages):
            one()
            await asyncio.sleep(0 if number % PAUSE_EVERY else PAUSE_S)
        return time.thread_time() - began

    began = time.process_time()
    loop_s = asyncio.run(go())
    close()
    rest_s = time.process_time() - began - loop_s
    return {"loop": 1e6 * loop_s / messages, "export": 1e6 * rest_s / messages}


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    features = np.zeros((ROWS, *SHAPE), np.float32)
    message = wire.encode_request(features, request_id="0" * 16, traceparent=TRACE)
    request = wire.decode_request(message)
    answer = Computed(features, Timing(0.001, 0.002, ROWS, "full"))
    found: dict[str, list[dict[str, float]]] = {"neither": [], "ours": [], "tracer": []}
    with sink() as collector:
        for _ in range(options.rounds):
            tracing = Tracing.to(collector, 1e9)
            resource, queue = open_queue("datamix-cloud", collector)
            provider = TracerProvider(resource=resource)
            provider.add_span_processor(queue)
            arms: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
                "neither": (lambda: None, lambda: None),
                "ours": (lambda t=tracing: ours(t, request, answer), tracing.spans.shutdown),  # type: ignore[misc]
                "tracer": (lambda p=provider: tracer(p, request, answer), provider.shutdown),  # type: ignore[misc]
            }
            for name, (one, close) in arms.items():
                found[name].append(measure(one, close, options.messages))
    middle = {
        name: {part: statistics.median(each[part] for each in runs) for part in ("loop", "export")}
        for name, runs in found.items()
    }
    bare = middle.pop("neither")
    rows: list[dict[str, Any]] = [
        {
            "spans by": name,
            "loop us a message": parts["loop"] - bare["loop"],
            "export us a message": parts["export"] - bare["export"],
        }
        for name, parts in middle.items()
    ]
    report.show(
        "One traced message, alone in its batch: two spans",
        rows,
        ["medians over rounds, less a loop that traces nothing; export includes the collector's"],
        options.json,
        loop_ours_over_tracer=rows[0]["loop us a message"] / rows[1]["loop us a message"],
    )


if __name__ == "__main__":
    main()
