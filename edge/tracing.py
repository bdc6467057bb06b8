"""The device's side of a trace: one for some inferences, with a span for each round.

    infer                    one call of Client.infer
      stem
      group                  once for each group of K inputs
        round                once for each block; what the cloud makes of it hangs below

The gaps between rounds are what the device does itself: de-mixing, the bridge, mixing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from datamix.errors import ConfigError
from datamix.tracing import open_queue, parent_of

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SERVICE = "datamix-device"


@contextmanager
def span(tracer: Tracer | None, name: str, **attributes: str | int) -> Iterator[str | None]:
    """A span around the block, below the one that is open; yields what a request says of it.

    Nothing happens without a tracer. What the block raises is told by its type alone: an error's
    text may quote what it was given.
    """
    if tracer is None:
        yield None
        return
    from opentelemetry.trace import StatusCode

    told = {f"datamix.{key}": value for key, value in attributes.items()}
    with tracer.start_as_current_span(
        f"datamix.{name}", attributes=told, record_exception=False, set_status_on_exception=False
    ) as opened:
        try:
            yield parent_of(opened)
        except BaseException as error:
            opened.set_status(StatusCode.ERROR, type(error).__name__)
            raise


@contextmanager
def tracing(endpoint: str | None, ratio: float = 1.0) -> Iterator[Tracer | None]:
    """A tracer while the block runs, whose spans have left when it ends; None without an endpoint.

    Args:
        endpoint: see :func:`datamix.tracing.open_queue`.
        ratio: the share of inferences that are traced, 0 to 1.

    Raises:
        ConfigError: the endpoint or the ratio makes no sense, or OpenTelemetry is not installed.
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(f"trace ratio is {ratio}, expected 0 to 1")
    if endpoint is None:
        yield None
        return
    resource, queue = open_queue(SERVICE, endpoint)
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(ParentBased(TraceIdRatioBased(ratio)), resource)
    provider.add_span_processor(queue)
    try:
        yield provider.get_tracer("datamix")
    finally:
        provider.shutdown()
