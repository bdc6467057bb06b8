"""What every request goes through, in whichever protocol it came: read, routed, queued, answered.

A request is decoded and checked on the event loop, before it can enter a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from datamix import wire
from datamix.errors import DataMixError, NonFinite, NotFound, Unavailable
from deployments.engine import Rows
from deployments.model import ServedModel
from deployments.waiting import Computed, Job

if TYPE_CHECKING:
    from deployments.backbone import Backbone

logger = logging.getLogger(__name__)

# Of a request that gets this status. All else is the asker's doing or comes by the thousands under
# load, and metrics count it.
_LEVELS = {500: logging.ERROR, 503: logging.WARNING}


class Route(NamedTuple):
    """Where a path leads: a model, perhaps a version, and what to do with it."""

    model: str
    version: str | None
    action: str


class Admission:
    """The way of a request to its model and into the queue."""

    def __init__(self, backbone: Backbone) -> None:
        """Let requests in to the models of ``backbone``."""
        self.traffic = backbone.traffic
        self._catalog = backbone.catalog
        self._expander = backbone.expander
        self._tracing = backbone.tracing
        self._clock = backbone.clock
        self._max_bytes = backbone.config.max_request_bytes
        self._max_rows = backbone.config.max_request_rows

    def find(self, route: Route, request: wire.Request) -> ServedModel:
        """The model version that the path and the message name together."""
        if request.model is not None and request.model != route.model:
            raise NotFound(f"model of the message is {request.model!r}, expected {route.model!r}")
        version = request.model_version
        if version is None:
            version = route.version
        elif route.version is not None and version != route.version:
            raise NotFound(f"version of the message is {version!r}, expected {route.version!r}")
        return self._catalog.find(route.model, version)

    def decode(self, body: bytes) -> wire.Request:
        """Open one message."""
        self.traffic.received_bytes += len(body)
        return wire.decode_request(body, max_bytes=self._max_bytes, max_rows=self._max_rows)

    def admit(
        self,
        model: ServedModel,
        request: wire.Request,
        done: Callable[[Computed | DataMixError], None],
    ) -> Job:
        """Check and queue one request, in whichever protocol it came."""
        model.check(request)
        model.offered_requests += 1
        model.offered_rows[request.block] += request.rows
        followed = None
        if request.traceparent is not None and self._tracing is not None:
            followed = self._tracing.follow(request.traceparent, model, request, done)
        deadline_s = request.deadline_s
        job = Job(
            block=request.block,
            rows=Rows(request.features, request.scale),
            done=done if followed is None else followed,
            deadline=None if deadline_s is None else self._clock() + deadline_s,
            priority=request.priority,
        )
        try:
            self._offer(model, request, job)
        except DataMixError as error:
            if followed is not None:
                followed.refuse(error)
            raise
        return job

    def _offer(self, model: ServedModel, request: wire.Request, job: Job) -> None:
        if request.noise:
            shape = model.engine.blocks[request.block].input_shape
            self._expander.offer(model.batcher, request, job, shape)
        else:
            model.batcher.offer(job)

    def count(
        self, model: ServedModel | None, outcome: bytes | DataMixError, request_id: str = ""
    ) -> None:
        """Count one answer, for its model where one was found; an error is written down, too."""
        outcomes = self.traffic.astray if model is None else model.outcomes
        if not isinstance(outcome, DataMixError):
            outcomes["ok"] += 1
            return
        outcomes[str(outcome.status)] += 1
        level = _LEVELS.get(outcome.status, logging.DEBUG)
        if logger.isEnabledFor(level):
            # By its type: an error's sentence can quote what a stranger sent.
            told = {"request_id": request_id, "status": outcome.status}
            told["error"] = type(outcome).__name__
            if model is not None:
                told |= {"model": model.name, "model_version": model.version}
            logger.log(level, "request was not answered", extra=told)


def encode(
    model: ServedModel, request: wire.Request, outcome: Computed | DataMixError
) -> list[Any] | DataMixError:
    """The answer to a request in the parts of its message, or the error that it gets."""
    if isinstance(outcome, DataMixError):
        return outcome
    output, timing = outcome
    try:
        return wire.response_parts(
            output,
            dtype=request.dtype,
            request_id=request.request_id,
            model=model.name,
            model_version=model.version,
            block=request.block,
            queue_s=timing.queue_s,
            compute_s=timing.compute_s,
            batch_rows=timing.batch_rows,
            close_reason=timing.close_reason,
        )
    except NonFinite:
        return NonFinite(f"the output of block {request.block} holds NaN or Inf")
    except Exception as error:
        return presentable(error)


def presentable(error: Exception) -> DataMixError:
    """The error as it may travel. What nobody foresaw keeps its text and traceback to itself.

    They can hold values of the input, so the log gets the type only.
    """
    if isinstance(error, DataMixError):
        return error
    logger.error("request failed: %s", type(error).__name__)
    return Unavailable("the replica failed on this request")
