"""WebSockets for uvicorn by picows: a message goes from the socket straight to its handler.

uvicorn's own WebSocket protocols parse frames in Python and pass every message through a queue to a
task. Under Ray Serve that is more than half of a replica's time per message. This one lets picows,
which is compiled, parse and write frames, and calls the application back for each message; no
queue, no task, nothing awaited in between.

To an ASGI application it looks like any other: the scope, one task per connection, ``receive`` for
connect and disconnect, ``send`` to accept or refuse. Messages alone take the short way: the
application finds a :class:`Messages` in ``scope["extensions"][EXTENSION]``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import uvicorn.config
from picows import (
    WSAutoPingStrategy,
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # the stubs leave it out
from uvicorn.protocols.utils import get_local_addr, get_remote_addr

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

EXTENSION = "datamix.messages"
MAX_MESSAGE_BYTES = 16 << 20
_MAX_REQUEST_BYTES = 15 << 10  # to upgrade a connection; picows hangs up without a word at 16 kB
_ROOM = bytes(14)  # for the header of the frame that holds a message
_PING_S = 20.0  # to find peers that left without a word

logger = logging.getLogger(__name__)
# picows says a line for each connection that comes and goes.
_quiet = logging.getLogger("picows.server")
_quiet.setLevel(logging.WARNING)


def install() -> None:
    """Make every uvicorn server that is started later in this process use this protocol."""
    uvicorn.config.WS_PROTOCOLS["auto"] = f"{__name__}:WebSocket"


class Messages:
    """The messages of one open connection; what the application holds.

    Attributes:
        on_message: called on the event loop with each binary message, and with None for a text
            message. To be set before the connection is accepted.
        on_stop: called when the server stops and the stream should end soon. To be set likewise.
        touched: a message came; whoever wants to see the next one sets it back.
        is_full: the peer does not read, and more than a little waits for it.
        is_closing: one side has said goodbye.
    """

    def __init__(self) -> None:
        """Hand messages to nobody yet."""
        self.on_message: Callable[[bytes | None], None] = _drop
        self.on_stop: Callable[[], None] = lambda: self.close(WSCloseCode.SERVICE_RESTART)
        self.transport: WSTransport | None = None
        self.touched = False
        self.is_full = False
        self.is_closing = False
        self._backlog: deque[bytes | None] = deque()  # came in the same read as the one held at
        self._held = False  # by the application
        self._draining = False

    def send(self, parts: list[Any]) -> int:
        """Write one binary message, and say how long it is: 0 where the peer is gone."""
        if self.transport is None or self.transport.is_disconnected:
            return 0
        # Joined behind the room for a frame's header, so that picows need not copy it again.
        buffer = bytearray().join((_ROOM, *parts))
        self.transport.send_reuse_external_bytearray(WSMsgType.BINARY, buffer, len(_ROOM))
        return len(buffer) - len(_ROOM)

    def receive(self, body: bytes | None) -> None:
        """Pass one message on, or keep it while the application holds the peer."""
        self.touched = True
        if self._held:
            self._backlog.append(body)
        else:
            self.on_message(body)

    def hold(self, held: bool) -> None:
        """Pass no more messages on and stop reading from the peer, or go on."""
        self._held = held
        if self._draining:
            return  # called by on_message below: the loop there sees it, and nothing nests
        self._draining = True
        try:
            while self._backlog and not self._held:
                self.on_message(self._backlog.popleft())
        finally:
            self._draining = False
        self._flow()

    def full(self, full: bool) -> None:
        """Stop reading while the peer does not read either: it gets no room for more answers."""
        self.is_full = full
        self._flow()

    def close(self, code: WSCloseCode) -> None:
        """Say goodbye, and pass nothing on any more.

        What still comes is read and dropped until the peer has said goodbye too: a socket that is
        closed over unread bytes is reset, and what was just sent may be lost with it.
        """
        self.is_closing = True
        self._backlog.clear()
        self.on_message = _drop
        self._held = False
        if (transport := self._open_transport()) is not None:
            transport.send_close(code)
            self._flow()

    def abort(self) -> None:
        """End the connection without a word; what waits to be read by the peer is dropped."""
        if (transport := self._open_transport()) is not None:
            transport.disconnect(graceful=False)
        self.transport = None  # what is written from now on would only be complained about

    def excuse(self) -> None:
        """Take a peer that is not read from for alive, as its pongs wait unread, too."""
        transport = self._open_transport()
        if transport is not None and (self._held or self.is_full):
            transport.notify_user_specific_pong_received()

    @property
    def buffered_bytes(self) -> int:
        """What waits in this process for the peer to read it."""
        transport = self._open_transport()
        return 0 if transport is None else transport.underlying_transport.get_write_buffer_size()

    @property
    def is_broken(self) -> bool:
        """The connection was ended from here, with a close frame that says what was wrong."""
        shake = None if self.transport is None else self.transport.close_handshake
        return shake is not None and shake.recv is None

    def _open_transport(self) -> WSTransport | None:
        gone = self.transport is None or self.transport.is_disconnected
        return None if gone else self.transport

    def _flow(self) -> None:
        if (transport := self._open_transport()) is None:
            return
        socket = transport.underlying_transport
        if (self._held or self.is_full) and not self.is_closing:
            socket.pause_reading()
        else:
            socket.resume_reading()


def _drop(body: bytes | None) -> None:
    """Take a message that nobody waits for."""


class _Listener(WSListener):
    """Puts messages together from frames and passes them on."""

    def __init__(self, messages: Messages, on_lost: Callable[[], None]) -> None:
        self._messages = messages
        self._on_lost = on_lost
        self._fragments = bytearray()
        self._text = False

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._messages.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        kind = frame.msg_type
        if kind == WSMsgType.BINARY and frame.fin:
            self._messages.receive(frame.get_payload_as_bytes())
        elif kind in (WSMsgType.BINARY, WSMsgType.TEXT, WSMsgType.CONTINUATION):
            self._part(transport, frame)
        elif kind == WSMsgType.CLOSE:
            self._messages.is_closing = True
            code = frame.get_close_code()  # 0 for none, which must not be sent
            transport.send_close(WSCloseCode.OK if code == WSCloseCode.NO_INFO else code)
            transport.disconnect()

    def _part(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type != WSMsgType.CONTINUATION:
            self._fragments.clear()
            self._text = frame.msg_type == WSMsgType.TEXT
        self._fragments += frame.get_payload_as_memoryview()
        if len(self._fragments) > MAX_MESSAGE_BYTES:
            transport.send_close(WSCloseCode.MESSAGE_TOO_BIG)
            transport.disconnect()
        elif frame.fin:
            body, self._fragments = bytes(self._fragments), bytearray()
            self._messages.receive(None if self._text else body)

    def pause_writing(self) -> None:
        self._messages.full(True)

    def resume_writing(self) -> None:
        self._messages.full(False)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._on_lost()


class WebSocket(asyncio.Protocol):
    """One upgrade from HTTP, made by uvicorn; picows takes the connection over once accepted."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        """Get ready; uvicorn calls ``connection_made`` and ``data_received`` at once."""
        self._config = config
        self._connections = server_state.connections
        self._tasks = server_state.tasks
        self._app_state = app_state
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages = Messages()
        self._accepted = False
        self._refusal: tuple[int, Iterable[tuple[bytes, bytes]]] | None = None
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._connections.add(self)  # type: ignore[arg-type]  # uvicorn lists its own only

    def data_received(self, data: bytes) -> None:
        """Take the upgrade request, which uvicorn hands over whole, and ask the application."""
        if self._events.qsize() or self._accepted:
            # A peer that sends frames before it was let in; nobody of ours does.
            self._transport.abort()
            return
        if len(data) > _MAX_REQUEST_BYTES:
            self._refuse_long(len(data))
            return
        self._request = data
        self._events.put_nowait({"type": "websocket.connect"})
        task = asyncio.get_running_loop().create_task(self._run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def connection_lost(self, error: Exception | None) -> None:
        """The peer left, before or after it was let in."""
        if self._lost:
            return
        self._lost = True
        self._connections.discard(self)
        self._events.put_nowait({"type": "websocket.disconnect", "code": 1005})

    def shutdown(self) -> None:
        """The server stops: see to it that the peer connects elsewhere."""
        if self._messages.transport is None:
            self._transport.close()
        else:
            self._messages.on_stop()

    def _end(self, code: WSCloseCode) -> None:
        """The application is done with the connection, or has failed on it."""
        transport = self._messages.transport
        if transport is None:
            self._transport.close()
        elif not transport.is_disconnected:
            transport.send_close(code)
            transport.disconnect()

    async def _run(self) -> None:
        code = WSCloseCode.SERVICE_RESTART  # where the task is cancelled
        try:
            await self._config.loaded_app(self._scope(), self._events.get, self._send)
            code = WSCloseCode.OK
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Its text and traceback may hold values of a message, so the log gets its type.
            logger.error("a stream failed: %s", type(error).__name__)
            code = WSCloseCode.INTERNAL_ERROR
        finally:
            self._end(code)

    def _scope(self) -> MutableMapping[str, Any]:
        head, _, rest = self._request.partition(b"\r\n")
        target = head.split(b" ")[1]
        path, _, query = target.partition(b"?")
        headers = [line.split(b": ", 1) for line in rest.split(b"\r\n") if line]
        root = self._config.root_path
        return {
            "type": "websocket",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws",
            "server": get_local_addr(self._transport),
            "client": get_remote_addr(self._transport),
            "root_path": root,
            "path": root + unquote(path.decode("ascii")),
            "raw_path": root.encode("ascii") + path,
            "query_string": query,
            "headers": [(name.lower(), value) for name, value in headers],
            "subprotocols": [],
            "state": self._app_state.copy(),
            "extensions": {"websocket.http.response": {}, EXTENSION: self._messages},
        }

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if self._lost:
            return
        if kind == "websocket.accept":
            self._accept()
        elif kind == "websocket.send":
            self._messages.send([message["bytes"]])
        elif kind == "websocket.http.response.start":
            self._refusal = (message["status"], message.get("headers", ()))
        elif kind == "websocket.http.response.body" and self._refusal is not None:
            self._refuse(*self._refusal, message.get("body", b""))
        elif kind == "websocket.close" and not self._accepted:
            self._refuse(403, (), b"")
        else:
            self._end(WSCloseCode.OK)

    def _accept(self) -> None:
        """Give the connection to picows, which answers the upgrade request itself."""
        self._accepted = True
        protocol = WSProtocol(
            None,  # host and path are the client's side's
            None,
            False,
            self._make_listener,
            _quiet,
            True,  # an exception in a handler closes the connection
            5.0,  # seconds for the handshake, which is complete already
            True,
            _PING_S,
            _PING_S,
            WSAutoPingStrategy.PING_WHEN_IDLE,
            True,
            MAX_MESSAGE_BYTES,
            None,
            16 << 10,
        )
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        buffer = protocol.get_buffer(len(self._request))
        buffer[: len(self._request)] = self._request
        protocol.buffer_updated(len(self._request))
        if self._messages.transport is None:
            # picows refused the handshake and hangs up. That was no connection to it, so it tells
            # its listener nothing.
            self.connection_lost(None)

    def _make_listener(self, request: WSUpgradeRequest) -> WSListener:
        return _Listener(self._messages, lambda: self.connection_lost(None))

    def _refuse_long(self, size: int) -> None:
        sentence = f"the upgrade request has {size} bytes, expected at most {_MAX_REQUEST_BYTES}"
        body = json.dumps({"error": sentence}).encode()
        length = (b"content-length", b"%d" % len(body))
        self._refuse(431, [(b"content-type", b"application/json"), length], body)

    def _refuse(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in headers]
        lines += [b"connection: close", b"", body]
        self._transport.write(b"\r\n".join(lines))
        self._transport.close()
