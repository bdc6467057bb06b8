"""What does a stream cost that is only there: memory in HAProxy and the replica, CPU to open it?

Streams are opened one after the other against an idle backbone; each sends one message, so that
what is allocated for its first is counted, and is then left alone. Memory is what the processes
have to themselves (USS), before and after; CPU of idling is pings and Ray's own work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Any

import numpy as np
import psutil
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks import accounting, clusters, report
from benchmarks.load import HEADERS
from cluster.local import max_streams
from datamix import wire
from datamix.limits import raise_descriptor_limit

SHAPE = (64, 8, 8)
PARTS = {"ServeReplica": "replica", "haproxy": "HAProxy"}


class Quiet(WSListener):
    """A stream that sends one message and then only answers pings."""

    def __init__(self) -> None:
        self.answers = 0
        self.lost = False

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.lost = True

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        self.answers += frame.msg_type == WSMsgType.BINARY


def same(stream: Quiet) -> Quiet:
    return stream


def memory(mark: str) -> dict[str, int]:
    """Bytes that the parts have to themselves, by part."""
    total = dict.fromkeys(PARTS.values(), 0)
    for process in accounting.processes(mark):
        with contextlib.suppress(psutil.Error):
            if part := PARTS.get(accounting.kind(process.cmdline())):
                total[part] += process.memory_full_info().uss
    return total


def cpu(before: accounting.Snapshot, after: accounting.Snapshot) -> dict[str, float]:
    """CPU seconds by part, and of everything else that serves."""
    spent = accounting.spent_s(before, after)
    named = {part: spent.pop(kind, 0.0) for kind, part in PARTS.items()}
    return named | {"rest of Ray": sum(spent.values())}


async def opened(url: str, streams: int) -> list[Quiet]:
    """Open streams one after the other."""
    held = []
    for _ in range(streams):
        stream = Quiet()
        await ws_connect(partial(same, stream), url, extra_headers=HEADERS)
        held.append(stream)
    return held


async def answered(held: list[Quiet], message: bytes) -> None:
    """Send one message on each, a few at a time, and wait for the answers."""
    for start in range(0, len(held), 64):
        part = held[start : start + 64]
        for stream in part:
            stream.transport.send(WSMsgType.BINARY, message)
        async with asyncio.timeout(60):
            while any(not stream.answers for stream in part):
                await asyncio.sleep(0.001)


async def run(url: str, streams: int, idle_s: float) -> dict[str, Any]:
    """One measurement: rows by part, and the seconds that opening took."""
    features = np.random.default_rng(1).standard_normal((4, *SHAPE), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    # What the first streams of all cost once is not to be divided among the others.
    warm = await opened(url, 64)
    await answered(warm, message)
    for stream in warm:
        stream.transport.disconnect()
    await asyncio.sleep(1)
    memory_before, cpu_before, began = memory("ours"), accounting.snapshot("ours"), time.monotonic()
    held = await opened(url, streams)
    opening_s, cpu_open = time.monotonic() - began, accounting.snapshot("ours")
    await answered(held, message)
    memory_after, cpu_idle = memory("ours"), accounting.snapshot("ours")
    await asyncio.sleep(idle_s)
    cpu_after = accounting.snapshot("ours")
    if lost := sum(stream.lost for stream in held):
        raise RuntimeError(f"{lost} of {streams} streams were lost")
    for stream in held:
        stream.transport.disconnect()
    opening, idling = cpu(cpu_before, cpu_open), cpu(cpu_idle, cpu_after)
    parts: dict[str, dict[str, Any]] = {
        part: {
            "kB per stream": (memory_after[part] - memory_before[part]) / streams / 1e3
            if part in memory_after
            else "not looked at",
            "CPU us to open": 1e6 * opening[part] / streams,
            "CPU us per idle second": 1e6 * idling[part] / streams / idle_s,
        }
        for part in opening
    }
    return {"parts": parts, "opening_s": opening_s}


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--streams", type=int, default=4000)
    parser.add_argument("--idle", type=float, default=30, help="seconds to leave them alone")
    options = parser.parse_args()
    limit = max_streams(raise_descriptor_limit())
    if options.streams + 100 > limit:
        parser.error(f"HAProxy holds {limit} streams here, expected room for {options.streams}")
    with clusters.start("ours", engine="null", echo_shape=SHAPE) as url:
        stream = f"ws{url.removeprefix('http')}/v2/models/echo/stream"
        found = asyncio.run(run(stream, options.streams, options.idle))
    rows = [{"part": part, **row} for part, row in found["parts"].items()]

    def total(key: str) -> float:
        return float(sum(row[key] for row in rows if row["part"] in PARTS.values()))

    report.show(
        f"{options.streams} streams that have sent one message of 33 kB each",
        rows,
        [
            "figures are HAProxy's and the replica's; the rest of Ray works by the clock, not by "
            "the stream",
            "memory that a process has to itself (USS), after one message on each stream less "
            "before; the kernel's buffers for the sockets are not in it",
            f"opened one after the other in {found['opening_s']:.1f} s, then left alone for "
            f"{options.idle:g} s; idle CPU holds the pings (every 20 s) and what Ray does anyway",
        ],
        options.json,
        kb_per_stream=total("kB per stream"),
        cpu_us_to_open=total("CPU us to open"),
        cpu_us_per_idle_second=total("CPU us per idle second"),
    )


if __name__ == "__main__":
    main()
