"""Closed-loop clients for benchmarks: as cheap as they can be, so that the server is what is seen.

Each stream keeps ``depth`` messages under way and sends the next when an answer comes. Latency is
from send to answer and means little in a closed loop; the open-loop figures come from the fleet.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

HEADERS = {"x-request-disconnect-disabled": "?1"}
CLUSTER_MARK = "DATAMIX_BENCHMARK_CLUSTER"


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of clients saw.

    Attributes:
        messages: answers received in the measured time.
        seconds: the measured time.
        client_cpu_s: CPU time of all client processes in it.
        client_busiest: the busiest client process's share of one core.
        server_cpu_s: CPU time of all server processes in it, or 0 where none were named.
        bytes_each: bytes of one request.
    """

    messages: int
    seconds: float
    client_cpu_s: float
    client_busiest: float
    server_cpu_s: float
    bytes_each: int

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds

    @property
    def server_us(self) -> float:
        """Server CPU time per message in microseconds."""
        return self.server_cpu_s / max(1, self.messages) * 1e6

    @property
    def client_us(self) -> float:
        """Client CPU time per message in microseconds."""
        return self.client_cpu_s / max(1, self.messages) * 1e6


class _Stream(WSListener):
    def __init__(self, message: bytes, depth: int, least_bytes: int) -> None:
        self.message, self.depth, self.least_bytes = message, depth, least_bytes
        self.count = 0
        self.broken = False

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def begin(self) -> None:
        for _ in range(self.depth):
            self.transport.send(WSMsgType.BINARY, self.message)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY and frame.fin:
            # An error is a few hundred bytes; an answer is about as large as its request.
            if frame.payload_size < self.least_bytes:
                self.broken = True
            self.count += 1
            transport.send(WSMsgType.BINARY, self.message)
        elif frame.msg_type not in (WSMsgType.PING, WSMsgType.PONG):
            self.broken = True
            transport.disconnect()


def _same(listener: _Stream) -> _Stream:
    return listener


async def _streams(
    url: str,
    message: bytes,
    streams: int,
    depth: int,
    warm_s: float,
    run_s: float,
    least_bytes: int,
    barrier: Any,
) -> tuple[int, float, float]:
    listeners = [_Stream(message, depth, least_bytes) for _ in range(streams)]
    for listener in listeners:
        await ws_connect(partial(_same, listener), url, extra_headers=HEADERS)
    await asyncio.to_thread(barrier.wait)
    for listener in listeners:
        listener.begin()
    await asyncio.sleep(warm_s)
    return await _measure(
        lambda: sum(x.count for x in listeners), run_s, lambda: any(x.broken for x in listeners)
    )


async def _posts(
    url: str,
    message: bytes,
    connections: int,
    warm_s: float,
    run_s: float,
    headers: dict[str, str],
    barrier: Any,
) -> tuple[int, float, float]:
    import aiohttp

    count, broken = 0, False

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal count, broken
        while True:
            async with session.post(url, data=message, headers=headers) as reply:
                body = await reply.read()
                broken = broken or reply.status != 200 or len(body) < len(message) // 2
                count += 1

    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.to_thread(barrier.wait)
        tasks = [asyncio.create_task(one(session)) for _ in range(connections)]
        await asyncio.sleep(warm_s)
        result = await _measure(lambda: count, run_s, lambda: broken)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return result


async def _measure(
    count: Callable[[], int], run_s: float, broken: Callable[[], bool]
) -> tuple[int, float, float]:
    first, cpu, start = count(), time.process_time(), time.monotonic()
    await asyncio.sleep(run_s)
    messages, elapsed = count() - first, time.monotonic() - start
    if broken():
        raise RuntimeError("an answer was an error or too short: the figures would mean nothing")
    return messages, elapsed, time.process_time() - cpu


def _process(kind: str, arguments: tuple[Any, ...], results: Any, barrier: Any) -> None:
    work: Any = _streams if kind == "stream" else _posts
    try:
        results.put(uvloop.run(work(*arguments, barrier=barrier)))
    except Exception as error:
        results.put(repr(error))
        barrier.abort()


def server_cpu_s(mark: str) -> float:
    """CPU time so far of every process whose environment carries the cluster's mark."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if process.environ().get(CLUSTER_MARK) == mark:
                times = process.cpu_times()
                total += times.user + times.system
        except (psutil.Error, OSError):
            continue
    return total


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
) -> Load:
    """Load ``url`` and say what came of it.

    Args:
        kind: ``stream`` for WebSocket, ``post`` for HTTP.
        url: the endpoint itself.
        message: one encoded request, sent again and again.
        connections: over all processes.
        depth: messages under way per stream.
        processes: client processes.
        warm_s: not measured, in seconds.
        run_s: measured, in seconds.
        mark: the cluster whose server processes are to be counted.
        headers: for ``post``.
        least_share: the least an answer must have of the request's size; less is an error.
    """
    spawn = multiprocessing.get_context("spawn")
    results, barrier = spawn.Queue(), spawn.Barrier(processes + 1)
    each = connections // processes
    arguments: tuple[Any, ...] = (
        url,
        message,
        each,
        depth,
        warm_s,
        run_s,
        int(least_share * len(message)),
    )
    if kind == "post":
        arguments = (url, message, each, warm_s, run_s, headers or {})
    workers = [
        spawn.Process(target=_process, args=(kind, arguments, results, barrier), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        barrier.wait(60)
        time.sleep(warm_s)
        before = server_cpu_s(mark) if mark else 0.0
        time.sleep(run_s)
        after = server_cpu_s(mark) if mark else 0.0
        parts = [results.get(timeout=60) for _ in workers]
    except Exception as error:
        failures = []
        while not results.empty():
            failures.append(results.get())
        raise RuntimeError(f"clients failed: {failures or error!r}") from error
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
    if failures := [part for part in parts if isinstance(part, str)]:
        raise RuntimeError(f"clients failed: {failures}")
    return Load(
        messages=sum(p[0] for p in parts),
        seconds=max(p[1] for p in parts),
        client_cpu_s=sum(p[2] for p in parts),
        client_busiest=max(p[2] / p[1] for p in parts),
        server_cpu_s=after - before,
        bytes_each=len(message),
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
