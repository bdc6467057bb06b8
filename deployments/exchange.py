"""The requests of a stream: from a message to the batcher, and back as its answer."""

from __future__ import annotations

from datamix import wire
from datamix.errors import DataMixError, WireError
from deployments.admission import Admission, Route, encode, presentable
from deployments.model import ServedModel
from deployments.streams import Stream
from deployments.waiting import Computed, Job


class Exchange:
    """The requests of one stream, from message to batcher and back."""

    def __init__(self, admission: Admission, route: Route, stream: Stream) -> None:
        """Take the messages of ``stream``, which came in at ``route``."""
        self._admission = admission
        self._route = route
        self._stream = stream
        stream.messages.on_message = self.receive

    def receive(self, body: bytes | None) -> None:
        """Take one message."""
        self._stream.enter()
        admission = self._admission
        model: ServedModel | None = None
        try:
            if body is None:
                raise WireError("a text frame came on the stream, expected binary messages")
            request = admission.decode(body)
            model = admission.find(self._route, request)
            waiting = StreamRequest(self, model, request)
            job = waiting.job = admission.admit(model, request, waiting.done)
            self._stream.watch(job)
        except Exception as error:
            self._refuse(model, wire.peek_request_id(body or b""), presentable(error))

    def done(self, waiting: StreamRequest, outcome: Computed | DataMixError) -> None:
        """Answer one request."""
        self._stream.forget(waiting.job)
        del waiting.job  # they hold each other: memory is freed at once where nothing goes round
        model, request = waiting.model, waiting.request
        parts = encode(model, request, outcome)
        if isinstance(parts, DataMixError):
            self._refuse(model, request.request_id, parts)
        else:
            model.outcomes["ok"] += 1
            self._admission.traffic.sent_bytes += self._stream.answer(parts)

    def _refuse(self, model: ServedModel | None, request_id: str, error: DataMixError) -> None:
        self._admission.count(model, error, request_id)
        message = wire.encode_error(
            request_id, error.status, str(error), retry_after_s=error.retry_after_s
        )
        self._admission.traffic.sent_bytes += self._stream.answer([message])


class StreamRequest:
    """One request of a stream that waits for its batch."""

    __slots__ = ("exchange", "job", "model", "request")

    job: Job

    def __init__(self, exchange: Exchange, model: ServedModel, request: wire.Request) -> None:
        """Remember whom to answer."""
        self.exchange = exchange
        self.model = model
        self.request = request

    def done(self, outcome: Computed | DataMixError) -> None:
        """Take what became of it; the batcher calls this on the event loop."""
        self.exchange.done(self, outcome)
