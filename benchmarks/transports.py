"""What does each transport cost that Serve lets through, from HAProxy to the same replica and back?

One cluster, one replica per WebSocket class, the product's codec, batcher and null engine behind
all of them; loaded in turn, medians over rounds. gRPC, HTTP and chunked HTTP go to the replica that
has the product's WebSockets. wsproto is not among the project's dependencies: install what
benchmarks/transports-requirements.txt names, or leave its arm out with --without wsproto.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks import clusters, report
from benchmarks.transports_app import (
    APPLICATIONS,
    DUPLEX_PATH,
    METHOD,
    SERVICE,
    STREAM_PATH,
)
from benchmarks.transports_clients import Endpoint, Run, load
from datamix import wire

SHAPE = (64, 8, 8)
MARK = "transports"
HTTP = {"content-type": wire.MEDIA_TYPE}
NO_WATCHER = {"x-request-disconnect-disabled": "?1"}
OURS = "picows"
# Name of an arm -> application, and its title in the table.
ARMS = {
    "picows": (OURS, "WebSocket: picows (ours)"),
    "websockets": ("websockets", "WebSocket: uvicorn websockets"),
    "sansio": ("sansio", "WebSocket: uvicorn websockets-sansio"),
    "wsproto": ("wsproto", "WebSocket: uvicorn wsproto"),
    "duplex": (OURS, "HTTP: one POST, both bodies chunked"),
    "post": (OURS, "HTTP: a POST each, watcher off"),
    "post-watched": (OURS, "HTTP: a POST each, watcher on"),
    "grpc": (OURS, "gRPC: bidirectional stream"),
}


def endpoint(arm: str, base: str, grpc_port: int) -> Endpoint:
    """Where an arm's clients send to."""
    application = ARMS[arm][0]
    url = f"{base}/{application}"
    if arm == "grpc":
        return Endpoint(
            "grpc",
            f"http://127.0.0.1:{grpc_port}/{SERVICE}/{METHOD}",
            {"application": application},
        )
    if arm == "duplex":
        return Endpoint("duplex", url + DUPLEX_PATH, HTTP | NO_WATCHER)
    if arm.startswith("post"):
        headers = HTTP if arm == "post-watched" else HTTP | NO_WATCHER
        return Endpoint("post", f"{url}/v2/models/echo/infer", headers)
    return Endpoint("websocket", f"ws{url.removeprefix('http')}{STREAM_PATH}")


def replica_pid(base: str, application: str) -> int:
    """Process id of an application's replica, by its own word."""
    with urllib.request.urlopen(f"{base}/{application}/v2/stats", timeout=10) as answer:
        return int(json.load(answer)["pid"])


def row(arm: str, runs: list[Run]) -> dict[str, Any]:
    """An arm's row of the table: medians over its rounds."""

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(of(run) for run in runs)

    server_us = [r.us(r.server.replica + r.server.haproxy + r.server.ray) for r in runs]
    return {
        "transport": ARMS[arm][1],
        "messages/s": median(lambda r: r.rate),
        "server CPU us": statistics.median(server_us),
        "lowest to highest": f"{min(server_us):.0f} to {max(server_us):.0f}",
        "replica": median(lambda r: r.us(r.server.replica)),
        "HAProxy": median(lambda r: r.us(r.server.haproxy)),
        "rest of Ray": median(lambda r: r.us(r.server.ray)),
        "client CPU us": median(lambda r: r.us(r.client_cpu_s)),
        "busiest client": median(lambda r: r.client_busiest),
        "p50 ms": median(lambda r: r.p50_s * 1e3),
        "p99 ms": median(lambda r: r.p99_s * 1e3),
    }


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1, help="client processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per round")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--without", nargs="+", choices=ARMS, default=[])
    options = parser.parse_args()
    arms = [arm for arm in options.only if arm not in options.without]
    if "wsproto" in arms and importlib.util.find_spec("wsproto") is None:
        parser.error(
            "wsproto is not installed; see benchmarks/transports-requirements.txt, or leave it "
            "out with --without wsproto"
        )
    applications = [name for name in APPLICATIONS if name in {ARMS[arm][0] for arm in arms}]
    features = np.random.default_rng(1).standard_normal((4, *SHAPE), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    with clusters.start_saying(
        MARK, config={"engine": "null", "echo_shape": SHAPE}, applications=applications
    ) as said:
        base, grpc_port = said["url"], said["grpc_port"]
        pids = {name: replica_pid(base, name) for name in applications}
        for number in range(options.rounds):
            first = number % len(arms)  # so that no arm always follows the same other one's load
            for arm in arms[first:] + arms[:first]:
                pid = pids[ARMS[arm][0]]
                found = load(
                    endpoint(arm, base, grpc_port),
                    message,
                    connections=options.connections,
                    processes=options.processes,
                    warm_s=1.0,
                    run_s=options.seconds,
                    mark=MARK,
                    loaded=pid,
                    idle=set(pids.values()) - {pid},
                )
                runs[arm].append(found)
                print(f"round {number + 1}: {arm}: {found.rate:,.0f} messages/s", flush=True)
    rows = {arm: row(arm, each) for arm, each in runs.items()}
    extra = ["httptools", "grpcio", *(["wsproto"] if "wsproto" in arms else [])]
    figures = {}
    if OURS in rows:
        others = [row["server CPU us"] for arm, row in rows.items() if arm != OURS]
        figures["server_cpu_us_per_message"] = rows[OURS]["server CPU us"]
        if others:
            figures["cheapest_other_over_ours"] = min(others) / rows[OURS]["server CPU us"]
    report.show(
        f"{len(message) / 1000:.0f} kB messages, {options.connections} connections, one message "
        "under way on each, idle backbone",
        list(rows.values()),
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s, in turn",
            "CPU in microseconds per message; the rest of Ray is raylet, GCS, controller and "
            "proxies, without replicas that were idle; some of it goes on without messages, so "
            "slow arms carry more of it each",
            "latency from send to answer in this closed loop",
            "besides the packages below: " + ", ".join(f"{name} {version(name)}" for name in extra),
            "a client near a whole core is the limit of that arm's rate, not of its server's CPU",
        ],
        options.json,
        **figures,
    )


if __name__ == "__main__":
    main()
