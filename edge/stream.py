"""One WebSocket to the cloud: requests go out, answers find who asked, goodbyes are heeded.

How it ends decides what becomes of the requests that were not answered: see :data:`_GOODBYES`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from datamix import wire
from datamix.errors import AnswerError, TooLarge, Unauthorized, Unavailable, WireError


class Moved(Exception):
    """The cloud wants the stream elsewhere and has not read the request: nothing has failed.

    It answers what it has read before it says goodbye, so whatever is left was read by nobody.
    """


# By the code of the cloud's close frame (docs/wire.md).
_GOODBYES: dict[WSCloseCode, Callable[[], Exception]] = {
    WSCloseCode.GOING_AWAY: Moved,
    WSCloseCode.SERVICE_RESTART: Moved,
    WSCloseCode.POLICY_VIOLATION: lambda: Unauthorized(
        "the cloud closed the stream, as its token is no longer accepted"
    ),
}


def _lost() -> Exception:
    return Unavailable("the connection to the cloud was lost")


class Connection(WSListener):
    """An open stream, from the handshake to its end.

    Attributes:
        waiting: requests under way, by their id.
        quiet_since_s: when a message last came or the first of the waiting was sent, on the
            monotonic clock.
        unmatched: answers that came too late or for a request nobody sent.
        received_bytes: of whole messages that came, without framing.
    """

    def __init__(self, max_message_bytes: int, on_end: Callable[[Connection], None]) -> None:
        """Wait for picows to connect; ``on_end`` is called once, when nothing more can be asked."""
        self.waiting: dict[str, asyncio.Future[wire.Response]] = {}
        self.quiet_since_s = time.monotonic()
        self.unmatched = 0
        self.received_bytes = 0
        self._max_message_bytes = max_message_bytes
        self._on_end = on_end
        self._why: Callable[[], Exception] | None = None
        self._transport: WSTransport | None = None
        self._fragments: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self._why is None and self._transport is not None

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it."""
        return self._transport is not None and self._transport.is_disconnected

    async def ask(self, message: bytes, request_id: str) -> wire.Response:
        """Send a request and wait for its answer, whatever its status.

        Raises:
            Moved: the cloud did not read it.
            Unauthorized: the cloud no longer accepts the token.
            Unavailable: the connection was lost.
            AnswerError: an answer that is not a message of the protocol.
        """
        if self._why is not None or self._transport is None:
            raise (self._why or _lost)()
        answer: asyncio.Future[wire.Response] = asyncio.get_running_loop().create_future()
        if not self.waiting:
            self.quiet_since_s = time.monotonic()
        self.waiting[request_id] = answer
        try:
            self._transport.send(WSMsgType.BINARY, message)
            return await answer
        finally:
            if self.waiting.get(request_id) is answer:
                del self.waiting[request_id]

    async def close(self) -> None:
        """Say goodbye; requests under way fail as unavailable."""
        if self._transport is not None:
            self._transport.send_close(WSCloseCode.OK)
            # Once the cloud has said goodbye, what waits to be sent has nobody to read it.
            self._transport.disconnect(graceful=self._why is None)
            await _farewell(self._transport)

    def abort(self) -> None:
        """Drop a connection that seems to be dead."""
        self._end(_lost)
        if self._transport is not None:
            self._transport.disconnect(graceful=False)

    # --- called by picows ---

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Put whole messages together and match them."""
        if frame.msg_type == WSMsgType.CLOSE:
            code = frame.get_close_code()  # 0 for none, which must not be sent
            transport.send_close(WSCloseCode.OK if code == WSCloseCode.NO_INFO else code)
            transport.disconnect()
            self._end(_GOODBYES.get(code, _lost))
        elif frame.msg_type in (WSMsgType.BINARY, WSMsgType.CONTINUATION):
            # A copy, because the frame's memory is used again when this returns.
            self._fragments.append(frame.get_payload_as_bytes())
            if frame.fin:
                body, self._fragments = b"".join(self._fragments), []
                self._match(body)

    def pause_writing(self) -> None:
        """Go on: there is never more to send than the groups that the client has under way."""

    def resume_writing(self) -> None:
        """See :meth:`pause_writing`."""

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Whatever waits will not be answered."""
        self._end(_lost)
        # Why the connection was given up is an exception that asyncio wants somebody to look at.
        self._seen = asyncio.ensure_future(_farewell(transport))

    def _match(self, body: bytes) -> None:
        self.quiet_since_s = time.monotonic()
        self.received_bytes += len(body)
        try:
            response = wire.decode_response(body, max_bytes=self._max_message_bytes)
        except (WireError, TooLarge):
            request_id = wire.peek_request_id(body)
            outcome: wire.Response | Exception = AnswerError("the cloud's answer is no message")
        else:
            request_id, outcome = response.request_id, response
        answer = self.waiting.get(request_id)
        if answer is None or answer.done():
            self.unmatched += 1
        elif isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _end(self, why: Callable[[], Exception]) -> None:
        if self._why is not None:
            return
        self._why = why
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(why())
        self._on_end(self)


async def _farewell(transport: WSTransport) -> None:
    with contextlib.suppress(Exception):
        await transport.wait_disconnected()
