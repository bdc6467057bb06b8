"""How many messages per second, and how much server CPU time for each, with an idle backbone?

Ours (HAProxy, WebSocket, own batcher) beside the same echo on default Ray Serve (Python proxy,
``@serve.batch``), both up at once, loaded in turn, medians over rounds. The clients' own ceiling is
measured against a bare echo server that does nothing with the bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import clusters, load, report
from benchmarks.bare import bare_server
from datamix import wire

SHAPE = (64, 8, 8)


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1, help="client processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time per round")
    options = parser.parse_args()
    features = np.random.default_rng(1).standard_normal((4, *SHAPE), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    http = {"content-type": wire.MEDIA_TYPE, "x-request-disconnect-disabled": "?1"}
    common: dict[str, Any] = {
        "connections": options.streams,
        "processes": options.processes,
        "run_s": options.seconds,
    }
    with (
        clusters.start("ours", engine="null", echo_shape=SHAPE) as ours,
        clusters.start("default") as default,
        bare_server("stream") as bare,
    ):
        stream = f"ws{ours.removeprefix('http')}/v2/models/echo/stream"
        unary = f"{ours}/v2/models/echo/infer"
        arms: dict[str, Callable[[], load.Load]] = {
            "ours, stream": lambda: load.run("stream", stream, message, mark="ours", **common),
            "ours, HTTP POST": lambda: load.run(
                "post", unary, message, mark="ours", headers=http, **common
            ),
            "default Serve, @serve.batch": lambda: load.run(
                "post", default, message, mark="default", headers=http, **common
            ),
            "clients' ceiling (bare echo)": lambda: load.run("stream", bare, message, **common),
        }
        runs: dict[str, list[load.Load]] = {name: [] for name in arms}
        for number in range(options.rounds):
            for name, arm in arms.items():
                runs[name].append(arm())
                print(
                    f"round {number + 1}: {name}: {runs[name][-1].rate:,.0f} messages/s", flush=True
                )
    rows: list[dict[str, Any]] = [
        {
            "path": name,
            "messages/s": statistics.median(r.rate for r in each),
            "lowest": min(r.rate for r in each),
            "highest": max(r.rate for r in each),
            "server CPU us": statistics.median(r.server_us for r in each),
            "client CPU us": statistics.median(r.client_us for r in each),
            "busiest client": statistics.median(r.client_busiest for r in each),
        }
        for name, each in runs.items()
    ]
    by_name = {row["path"]: row for row in rows}
    ratio = (
        by_name["ours, stream"]["messages/s"] / by_name["default Serve, @serve.batch"]["messages/s"]
    )
    report.show(
        f"{len(message) / 1000:.0f} kB messages, {options.streams} streams, idle backbone",
        rows,
        [
            "server CPU counts every process of the cluster: replica, HAProxy, Ray's own",
            "the clients are not the limit where their ceiling is well above the measured rate",
        ],
        options.json,
        ratio_to_default_serve=ratio,
        server_cpu_us_per_message=by_name["ours, stream"]["server CPU us"],
        client_ceiling_over_ours=by_name["clients' ceiling (bare echo)"]["messages/s"]
        / by_name["ours, stream"]["messages/s"],
    )


if __name__ == "__main__":
    main()
