"""The real replica behind a real HTTP server on a free port of this machine, without Ray."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry
from websockets.asyncio.client import ClientConnection, connect

from datamix import wire
from deployments.backbone import Backbone
from deployments.config import Config
from deployments.engine import Array, Pending, Rows
from deployments.metrics import PrometheusBackend
from deployments.model import ServedModel
from deployments.peers import NoPeers
from deployments.protocol import Protocol
from deployments.store import MemoryStore, Store
from deployments.waiting import Job

SHAPE = (2, 3, 3)
PATIENCE_S = 10.0  # for what must happen at once; only a failing test waits so long


def first(backbone: Backbone) -> ServedModel:
    """The current version of the first model of a replica; most tests have no other."""
    return backbone.catalog.current[0]


class Gate:
    """Stands before a backbone's engine; closed, it stops each batch until it is opened."""

    def __init__(self, backbone: Backbone) -> None:
        self._start = first(backbone).engine.start
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[Array]] = []
        self.fails_on: float | None = None
        first(backbone).engine.start = self.start  # type: ignore[method-assign]

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        self.batches.append([request.features for request in requests])
        self.entered.release()
        if not self._open.wait(PATIENCE_S):
            raise RuntimeError("the test did not open the gate")
        if any((request.features == self.fails_on).any() for request in requests):
            raise RuntimeError(f"secret {requests[0].features} in /some/path")
        return self._start(block, requests)

    def close(self) -> None:
        self._open.clear()
        while self.entered.acquire(blocking=False):
            pass  # batches before this moment do not count

    def open(self) -> None:
        self._open.set()

    async def batch(self) -> None:
        """Wait until the engine was given one more batch since :meth:`close`."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.entered.acquire(blocking=False):
                await asyncio.sleep(0.001)


@dataclass
class Cloud:
    """A running replica.

    Attributes:
        backbone: the replica itself.
        gate: stops its engine.
        registry: where its metrics go.
        ends: has one entry for each time it wanted to end its process.
        port: where it listens.
        host: of that, an address of the loopback interface.
    """

    backbone: Backbone
    gate: Gate
    registry: CollectorRegistry
    app: Protocol
    ends: list[str] = field(default_factory=list)
    port: int = 0
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def queued(self) -> list[Job]:
        """The requests that wait for the engine."""
        return list(self.model.batcher._queue)

    @property
    def model(self) -> ServedModel:
        """The current version of its first model."""
        return first(self.backbone)

    @property
    def outcomes(self) -> Counter[str]:
        """Requests answered, by outcome, whether or not a model was found for them."""
        counts = Counter(self.backbone.traffic.astray)
        for model in self.backbone.catalog:
            counts.update(model.outcomes)
        return counts

    async def until_queued(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.queued) < count:
                await asyncio.sleep(0.001)

    @asynccontextmanager
    async def stream(self, path: str = "/v2/models/echo/stream") -> AsyncIterator[ClientConnection]:
        url = f"ws://{self.host}:{self.port}{path}"
        async with connect(url, compression=None, max_size=None, proxy=None) as socket:
            yield socket


@asynccontextmanager
async def replica(config: Config, store: Store | None = None) -> AsyncIterator[Cloud]:
    """A replica without a server; for tests that call the ASGI application themselves."""
    registry, ends = CollectorRegistry(), list[str]()
    backbone = Backbone(
        config,
        PrometheusBackend(registry),
        store or MemoryStore(),
        NoPeers(),
        lambda: ends.append("end"),
    )
    gate = Gate(backbone)
    app = backbone.__serve_build_asgi_app__()
    try:
        yield Cloud(backbone, gate, registry, app, ends)
    finally:
        gate.open()
        await backbone.close()


@asynccontextmanager
async def serving(
    config: Config, store: Store | None = None, *, host: str = "127.0.0.1"
) -> AsyncIterator[Cloud]:
    """A replica behind uvicorn."""
    async with replica(config, store) as cloud:
        settings = uvicorn.Config(
            cloud.app,
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        settings.load()
        server = uvicorn.Server(settings)
        server.lifespan = settings.lifespan_class(settings)
        # With its protocol named, asyncio switches Nagle's algorithm off, as uvloop always does.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind((host, 0))
        cloud.host = host
        cloud.port = listener.getsockname()[1]
        await server.startup(sockets=[listener])
        try:
            yield cloud
        finally:
            cloud.gate.open()
            await server.shutdown(sockets=[listener])


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json()["error"])


@dataclass
class HttpPeer:
    """One HTTP connection, of which a test sees and says every byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    headers: dict[str, str] = field(default_factory=dict)

    async def post(
        self,
        body: bytes,
        *,
        path: str = "/v2/models/echo/infer",
        media: str = wire.MEDIA_TYPE,
        chunked: bool = False,
    ) -> Reply:
        await self.start(body, path=path, media=media, chunked=chunked)
        return await self.reply()

    async def start(
        self,
        body: bytes,
        *,
        path: str = "/v2/models/echo/infer",
        media: str = wire.MEDIA_TYPE,
        chunked: bool = False,
    ) -> None:
        """Send a request; do not wait for the reply."""
        length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
        lines = [f"POST {path} HTTP/1.1", "host: x", f"content-type: {media}", length]
        head = "\r\n".join([*lines, *self._headers(), "", ""])
        if chunked:
            pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            body += b"0\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    async def request(self, method: str, path: str) -> Reply:
        lines = [f"{method} {path} HTTP/1.1", "host: x", *self._headers(), "", ""]
        self.writer.write("\r\n".join(lines).encode())
        return await self.reply()

    async def get(self, path: str) -> Reply:
        return await self.request("GET", path)

    def _headers(self) -> list[str]:
        return [f"{key}: {value}" for key, value in self.headers.items()]

    async def reply(self) -> Reply:
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines)}
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Reply(int(first.split()[1]), headers, body)


@asynccontextmanager
async def http(cloud: Cloud) -> AsyncIterator[HttpPeer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", cloud.port)
    try:
        yield HttpPeer(reader, writer)
    finally:
        writer.close()


async def ask(stream: ClientConnection, message: bytes) -> wire.Response:
    """Send one message on a stream and read one answer."""
    await stream.send(message)
    return await answer(stream)


async def answer(stream: ClientConnection) -> wire.Response:
    async with asyncio.timeout(PATIENCE_S):
        body = await stream.recv()
    assert isinstance(body, bytes)
    return wire.decode_response(body)


def rows_of(seed: int, rows: int = 2, shape: tuple[int, ...] = SHAPE) -> Array:
    """Mixtures no other seed gives: (rows, *shape) float16."""
    return np.random.default_rng(seed).normal(size=(rows, *shape)).astype(np.float16)


def message_of(seed: int, rows: int = 2, **fields: Any) -> bytes:
    """A good request, with id ``r<seed>``, for an echo backbone."""
    return wire.encode_request(rows_of(seed, rows), **({"request_id": f"r{seed}"} | fields))


def assert_echoes(response: wire.Response, seed: int, rows: int = 2) -> None:
    """``response`` is the right answer to ``message_of(seed, rows)``, bit for bit."""
    assert (response.status, response.error) == (200, None)
    assert response.request_id == f"r{seed}"
    assert response.features.dtype == np.float16
    assert response.features.tobytes() == rows_of(seed, rows).tobytes()
