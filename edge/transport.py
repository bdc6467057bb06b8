"""Ways to the cloud behind one small interface: a stream, one request per connection use, or none.

    StreamTransport      one WebSocket, many requests under way, answers matched by request id
    UnaryTransport       one HTTP POST per request
    InProcessTransport   a coroutine in this process, for tests and examples

A transport makes one attempt. Whether to try again is the client's business (:mod:`edge.client`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from http.cookiejar import DefaultCookiePolicy
from typing import Protocol
from urllib.parse import urlsplit

import httpx
from picows import (
    WSCloseCode,
    WSError,
    WSFrame,
    WSInvalidStatusError,
    WSListener,
    WSMsgType,
    WSTransport,
    ws_connect,
)

from datamix import wire
from datamix.errors import (
    AnswerError,
    ConfigError,
    TooLarge,
    Unavailable,
    WireError,
    from_status,
)
from edge.access import Access, distrust

# Ray Serve starts a task per request or stream that watches for disconnects. A stream notices by
# itself, and a message then takes one queue less on its way (docs/decisions).
_HEADERS = {"x-request-disconnect-disabled": "?1"}
# A connection on which requests wait and nothing comes for this long may be dead without a sign.
_SILENCE_S = 2.0
_CONNECT_S = 10.0  # for TCP and the WebSocket handshake together

# picows would write each handshake into a log that is verbose enough, and the token stands in it.
_quiet = logging.getLogger("picows.datamix")
_quiet.setLevel(logging.WARNING)


_ANYBODY = Access()


class Transport(Protocol):
    """One attempt at one request."""

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        """Send an encoded request and wait for its answer, whatever its status.

        Raises:
            Unavailable: no answer: connection refused or lost, or ``timeout_s`` passed.
            AnswerError: an answer that is not a message of the protocol.
            ConfigError: the transport is closed.
        """
        ...

    async def close(self) -> None:
        """Let go of connections for good; requests under way fail as unavailable.

        Afterwards :meth:`send` raises ConfigError.
        """
        ...


def check_url(url: str) -> str:
    """A base URL without trailing slash.

    Raises:
        ConfigError: not ``http://host[:port]`` or ``https://host[:port]``.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that does not close
        valid = False
    if not valid:
        raise ConfigError(f"url is {url!r}, expected http://host:port or https://host:port")
    return url.rstrip("/")


