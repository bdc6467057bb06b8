"""Closed-loop clients for benchmarks: as cheap as they can be, so that the server is what is seen.

Each stream keeps ``depth`` messages under way and sends the next when an answer comes. Latency is
from send to answer and means little in a closed loop; the open-loop figures come from the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import queue
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import nan
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks import accounting
from benchmarks.unary import Connection, build_request
from datamix.limits import raise_descriptor_limit

HEADERS = {"x-request-disconnect-disabled": "?1"}


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of clients saw.

    Attributes:
        messages: answers received in the measured time.
        seconds: the measured time.
        client_cpu_s: CPU time of all client processes in it.
        client_busiest: the busiest client process's share of one core.
        server_parts_s: CPU time in it by kind of server process; empty where no server was named.
        bytes_each: bytes of one request.
        p50_s: median latency in seconds. The loop is closed: it says how long the server's queue
            of these clients is, not how it does under a given rate.
        p99_s: 99th percentile.
    """

    messages: int
    seconds: float
    client_cpu_s: float
    client_busiest: float
    server_parts_s: dict[str, float]
    bytes_each: int
    p50_s: float
    p99_s: float

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds

    @property
    def server_us(self) -> float:
        """Server CPU time per message in microseconds, over all server processes."""
        return sum(self.server_parts_s.values()) / max(1, self.messages) * 1e6

    @property
    def client_us(self) -> float:
        """Client CPU time per message in microseconds."""
        return self.client_cpu_s / max(1, self.messages) * 1e6


