"""Closed-loop clients for each transport, as cheap as each allows: one message under way at a time.

WebSockets are picows', HTTP is a bare asyncio protocol with the parser of httptools, gRPC is
grpcio's own client, for which Python has no cheaper one.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools
import numpy as np
import psutil
import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks import accounting
from benchmarks.load import HEADERS
from benchmarks.prefixed import Unpacker, pack

OPEN_S = 30.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client sends its messages, and how.

    Attributes:
        kind: ``websocket``, ``post``, ``duplex`` or ``grpc``.
        url: the endpoint itself; for gRPC ``http://host:port/service/method``.
        headers: to be sent with each request, or metadata with each gRPC stream.
    """

    kind: str
    url: str
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))


@dataclass(slots=True)
class Meter:
    """The answers of all connections of a process.

    Attributes:
        least_bytes: the least that an answer has; an error has a few hundred.
        latencies_s: of each answer, from send to receipt, in seconds.
        broken: why the figures would mean nothing, in one sentence.
    """

    least_bytes: int
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    broken: str | None = None

    def answer(self, size: int, sent_s: float) -> None:
        """Count one answer of ``size`` bytes to a message that was sent at ``sent_s``."""
        if size < self.least_bytes:
            self.broken = f"an answer has {size} bytes, expected at least {self.least_bytes}"
        self.latencies_s.append(time.monotonic() - sent_s)


class Connection(Protocol):
    """One device: sends a message, and the next when its answer has come."""

    def begin(self) -> None:
        """Send the first message."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class Socket(WSListener):
    """A WebSocket."""

    def __init__(self, message: bytes, meter: Meter) -> None:
        self._message, self._meter = message, meter

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport

    def begin(self) -> None:
        """Send the next message."""
        self._sent_s = time.monotonic()
        self._transport.send(WSMsgType.BINARY, self._message)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY and frame.fin:
            self._meter.answer(frame.payload_size, self._sent_s)
            self.begin()
        elif frame.msg_type not in (WSMsgType.PING, WSMsgType.PONG):
            self._meter.broken = f"a frame of type {frame.msg_type} came, expected binary ones"
            transport.disconnect()

    def close(self) -> None:
        self._transport.disconnect()


def _head(endpoint: Endpoint, body: str) -> bytes:
    """Request line and headers of a POST."""
    parts = urlsplit(endpoint.url)
    lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", body]
    lines += [f"{name}: {value}" for name, value in endpoint.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


class _Http(asyncio.Protocol):
    """What a POST per message and a POST for all messages share."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._parser: Any = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._meter.broken = f"HTTP status is {status}, expected 200"

    def connection_lost(self, error: Exception | None) -> None:
        self._meter.broken = self._meter.broken or "the server closed a connection"

    def close(self) -> None:
        self._transport.close()


class Post(_Http):
    """One POST per message on a connection that is kept alive."""

    def __init__(self, endpoint: Endpoint, message: bytes, meter: Meter) -> None:
        super().__init__(meter)
        self._request = _head(endpoint, f"content-length: {len(message)}") + message
        self._size = 0

    def begin(self) -> None:
        """Send the next message."""
        self._sent_s = time.monotonic()
        self._transport.write(self._request)

    def on_body(self, body: bytes) -> None:
        self._size += len(body)

    def on_message_complete(self) -> None:
        self._meter.answer(self._size, self._sent_s)
        self._size = 0
        self.begin()


class Duplex(_Http):
    """One POST for good: both bodies are chunked, neither ends, messages carry their length."""

    def __init__(self, endpoint: Endpoint, message: bytes, meter: Meter) -> None:
        super().__init__(meter)
        self._head = _head(endpoint, "transfer-encoding: chunked")
        packed = pack(message)
        self._chunk = b"%x\r\n%b\r\n" % (len(packed), packed)
        self._unpacker = Unpacker()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._transport.write(self._head)

    def begin(self) -> None:
        """Send the next message."""
        self._sent_s = time.monotonic()
        self._transport.write(self._chunk)

    def on_body(self, body: bytes) -> None:
        for answer in self._unpacker.feed(body):
            self._meter.answer(len(answer), self._sent_s)
            self.begin()

    def on_message_complete(self) -> None:
        self._meter.broken = "the response ended, expected it to stay open"


class Grpc:
    """One bidirectional stream on a connection of its own."""

    def __init__(self, call: Any, message: bytes, meter: Meter) -> None:
        self._call, self._message, self._meter = call, message, meter

    def begin(self) -> None:
        """Start the task that sends and reads for good."""
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while True:
                sent_s = time.monotonic()
                await self._call.write(self._message)
                self._meter.answer(len(await self._call.read()), sent_s)
        except Exception as error:
            self._meter.broken = f"a gRPC stream ended: {error!r}"

    def close(self) -> None:
        self._task.cancel()


async def connect(endpoint: Endpoint, message: bytes, meter: Meter) -> Connection:
    """Connect one device."""
    parts = urlsplit(endpoint.url)
    if endpoint.kind == "websocket":
        socket = Socket(message, meter)
        await ws_connect(partial(_same, socket), endpoint.url, extra_headers=endpoint.headers)
        return socket
    if endpoint.kind == "grpc":
        import grpc.aio

        # Else all streams of a process share one connection.
        channel = grpc.aio.insecure_channel(
            parts.netloc, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        call = channel.stream_stream(parts.path)(metadata=tuple(endpoint.headers.items()))
        await call.wait_for_connection()
        return Grpc(call, message, meter)
    made: Post | Duplex = (Post if endpoint.kind == "post" else Duplex)(endpoint, message, meter)
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: made, str(parts.hostname), int(parts.port or 80))
    return made


