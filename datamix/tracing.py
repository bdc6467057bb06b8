"""Traces from the device to the engine: the field that joins them, and where spans go.

A device that traces puts W3C Trace Context (https://www.w3.org/TR/trace-context/) into the metadata
of its requests as ``traceparent``; a replica that traces makes its spans children of that. Both are
off unless asked for, and a request that is not sampled carries nothing.

Spans hold names, sizes and times, no value of an input. They do tell the cloud which requests are
rounds of one inference, which a stream tells it anyway.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from datamix.errors import ConfigError, WireError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

FIELD = "traceparent"
LENGTH = 55

_FORM = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0([01])")


class Parent(NamedTuple):
    """The caller's span.

    Attributes:
        trace_id: of the whole trace, not 0.
        span_id: of the span, not 0.
        sampled: whether it is recorded.
    """

    trace_id: int
    span_id: int
    sampled: bool

    @classmethod
    def parse(cls, text: str) -> Parent:
        """Read version 00 of the standard's form.

        Raises:
            WireError: it has another one.
        """
        found = _FORM.fullmatch(text)
        parent = found and cls(int(found[1], 16), int(found[2], 16), found[3] == "1")
        if not parent or not parent.trace_id or not parent.span_id:
            raise WireError(
                f"{FIELD} is {text[:64]!r}, expected 00-<32 hex digits>-<16 hex digits>-00 or -01"
            )
        return parent

    def __str__(self) -> str:
        """The standard's form."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}"


def parent_of(span: Span) -> str | None:
    """What a request made under this span says of it; None where it is not sampled."""
    context = span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return None
    return str(Parent(context.trace_id, context.span_id, True))


def open_queue(service: str, endpoint: str) -> tuple[Resource, SpanProcessor]:
    """Where ended spans are exported to from here, in batches, by a thread of its own.

    Args:
        service: who makes the spans.
        endpoint: where a collector takes OTLP over HTTP: ``http(s)://host:4318/v1/traces``.

    Returns:
        What the spans say of the service, and what takes them.

    Raises:
        ConfigError: the endpoint is no URL, or OpenTelemetry is not installed.
    """
    if not re.match(r"https?://[^/]", endpoint):
        raise ConfigError(
            f"trace endpoint is {endpoint!r}, expected a URL such as http://host:4318/v1/traces"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"tracing needs OpenTelemetry ({error.name} is not installed): "
            "pip install 'datamix-cluster[tracing]'"
        ) from error
    resource = Resource.create({"service.name": service})
    return resource, BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