@dataclass(frozen=True, slots=True)
class Task:
    """What one client process is to do: see :func:`run`."""

    kind: str
    url: str
    message: bytes
    connections: int
    depth: int
    warm_s: float
    run_s: float
    least_bytes: int
    headers: dict[str, str]
    hundredth: bytes = b""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one client process saw; latencies_s is (messages,) float32."""

    messages: int
    seconds: float
    cpu_s: float
    latencies_s: npt.NDArray[np.float32]


class _Client(Protocol):
    """One connection that sends again as soon as it is answered."""

    count: int
    latencies_s: list[float]
    fault: str | None

    def begin(self) -> None:
        """Send the first message."""


class _Stream(WSListener):
    def __init__(
        self, message: bytes, depth: int, least_bytes: int, hundredth: bytes = b""
    ) -> None:
        self.hundredth = hundredth or message
        self.message, self.depth, self.least_bytes = message, depth, least_bytes
        self.count = 0
        self.latencies_s: list[float] = []
        self.fault: str | None = None
        # When the messages under way were sent; all are alike, so the oldest is answered first.
        self.sent: deque[float] = deque()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.fault = self.fault or "the stream was closed"

    # A large message may fill the socket; the next one waits for an answer anyway.
    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def begin(self) -> None:
        for _ in range(self.depth):
            self.sent.append(time.monotonic())
            self.transport.send(WSMsgType.BINARY, self.message)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY and frame.fin:
            # An error is a few hundred bytes; an answer is about as large as its request.
            if frame.payload_size < self.least_bytes:
                self.fault = (
                    f"an answer has {frame.payload_size} bytes, expected {self.least_bytes}"
                )
            self.count += 1
            now = time.monotonic()
            self.latencies_s.append(now - self.sent.popleft())
            self.sent.append(now)
            message = self.message if self.count % 100 else self.hundredth
            transport.send(WSMsgType.BINARY, message)
        elif frame.msg_type not in (WSMsgType.PING, WSMsgType.PONG):
            self.fault = f"a frame is of type {frame.msg_type}, expected one whole binary message"
            transport.disconnect()


def _same(client: Any) -> Any:
    return client


async def _connect(task: Task) -> list[_Client]:
    """Open all connections of one process."""
    clients: list[_Client] = []
    request = build_request(task.url, task.message, task.headers)
    parts = urlsplit(task.url)
    host, port = str(parts.hostname), int(parts.port or 80)
    for _ in range(task.connections):
        if task.kind == "stream":
            stream = _Stream(task.message, task.depth, task.least_bytes, task.hundredth)
            await ws_connect(partial(_same, stream), task.url, extra_headers=HEADERS)
            clients.append(stream)
        else:
            connection = Connection(request, task.least_bytes)
            await asyncio.get_running_loop().create_connection(
                partial(_same, connection), host, port
            )
            clients.append(connection)
    return clients


async def _load(task: Task, barrier: Any) -> _Part:
    clients = await _connect(task)
    await asyncio.to_thread(barrier.wait)
    for client in clients:
        client.begin()
    await asyncio.sleep(task.warm_s)
    # Thousands of first messages take a while to write: the server's clock starts with ours.
    await asyncio.to_thread(barrier.wait)
    for client in clients:
        client.latencies_s.clear()
    first, cpu, start = sum(c.count for c in clients), time.process_time(), time.monotonic()
    await asyncio.sleep(task.run_s)
    messages = sum(c.count for c in clients) - first
    seconds, cpu_s = time.monotonic() - start, time.process_time() - cpu
    if faults := [client.fault for client in clients if client.fault]:
        raise RuntimeError(f"{len(faults)} connections failed, the first because {faults[0]}")
    latencies_s = np.fromiter(chain.from_iterable(c.latencies_s for c in clients), np.float32)
    return _Part(messages, seconds, cpu_s, latencies_s)


def _process(task: Task, results: Any, barrier: Any) -> None:
    raise_descriptor_limit()
    try:
        results.put(uvloop.run(_load(task, barrier)))
    except Exception as error:
        results.put(repr(error))
        barrier.abort()
    results.close()
    results.join_thread()
    # A server that is slow to close must not keep the process.
    os._exit(0)


def run(
    kind: str,
    url: str,
    message: bytes,
    *,
    connections: int,
    depth: int = 1,
    processes: int = 1,
    warm_s: float = 1.0,
    run_s: float = 5.0,
    mark: str = "",
    headers: dict[str, str] | None = None,
    least_share: float = 0.5,
    hundredth: bytes = b"",
) -> Load:
    """Load ``url`` and say what came of it.

    Args:
        kind: ``stream`` for WebSocket, ``post`` for HTTP.
        url: the endpoint itself.
        message: one encoded request, sent again and again.
        connections: over all processes.
        depth: messages under way per stream; a post has one.
        processes: client processes.
        warm_s: not measured, in seconds.
        run_s: measured, in seconds.
        mark: the server whose processes are to be counted.
        headers: for ``post``.
        least_share: the least an answer must have of the request's size; less is an error.
        hundredth: of a stream, another message for each hundredth.
    """
    spawn = multiprocessing.get_context("spawn")
    results, barrier = spawn.Queue(), spawn.Barrier(processes + 1)
    task = Task(
        kind, url, message, connections // processes, depth, warm_s, run_s,
        int(least_share * len(message)), headers or {},
        hundredth,
    )  # fmt: skip
    workers = [
        spawn.Process(target=_process, args=(task, results, barrier), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        barrier.wait(120)
        barrier.wait(120 + warm_s)
        before = accounting.snapshot(mark) if mark else {}
        time.sleep(run_s)
        after = accounting.snapshot(mark) if mark else {}
        parts = [results.get(timeout=60) for _ in workers]
    except Exception as error:
        failures = []
        with contextlib.suppress(queue.Empty):
            while True:
                failures.append(results.get(timeout=1))
        raise RuntimeError(f"clients failed: {failures or error!r}") from error
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
    if failures := [part for part in parts if isinstance(part, str)]:
        raise RuntimeError(f"clients failed: {failures}")
    latencies_s = np.concatenate([part.latencies_s for part in parts])
    p50_s, p99_s = np.quantile(latencies_s, (0.5, 0.99)) if len(latencies_s) else (nan, nan)
    return Load(
        messages=sum(p.messages for p in parts),
        seconds=max(p.seconds for p in parts),
        client_cpu_s=sum(p.cpu_s for p in parts),
        client_busiest=max(p.cpu_s / p.seconds for p in parts),
        server_parts_s=accounting.spent_s(before, after),
        bytes_each=len(message),
        p50_s=float(p50_s),
        p99_s=float(p99_s),
    )


@dataclass(frozen=True, slots=True)
class Open:
    """What an open-loop run of single posts saw; latency counts from the scheduled send.

    Attributes:
        offered: requests that fell due per second.
        answered: requests answered within the time they fell due in, per second.
        p50_s: median latency in seconds.
        p99_s: 99th percentile.
        failed: answers that were errors, and requests without an answer 10 s after the end.
        lag_p99_s: how late the client itself was, 99th percentile.
    """

    offered: float
    answered: float
    p50_s: float
    p99_s: float
    failed: int
    lag_p99_s: float


async def _open_posts(
    url: str, message: bytes, times: list[float], headers: dict[str, str]
) -> Open:
    import aiohttp

    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    lags: list[float] = []
    done_at: list[float] = []
    failed = 0

    async def one(session: aiohttp.ClientSession, due: float) -> None:
        nonlocal failed
        lags.append(loop.time() - due)
        try:
            async with session.post(url, data=message, headers=headers) as reply:
                body = await reply.read()
                if reply.status != 200 or len(body) < len(message) // 2:
                    failed += 1
                    return
        except aiohttp.ClientError:
            failed += 1
            return
        latencies.append(loop.time() - due)
        done_at.append(loop.time())

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        start = loop.time() + 0.1
        tasks = []
        for offset in times:
            if (wait := start + offset - loop.time()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(session, start + offset)))
        _, pending = await asyncio.wait(tasks, timeout=10)
        failed += len(pending)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    span = times[-1]
    # A request that never came back waited at least until the end: it must not look fast.
    latencies += [10.0] * failed
    return Open(
        offered=len(times) / span,
        answered=sum(at <= start + span for at in done_at) / span,
        p50_s=float(np.quantile(latencies, 0.5)),
        p99_s=float(np.quantile(latencies, 0.99)),
        failed=failed,
        lag_p99_s=float(np.quantile(lags, 0.99)),
    )


def _open_process(results: Any, *arguments: Any) -> None:
    results.put(uvloop.run(_open_posts(*arguments)))


def open_posts(
    url: str, message: bytes, *, rate: float, seconds: float, seed: int, headers: dict[str, str]
) -> Open:
    """Post ``message`` at Poisson times, ``rate`` per second, from a process of its own."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 2))
    times = [float(t) for t in np.cumsum(gaps) if t < seconds]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    worker = spawn.Process(
        target=_open_process, args=(results, url, message, times, headers), daemon=True
    )
    worker.start()
    try:
        found: Open = results.get(timeout=seconds + 60)
    finally:
        worker.join(5)
        if worker.is_alive():
            worker.kill()
    return found
