"""The same echo behind every transport that Serve lets in: only the way of the bytes differs.

Codec, protocol, batcher and engine are the product's. Its ``Protocol`` takes a WebSocket whose
messages come and go without awaiting; what needs awaiting (uvicorn's own WebSockets, a body in
chunks, a gRPC stream) is put behind that by :func:`exchange`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import uvicorn.config

from benchmarks.prefixed import Unpacker, pack
from deployments.backbone import Backbone
from deployments.config import Config
from deployments.protocol import Message, Protocol, Receive, Scope, Send
from deployments.websocket import EXTENSION, Messages

STREAM_PATH = "/v2/models/echo/stream"
DUPLEX_PATH = "/duplex"
SERVICE, METHOD = "datamix.Transports", "Exchange"
# Application -> which of uvicorn's WebSocket classes its replica uses; None for the product's own.
APPLICATIONS: dict[str, str | None] = {
    "picows": None,
    "websockets": "websockets",
    "sansio": "websockets-sansio",
    "wsproto": "wsproto",
}


class Outbox(Messages):
    """Messages of a connection that is written to by awaiting, in a task of its own."""

    def __init__(self) -> None:
        """Nothing waits."""
        super().__init__()
        self._waiting: deque[bytes] = deque()
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def send(self, parts: list[Any]) -> int:
        """Leave one message for the writer."""
        message = b"".join(parts)
        self._waiting.append(message)
        self._something.set()
        return len(message)

    def hold(self, held: bool) -> None:
        """Let the reader wait, or go on."""
        if held:
            self._room.clear()
        else:
            self._room.set()

    async def room(self) -> None:
        """Wait while the application does not want more."""
        if not self._room.is_set():
            await self._room.wait()

    async def messages(self) -> AsyncGenerator[bytes]:
        """What is to be written, as it comes; endless."""
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            self._something.clear()
            await self._something.wait()


async def exchange(protocol: Protocol, incoming: AsyncIterator[bytes], outbox: Outbox) -> None:
    """Run one of the product's streams until ``incoming`` ends; answers go into ``outbox``."""
    scope = {"type": "websocket", "path": STREAM_PATH, "extensions": {EXTENSION: outbox}}
    connected = False

    async def receive() -> Message:
        nonlocal connected
        if not connected:
            connected = True
            return {"type": "websocket.connect"}
        async for body in incoming:
            outbox.on_message(body)
            await outbox.room()
        return {"type": "websocket.disconnect", "code": 1005}

    async def send(event: Message) -> None:
        if event["type"] != "websocket.accept":
            raise RuntimeError(f"the stream was answered by {event!r}, expected to be accepted")

    await protocol(scope, receive, send)


@contextlib.asynccontextmanager
async def writing(outbox: Outbox, write: Callable[[bytes], Awaitable[None]]) -> AsyncIterator[None]:
    """Write what comes into ``outbox`` meanwhile."""

    async def work() -> None:
        async for message in outbox.messages():
            await write(message)

    writer = asyncio.create_task(work())
    try:
        yield
    finally:
        writer.cancel()
        # A peer that left makes the writer fail; that is not worth a word.
        await asyncio.gather(writer, return_exceptions=True)


class App:
    """ASGI: the product's protocol, and its streams over other WebSockets and over one POST."""

    def __init__(self, protocol: Protocol) -> None:
        """Serve ``protocol``."""
        self._protocol = protocol

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Dispatch one connection or request."""
        if scope["type"] != "lifespan":
            # Serve leaves the route's prefix in the path; the product is deployed at the root.
            scope = {**scope, "path": scope["path"].removeprefix(scope.get("root_path", ""))}
        if scope["type"] == "websocket" and EXTENSION not in scope["extensions"]:
            await self._websocket(receive, send)
        elif scope["type"] == "http" and scope["path"] == DUPLEX_PATH:
            await self._duplex(receive, send)
        else:
            await self._protocol(scope, receive, send)

    async def _websocket(self, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})

        async def incoming() -> AsyncIterator[bytes]:
            while (event := await receive())["type"] == "websocket.receive":
                yield event["bytes"]

        async def write(message: bytes) -> None:
            await send({"type": "websocket.send", "bytes": message})

        outbox = Outbox()
        async with writing(outbox, write):
            await exchange(self._protocol, incoming(), outbox)

    async def _duplex(self, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def incoming() -> AsyncIterator[bytes]:
            unpacker = Unpacker()
            while (event := await receive())["type"] == "http.request":
                for message in unpacker.feed(event["body"]):
                    yield message
                if not event["more_body"]:
                    return

        async def write(message: bytes) -> None:
            await send({"type": "http.response.body", "body": pack(message), "more_body": True})

        outbox = Outbox()
        async with writing(outbox, write):
            await exchange(self._protocol, incoming(), outbox)
        await send({"type": "http.response.body", "body": b""})


class Raw(NamedTuple):
    """Bytes that Serve takes for a protobuf message: no second codec around the first."""

    data: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802 (protobuf's name)
        """The bytes."""
        return self.data


class Replica(Backbone):
    """The product's replica with the other ways in."""

    def __init__(self, config: Config, sockets: str | None) -> None:
        """Use uvicorn's WebSocket class ``sockets``; None for the product's."""
        super().__init__(config)
        if sockets is not None:  # the server starts after the constructor
            uvicorn.config.WS_PROTOCOLS["auto"] = uvicorn.config.WS_PROTOCOLS[sockets]
        self._protocol = Protocol(self)

    def __serve_build_asgi_app__(self) -> App:  # type: ignore[override]
        """Give Ray Serve the ASGI application."""
        return App(self._protocol)

    async def Exchange(self, requests: AsyncIterator[bytes]) -> AsyncGenerator[Raw]:  # noqa: N802
        """The gRPC method: a bidirectional stream of encoded messages."""
        outbox = Outbox()
        reader = asyncio.create_task(exchange(self._protocol, requests, outbox))
        try:
            async for message in outbox.messages():
                yield Raw(message)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


def add_servicer(servicer: Any, server: Any) -> None:
    """Register the gRPC method, as generated code would; requests stay bytes."""
    import grpc

    handler = grpc.stream_stream_rpc_method_handler(getattr(servicer, METHOD))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
    )


def deploy(config: Config, names: list[str], port: int, grpc_port: int) -> None:
    """Deploy the named applications, each at ``/NAME``, on the Ray that is connected to."""
    from ray import serve

    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        grpc_options={
            "port": grpc_port,
            "grpc_servicer_functions": [f"{__name__}:add_servicer"],
            "enable_reflection": False,
        },
    )
    for name in names:
        deployment = serve.deployment(
            name="Replica", max_ongoing_requests=100_000, graceful_shutdown_timeout_s=5
        )
        application = deployment(serve.ingress()(Replica)).bind(config, APPLICATIONS[name])
        serve.run(application, name=name, route_prefix=f"/{name}")


def grpc_ports(first: int, count: int) -> dict[str, str]:
    """Ray's settings for ports of our own, beside those that :mod:`cluster.local` chooses."""
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + count - 1),
    }
