"""Ways to the cloud behind one small interface: a stream, one request per connection use, or none.

    StreamTransport      one WebSocket, many requests under way, answers matched by request id
    UnaryTransport       one HTTP POST per request
    InProcessTransport   a coroutine in this process, for tests and examples

A transport makes one attempt. Whether to try again is the client's business (:mod:`edge.client`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from http.cookiejar import DefaultCookiePolicy
from typing import Protocol
from urllib.parse import urlsplit

import httpx
from picows import WSError, WSInvalidStatusError, ws_connect

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
from edge.stream import Connection, Moved

# Ray Serve starts a task per request or stream that watches for disconnects. A stream notices by
# itself, and a message then takes one queue less on its way (docs/decisions).
_HEADERS = {"x-request-disconnect-disabled": "?1"}
# A connection on which requests wait and nothing comes for this long may be dead without a sign.
_SILENCE_S = 2.0
_CONNECT_S = 10.0  # for TCP and the WebSocket handshake together
# Rotations may follow each other; a cloud that sends everybody away again and again is at fault.
_MOST_MOVES = 4

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


class StreamTransport:
    """One WebSocket to `/v2/models/{model}/stream`, opened on first use and again when lost.

    Where the cloud wants the stream elsewhere (a rolling update, replicas that were added), another
    is opened and what the cloud has not read is sent again on it, within the same attempt.

    Attributes:
        connections: how many times it connected.
        moved: requests sent again because the cloud had moved the stream.
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
        self._current: Connection | None = None  # where requests go
        self._open: set[Connection] = set()  # and those that are about to end
        self._opening: asyncio.Task[Connection] | None = None
        self._closed = False
        self._unmatched = self._received_bytes = 0
        self.connections = 0
        self.moved = 0

    @property
    def unmatched(self) -> int:
        """Answers that came too late or for a request nobody sent."""
        return self._unmatched + sum(connection.unmatched for connection in self._open)

    @property
    def received_bytes(self) -> int:
        """Whole messages that came, without framing."""
        return self._received_bytes + sum(open_.received_bytes for open_ in self._open)

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        """See :class:`Transport`."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(_MOST_MOVES):
                    connection = await self._connect()
                    try:
                        return await connection.ask(message, request_id)
                    except Moved:
                        self.moved += 1
                raise Unavailable(f"the cloud moved the stream {_MOST_MOVES} times in a row")
        except TimeoutError:
            if connection is not None and time.monotonic() - connection.quiet_since_s > _SILENCE_S:
                connection.abort()  # so that the next request connects anew
            raise Unavailable(f"no answer within {timeout_s:.3g} s") from None

    async def close(self) -> None:
        """See :class:`Transport`."""
        self._closed = True
        if self._opening is not None:
            await asyncio.wait([self._opening])
        await asyncio.gather(*(connection.close() for connection in self._open))

    async def _connect(self) -> Connection:
        """The open connection. All requests share one attempt, and none can cancel it.

        A WebSocket handshake that is cancelled half way would leave its socket behind.
        """
        if self._closed:
            raise ConfigError("this transport is closed")
        if self._current is not None:
            return self._current
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._connect_anew())
            # Where every request has given up by then, nobody else looks at its failure.
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._opening)

    async def _connect_anew(self) -> Connection:
        connection = Connection(self._max_message_bytes, self._on_end)
        try:
            async with asyncio.timeout(_CONNECT_S):
                socket, _ = await ws_connect(
                    lambda: connection,
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
        for old in [old for old in self._open if old.is_gone]:
            self._open.remove(old)
            self._unmatched += old.unmatched
            self._received_bytes += old.received_bytes
        self._open.add(connection)
        if connection.is_open:
            self._current = connection
        return connection

    def _on_end(self, connection: Connection) -> None:
        if self._current is connection:
            self._current = None


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