def _same(socket: Socket) -> Socket:
    return socket


@dataclass(frozen=True, slots=True)
class Part:
    """What one client process saw; times in seconds."""

    latencies_s: array[float]
    seconds: float
    cpu_s: float


async def _run(
    barrier: Any,
    endpoint: Endpoint,
    message: bytes,
    least_bytes: int,
    connections: int,
    warm_s: float,
    run_s: float,
) -> Part:
    meter = Meter(least_bytes)
    async with asyncio.timeout(OPEN_S):
        opened = [await connect(endpoint, message, meter) for _ in range(connections)]
    await asyncio.to_thread(barrier.wait)
    for connection in opened:
        connection.begin()
    await asyncio.sleep(warm_s)
    first, cpu_s, start_s = len(meter.latencies_s), time.process_time(), time.monotonic()
    await asyncio.sleep(run_s)
    part = Part(meter.latencies_s[first:], time.monotonic() - start_s, time.process_time() - cpu_s)
    if meter.broken is not None:
        raise RuntimeError(meter.broken)
    for connection in opened:
        connection.close()
    return part


def _process(results: Any, barrier: Any, *arguments: Any) -> None:
    try:
        results.put(uvloop.run(_run(barrier, *arguments)))
    except Exception as error:
        results.put(repr(error))
        barrier.abort()


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time of one cluster's processes in seconds.

    Attributes:
        replica: of the replica that is loaded.
        haproxy: of HAProxy.
        ray: of all others but idle replicas: raylet, GCS, Serve's actors.
    """

    replica: float
    haproxy: float
    ray: float


def server_cpu(mark: str, loaded: int, idle: set[int]) -> Cpu:
    """CPU time so far of the cluster with that mark; replicas are given by process id."""
    found = {"replica": 0.0, "haproxy": 0.0, "ray": 0.0}
    for process in accounting.processes(mark):
        try:
            times, name = process.cpu_times(), process.name()
        except psutil.Error:
            continue
        used_s = times.user + times.system
        if process.pid == loaded:
            found["replica"] += used_s
        elif name == "haproxy":
            found["haproxy"] += used_s
        elif process.pid not in idle:
            found["ray"] += used_s
    return Cpu(**found)


@dataclass(frozen=True, slots=True)
class Run:
    """One transport under load.

    Attributes:
        messages: answers in the measured time.
        seconds: the measured time.
        server: the cluster's CPU time in it.
        client_cpu_s: that of the client processes.
        client_busiest: the busiest client process's share of one core.
        p50_s: median from send to answer, in seconds, at this load.
        p99_s: 99th percentile.
    """

    messages: int
    seconds: float
    server: Cpu
    client_cpu_s: float
    client_busiest: float
    p50_s: float
    p99_s: float

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds

    def us(self, cpu_s: float) -> float:
        """Microseconds per message."""
        return cpu_s / max(1, self.messages) * 1e6


def load(
    endpoint: Endpoint,
    message: bytes,
    *,
    connections: int,
    processes: int,
    warm_s: float,
    run_s: float,
    mark: str,
    loaded: int,
    idle: set[int],
    least_share: float = 0.5,
) -> Run:
    """Load ``endpoint`` and say what came of it.

    Args:
        endpoint: where to send.
        message: one encoded request, sent again and again.
        connections: over all processes.
        processes: client processes.
        warm_s: not measured, in seconds.
        run_s: measured, in seconds.
        mark: the cluster whose processes are counted.
        loaded: process id of the replica behind the endpoint.
        idle: process ids of the other replicas.
        least_share: the least an answer must have of the request's size; less is an error.

    Raises:
        RuntimeError: a client failed, or an answer was none.
    """
    spawn = multiprocessing.get_context("spawn")
    results, barrier = spawn.Queue(), spawn.Barrier(processes + 1)
    least_bytes = int(least_share * len(message))
    arguments = (endpoint, message, least_bytes, connections // processes, warm_s, run_s)
    workers = [
        spawn.Process(target=_process, args=(results, barrier, *arguments), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        barrier.wait(OPEN_S + 30)
        time.sleep(warm_s)
        before = server_cpu(mark, loaded, idle)
        time.sleep(run_s)
        after = server_cpu(mark, loaded, idle)
        parts = [results.get(timeout=60) for _ in workers]
    except Exception as error:
        parts = [repr(error)]
        while not results.empty():
            parts.append(results.get())
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
    if failures := [part for part in parts if isinstance(part, str)]:
        raise RuntimeError(f"clients of {endpoint.url} failed: {'; '.join(failures)}")
    latencies_s = np.concatenate([part.latencies_s for part in parts])
    return Run(
        messages=len(latencies_s),
        seconds=max(part.seconds for part in parts),
        server=Cpu(
            after.replica - before.replica, after.haproxy - before.haproxy, after.ray - before.ray
        ),
        client_cpu_s=sum(part.cpu_s for part in parts),
        client_busiest=max(part.cpu_s / part.seconds for part in parts),
        p50_s=float(np.quantile(latencies_s, 0.5)),
        p99_s=float(np.quantile(latencies_s, 0.99)),
    )