class _Listener(WSListener):
    """Puts whole messages together and hands them on."""

    def __init__(self, on_message: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._fragments: list[bytes] = []

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()
        elif frame.msg_type in (WSMsgType.BINARY, WSMsgType.CONTINUATION):
            # A copy, because the frame's memory is used again when this returns.
            self._fragments.append(frame.get_payload_as_bytes())
            if frame.fin:
                body, self._fragments = b"".join(self._fragments), []
                self._on_message(body)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._on_lost()
        # Why the connection was given up is an exception that asyncio wants somebody to look at.
        self._farewell = asyncio.ensure_future(_farewell(transport))


async def _farewell(transport: WSTransport) -> None:
    with contextlib.suppress(Exception):
        await transport.wait_disconnected()


class StreamTransport:
    """One WebSocket to `/v2/models/{model}/stream`, opened on first use and again when lost.

    Attributes:
        connections: how many times it connected.
        unmatched: answers that came too late or for a request nobody sent.
    """

    def __init__(
        self, url: str, model: str, access: Access = _ANYBODY, *, max_message_bytes: int = 1 << 26
    ) -> None:
        """Prepare; nothing is connected yet.

        Raises:
            ConfigError: the URL is none, or the file of authorities cannot be used.
        """
        base = check_url(url)
        self._url = f"ws{base.removeprefix('http')}/v2/models/{model}/stream"
        self._headers = {**_HEADERS, **access.headers}
        self._ssl = access.context(base)
        self._max_message_bytes = max_message_bytes
        self._waiting: dict[str, asyncio.Future[wire.Response]] = {}
        self._socket: WSTransport | None = None
        self._opening: asyncio.Task[WSTransport] | None = None
        self._closed = False
        self._quiet_since = 0.0  # on the monotonic clock
        self.connections = 0
        self.unmatched = 0

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        """See :class:`Transport`."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[wire.Response] = loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                socket = await self._connect()
                if not self._waiting:
                    self._quiet_since = time.monotonic()
                self._waiting[request_id] = answer
                socket.send(WSMsgType.BINARY, message)
                return await answer
        except TimeoutError:
            if self._socket is not None and time.monotonic() - self._quiet_since > _SILENCE_S:
                dead, self._socket = self._socket, None  # so that the next request connects anew
                dead.disconnect(graceful=False)
            raise Unavailable(f"no answer within {timeout_s:.3g} s") from None
        finally:
            if self._waiting.get(request_id) is answer:
                del self._waiting[request_id]

    async def close(self) -> None:
        """See :class:`Transport`."""
        self._closed = True
        if self._opening is not None:
            await asyncio.wait([self._opening])
        if self._socket is not None:
            self._socket.send_close(WSCloseCode.OK)
            self._socket.disconnect()
            await _farewell(self._socket)

    async def _connect(self) -> WSTransport:
        """The open connection. All requests share one attempt, and none can cancel it.

        A WebSocket handshake that is cancelled half way would leave its socket behind.
        """
        if self._closed:
            raise ConfigError("this transport is closed")
        if self._socket is not None and not self._socket.is_disconnected:
            return self._socket
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())
            # Where every request has given up by then, nobody else looks at its failure.
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._opening)

    async def _open(self) -> WSTransport:
        try:
            async with asyncio.timeout(_CONNECT_S):
                socket, _ = await ws_connect(
                    self._listener,
                    self._url,
                    ssl_context=self._ssl,
                    extra_headers=self._headers,
                    logger_name=_quiet,
                    max_frame_size=self._max_message_bytes,
                    max_redirects=0,  # nobody sends the mixtures elsewhere
                    websocket_handshake_timeout=_CONNECT_S / 2,
                )
        except WSInvalidStatusError as error:
            raise _refusal(error) from error
        except (OSError, WSError, TimeoutError) as error:
            raise distrust(error) or Unavailable(f"cannot connect to the cloud: {error}") from error
        if socket.is_disconnected:  # picows says so nowhere else
            raise Unavailable("the cloud hung up instead of opening a stream")
        self.connections += 1
        self._quiet_since = time.monotonic()
        self._socket = socket
        return socket

    def _listener(self) -> WSListener:
        # Each connection knows its number, so that a late goodbye of an old one cannot fail the
        # requests of the new one.
        listener = _Listener(self._on_message, lambda: self._on_lost(generation))
        generation = self.connections
        return listener

    def _on_message(self, body: bytes) -> None:
        self._quiet_since = time.monotonic()
        try:
            response = wire.decode_response(body, max_bytes=self._max_message_bytes)
        except (WireError, TooLarge):
            request_id = wire.peek_request_id(body)
            outcome: wire.Response | Exception = AnswerError("the cloud's answer is no message")
        else:
            request_id, outcome = response.request_id, response
        answer = self._waiting.get(request_id)
        if answer is None or answer.done():
            self.unmatched += 1
        elif isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _on_lost(self, generation: int) -> None:
        if generation + 1 < self.connections:
            return
        self._socket = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Unavailable("the connection to the cloud was lost"))


class UnaryTransport:
    """One HTTP POST per request, over kept-alive connections."""

    def __init__(
        self, url: str, model: str, access: Access = _ANYBODY, *, max_message_bytes: int = 1 << 26
    ) -> None:
        """Prepare; nothing is connected yet.

        Raises:
            ConfigError: the URL is none, or the file of authorities cannot be used.
        """
        base = check_url(url)
        self._url = f"{base}/v2/models/{model}/infer"
        self._max_message_bytes = max_message_bytes
        self._client = httpx.AsyncClient(
            headers={**_HEADERS, **access.headers, "content-type": wire.MEDIA_TYPE},
            # Without TLS none is made up: reading this machine's authorities takes 30 ms.
            verify=access.context(base) or False,
            trust_env=False,
        )
        # No cookies: the cloud would know requests of one client by them.
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        """See :class:`Transport`."""
        if self._client.is_closed:
            raise ConfigError("this transport is closed")
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._client.post(self._url, content=message, timeout=None)
        except TimeoutError:
            raise Unavailable(f"no answer within {timeout_s:.3g} s") from None
        except httpx.HTTPError as error:
            raise distrust(error) or Unavailable(
                f"the request did not get through: {error!r}"
            ) from error
        if reply.status_code != 200:
            raise _http_error(
                reply.status_code, reply.content, reply.headers.get("retry-after", "")
            )
        try:
            response = wire.decode_response(reply.content, max_bytes=self._max_message_bytes)
        except (WireError, TooLarge) as error:
            raise AnswerError("the cloud's answer is no message") from error
        if response.request_id != request_id:
            raise AnswerError("the cloud answered another request")
        return response

    async def close(self) -> None:
        """See :class:`Transport`."""
        await self._client.aclose()


def _refusal(error: WSInvalidStatusError) -> Exception:
    """The error of a cloud that did not open the stream, for the reason its status names."""
    if error.response is None:
        return Unavailable(f"cannot connect to the cloud: {error}")
    retry_after = error.response.headers.get("retry-after", "")
    return _http_error(int(error.response.status), error.raw_body or b"", retry_after)


def _http_error(status: int, body: bytes, retry_after: str) -> Exception:
    """The error an HTTP reply carries: ours in JSON, or whatever a proxy on the way said."""
    try:
        sentence = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        sentence = f"the cloud answered with status {status}"
    wait_s = float(retry_after) if retry_after.isdecimal() else None
    return from_status(status, sentence, retry_after_s=wait_s)


class InProcessTransport:
    """Calls ``answer(message)`` in this process: no socket, no server."""

    def __init__(self, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        """Answer requests with ``answer``, a coroutine function from message to message."""
        self._answer = answer

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        """See :class:`Transport`."""
        try:
            async with asyncio.timeout(timeout_s):
                body = await self._answer(message)
        except TimeoutError:
            raise Unavailable(f"no answer within {timeout_s:.3g} s") from None
        try:
            response = wire.decode_response(body)
        except (WireError, TooLarge) as error:
            raise AnswerError("the cloud's answer is no message") from error
        if response.request_id != request_id:
            raise AnswerError("the cloud answered another request")
        return response

    async def close(self) -> None:
        """Nothing to let go of."""
