"""A cloud for the fleet's tests: speaks the wire, echoes rows, and misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from picows import (
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

from datamix import wire

SHAPE = (2, 3, 3)


def echo(request: wire.Request, **changes: Any) -> bytes:
    """The right answer, or one with ``changes``."""
    fields: dict[str, Any] = {
        "dtype": request.dtype,
        "request_id": request.request_id,
        "model": "echo",
        "model_version": "1",
        "block": request.block,
        "queue_s": 0.001,
        "compute_s": 0.002,
        "batch_rows": 2 * request.rows,
        "close_reason": "engine_free",
    }
    features = changes.pop("features", request.features)
    return wire.encode_response(features, **(fields | changes))


@dataclass
class Connection:
    """What a behaviour sees of the stream a request came by."""

    cloud: FakeCloud
    transport: WSTransport

    def send(self, message: bytes) -> None:
        if not self.transport.is_disconnected:
            self.transport.send(WSMsgType.BINARY, message)

    def drop(self) -> None:
        self.transport.disconnect(graceful=False)

    def later(self, delay_s: float, message: bytes) -> None:
        asyncio.get_running_loop().call_later(delay_s, self.send, message)


Behaviour = Callable[[Connection, wire.Request], None]


def polite(connection: Connection, request: wire.Request) -> None:
    connection.send(echo(request))


class _Stream(WSListener):
    def __init__(self, cloud: FakeCloud) -> None:
        self._cloud = cloud

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._connection = Connection(self._cloud, transport)
        self._cloud.streams += 1
        self._cloud.open.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._cloud.open.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()
            return
        if frame.msg_type != WSMsgType.BINARY:  # a pong
            return
        request = wire.decode_request(frame.get_payload_as_bytes())
        self._cloud.requests += 1
        self._cloud.rows += request.rows
        self._cloud.behaviour(self._connection, request)


@dataclass
class FakeCloud:
    """One server in this event loop; use :func:`running` for one in a thread."""

    behaviour: Behaviour = polite
    engine: str = "null"
    shapes: tuple[tuple[int, ...], ...] = (SHAPE,)
    streams: int = 0
    requests: int = 0
    rows: int = 0
    url: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    open: set[WSTransport] = field(default_factory=set)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[asyncio.Server]:
        """Serve in this event loop."""
        server = await ws_create_server(self._route, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield server
        finally:
            server.close()
            for transport in list(self.open):
                transport.disconnect(graceful=False)
            while self.open:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.001)

    def _route(self, request: WSUpgradeRequest) -> Any:
        path = request.path.decode()
        if path == "/v2/models/echo/stream":
            return _Stream(self)
        blocks = [{"input_shape": shape, "output_shape": shape} for shape in self.shapes]
        answers: dict[str, dict[str, Any]] = {
            "/v2/models/echo": {"parameters": {"engine": self.engine, "blocks": blocks}},
            "/v2/stats": {
                "replica": "one",
                "model": "echo",
                "engine_busy_s": time.monotonic() / 4,
                "uptime_s": time.monotonic(),
                "batches": self.requests,
                "rows": self.rows,
            },
        }
        if path not in answers:
            return None
        body = json.dumps(answers[path]).encode()
        return WSUpgradeResponseWithListener(WSUpgradeResponse.create_ok_response(body), None)


@contextmanager
def running(cloud: FakeCloud) -> Iterator[FakeCloud]:
    """Serve ``cloud`` from a thread, for fleets in other processes."""
    started, leave = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with cloud.serve():
            started.set()
            await leave.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        assert started.wait(10)
        yield cloud
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join(10)
        loop.close()
