"""How does the data plane compare with the field? The same echo everywhere, an idle backbone.

Ours over its stream and over HTTP; mosec, LitServe, BentoML and default Ray Serve over HTTP. All
are up at once and loaded in turn by the same clients, medians over rounds. The peers live in an
environment of their own, which benchmarks/peers/requirements.txt says how to make.

A peer can be given other settings than its tuned ones, beside itself: ``mosec,mosec:workers=2``.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accounting, clusters, load, report
from benchmarks.bare import bare_server
from benchmarks.peers import process
from datamix import wire
from datamix.limits import raise_descriptor_limit

ROWS = 4
# Kilobytes of a message -> shape of one of its rows.
SHAPES = {1: (2, 8, 8), 33: (64, 8, 8), 256: (64, 32, 16), 4096: (128, 64, 64)}
# Kilobytes of a message -> messages in a peer's batch at most. With 4 MB all fare better with few:
# 4 instead of 64 halve mosec's CPU time and double its rate. (Ours closes a batch when the engine
# is free, and this one always is.)
BATCHES = {1: 64, 33: 64, 256: 64, 4096: 4}
# With fewer answers a run says nothing about the cost of one.
LEAST_MESSAGES = 30
HEADERS = {"content-type": wire.MEDIA_TYPE, "x-request-disconnect-disabled": "?1"}
PATHS = "ours,mosec,mosec:workers=2,triton,bentoml,litserve,default,ceiling"
STREAM, POST = "ours, stream", "ours, HTTP POST"
CEILINGS = {"stream": "clients' ceiling, stream", "post": "clients' ceiling, HTTP POST"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One path to load.

    Attributes:
        path: its name in the table.
        kind: of the clients, ``stream`` or ``post``.
        url: what they connect to.
        mark: whose processes are counted.
        peer: whether it is a peer, out of an environment of its own.
    """

    path: str
    kind: str
    url: str
    mark: str
    peer: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One place on the axes: kilobytes of a message, and connections."""

    kilobytes: int
    connections: int


def points(sizes: list[int], connections: list[int]) -> list[Point]:
    """Each size at the first number of connections, and each other number at the first size."""
    along = [Point(size, connections[0]) for size in sizes]
    return along + [Point(sizes[0], number) for number in connections[1:]]


def encode(kilobytes: int) -> bytes:
    """One message of about that size."""
    shape = (ROWS, *SHAPES[kilobytes])
    features = np.random.default_rng(1).standard_normal(shape, np.float32)
    return wire.encode_request(features, request_id="0" * 16)


@contextlib.contextmanager
def start(paths: list[str], venv: Path, kilobytes: int) -> Iterator[list[Arm]]:
    """Start all servers for messages of one size."""
    message, arms = encode(kilobytes), []
    with contextlib.ExitStack() as stack:
        for path in paths:
            if path == "ours":
                url = stack.enter_context(
                    clusters.start(
                        "ours", engine="null", echo_shape=SHAPES[kilobytes], max_queue_rows=32768
                    )
                )
                stream = f"ws{url.removeprefix('http')}/v2/models/echo/stream"
                arms.append(Arm(STREAM, "stream", stream, "ours"))
                arms.append(Arm(POST, "post", f"{url}/v2/models/echo/infer", "ours"))
            elif path == "default":
                url = stack.enter_context(clusters.start("default"))
                arms.append(Arm("default Serve, @serve.batch", "post", url, "default"))
            elif path == "ceiling":
                for kind, name in CEILINGS.items():
                    url = stack.enter_context(bare_server(kind, mark=name))
                    arms.append(Arm(name, kind, url, name))
            else:
                url = stack.enter_context(process.start(path, venv, message, BATCHES[kilobytes]))
                arms.append(Arm(path, "post", url, path, peer=True))
        yield arms


def settle(arm: Arm, timeout_s: float = 30) -> None:
    """Wait until a server is idle: what its last clients left must not burden the next one's run.

    Raises:
        RuntimeError: it is still busy after ``timeout_s``.
    """
    # Ray takes some 9% of a core when idle, LitServe up to a fifth.
    limit = 0.4 if arm.peer and process.polls(arm.path) else 0.2
    deadline = time.monotonic() + timeout_s
    share, quiet = 1.0, 0
    while time.monotonic() < deadline:
        before, start = accounting.snapshot(arm.mark), time.monotonic()
        time.sleep(0.5)
        after, end = accounting.snapshot(arm.mark), time.monotonic()
        share = sum(accounting.spent_s(before, after).values()) / (end - start)
        # Twice, as a machine with other work may not let a busy one have its turn.
        quiet = quiet + 1 if share < limit else 0
        if quiet == 2:
            return
    raise RuntimeError(
        f"{arm.mark} takes {share:.0%} of a core {timeout_s:g} s after its load, expected below "
        f"{limit:.0%}"
    )


def summary(arm: Arm, point: Point, runs: list[load.Load], processes: bool) -> dict[str, Any]:
    """One row of the table: medians over the rounds."""

    def median(name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    row = {
        "path": arm.path,
        "kB": f"{point.kilobytes:,}",
        "connections": f"{point.connections:,}",
        "messages/s": median("rate"),
        "lowest": min(run.rate for run in runs),
        "highest": max(run.rate for run in runs),
        "server CPU us": median("server_us"),
        "server CPU ms/MB": median("server_us") / runs[0].bytes_each * 1e3,
        "client CPU us": median("client_us"),
        "p50 ms": median("p50_s") * 1e3,
        "p99 ms": median("p99_s") * 1e3,
    }
    return row | ({"CPU us by process": breakdown(runs)} if processes else {})


def breakdown(runs: list[load.Load]) -> str:
    """Server CPU time per message by kind of process in microseconds, all rounds together."""
    messages = sum(run.messages for run in runs)
    total: dict[str, float] = {}
    for run in runs:
        for name, seconds in run.server_parts_s.items():
            total[name] = total.get(name, 0.0) + seconds / max(1, messages) * 1e6
    parts = sorted(total.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {us:.3g}" for name, us in parts if us >= 0.1)


def measure(
    arms: list[Arm], point: Point, rounds: int, seconds: float, faults: list[str]
) -> dict[Arm, list[load.Load]]:
    """Load all paths in turn; a path that fails is left out from then on, and said so."""
    message = encode(point.kilobytes)
    runs: dict[Arm, list[load.Load]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in list(runs):
            place = f"{arm.path}, {point.kilobytes} kB, {point.connections} connections"
            try:
                runs[arm].append(turn(arm, arms, message, point.connections, seconds))
            except RuntimeError as error:
                del runs[arm]
                faults.append(f"{place}: {error}")
                print(f"round {number + 1}: {faults[-1]}", flush=True)
                continue
            found = runs[arm][-1]
            print(
                f"round {number + 1}: {place}: {found.rate:,.0f} messages/s, "
                f"{found.server_us:,.1f} us ({breakdown([found])})",
                flush=True,
            )
    return runs


def turn(arm: Arm, arms: list[Arm], message: bytes, connections: int, seconds: float) -> load.Load:
    """Load one path while all others are idle, and those that poll stand still.

    Raises:
        RuntimeError: an answer was bad, there were too few, or the server did not calm down.
    """
    with contextlib.ExitStack() as stack:
        for other in arms:
            if other.peer and process.polls(other.path) and other.mark != arm.mark:
                stack.enter_context(process.frozen(other.mark))
        found = load.run(
            arm.kind,
            arm.url,
            message,
            connections=connections,
            # Until the burst of first messages has gone through.
            warm_s=1 + connections * len(message) / 64e6,
            run_s=seconds,
            mark=arm.mark,
            headers=process.headers(arm.path) if arm.peer else HEADERS,
        )
        settle(arm)
    if found.messages < LEAST_MESSAGES:
        raise RuntimeError(
            f"{found.messages} messages were answered in {seconds:g} s, expected {LEAST_MESSAGES}"
        )
    return found


def figures(found: dict[Arm, list[load.Load]]) -> dict[str, float]:
    """Ours over each peer at one point: the median of the rounds' ratios, which share the noise."""
    ours = {arm.path: runs for arm, runs in found.items() if arm.mark == "ours"}
    peers = {arm.path: runs for arm, runs in found.items() if arm.peer or arm.mark == "default"}
    figures: dict[str, float] = {}
    for name, path in (("stream", STREAM), ("post", POST)):
        if path not in ours:
            continue
        runs = ours[path]
        figures[f"{name}_server_cpu_us"] = statistics.median(run.server_us for run in runs)
        for peer, others in peers.items():
            short = re.sub("[:=]", "_", peer.split()[0])
            figures[f"{name}_cpu_over_{short}"] = statistics.median(
                run.server_us / other.server_us for run, other in zip(runs, others, strict=True)
            )
        if peers:
            figures[f"{name}_rate_over_best_peer"] = statistics.median(
                run.rate / max(other.rate for other in others)
                for run, *others in zip(runs, *peers.values(), strict=True)
            )
    return figures


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--sizes", default="33,1,256,4096", help=f"kB, of {list(SHAPES)}")
    parser.add_argument("--connections", default="64,16,256,4096")
    parser.add_argument("--peers", default=PATHS, help="which servers to start")
    parser.add_argument("--venv", type=Path, default=process.ROOT / ".venv.peers")
    parser.add_argument("--processes", action="store_true", help="a column of CPU by process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time per round")
    options = parser.parse_args()
    raise_descriptor_limit()
    sizes, connections = (
        [int(number) for number in text.split(",")] for text in (options.sizes, options.connections)
    )
    faults: list[str] = []
    rows: list[dict[str, Any]] = []
    first: dict[Arm, list[load.Load]] = {}
    for size in sizes:
        with start(options.peers.split(","), options.venv, size) as arms:
            for point in points(sizes, connections):
                if point.kilobytes != size:
                    continue
                found = measure(arms, point, options.rounds, options.seconds, faults)
                rows += [
                    summary(arm, point, runs, options.processes) for arm, runs in found.items()
                ]
                first = first or found
    parts = "; ".join(f"{arm.path}: {breakdown(runs)}" for arm, runs in first.items())
    report.show(
        f"{ROWS} rows a message, idle backbone, one message under way per connection",
        rows,
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s; server CPU counts every "
            "process of a server, HAProxy's and Ray's included; clients share the machine's cores",
            "MB of requests; the answers are as large. Latencies are those of a closed loop: the "
            "connections divided by the rate",
            f"server CPU us per message by process at {sizes[0]} kB and {connections[0]} "
            f"connections: {parts}",
            *(f"failed and left out: {fault}" for fault in faults),
        ],
        options.json,
        packages=process.versions(options.venv),
        **figures(first),
    )


if __name__ == "__main__":
    main()
