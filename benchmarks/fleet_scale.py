"""Do 10,000 devices on two cores send on time, beside the cloud that answers them?

One run of the fleet against an emulated engine, everything on this machine: each device has a
stream of its own and every answer is compared. Ray, HAProxy and replicas take their share of the
same cores. Where the limit of open files lets one HAProxy hold too few streams, there are several
clouds, each behind a front door of its own, and the devices are spread over them.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from typing import Any

import psutil

from benchmarks import accounting, clusters, report
from cluster.local import max_streams
from datamix.limits import raise_descriptor_limit
from edge.fleet.config import FleetConfig
from edge.fleet.run import FleetProgress, simulate

SHAPE = (64, 8, 8)


class Follower:
    """Keeps what the run said on its way: how long connecting took, and the most streams seen."""

    def __init__(self) -> None:
        self._began_s = math.nan  # the first words come while the shards start
        self.connecting_s = math.nan
        self.streams = 0

    def __call__(self, progress: FleetProgress) -> None:
        if math.isnan(self._began_s):
            self._began_s = time.monotonic()
        if progress.phase == "running" and math.isnan(self.connecting_s):
            self.connecting_s = time.monotonic() - self._began_s - progress.elapsed_s
        self.streams = max(self.streams, progress.connected)


def resident_mb(processes: list[psutil.Process]) -> float:
    """Memory that these processes hold, in MB."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 1e6


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=1000, help="requests per second")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="emulated:0.002,0.00002", help="of the cloud")
    parser.add_argument(
        "--clouds", type=int, help="how many; else as many as the limit of open files asks for"
    )
    options = parser.parse_args()
    limit = max_streams(raise_descriptor_limit())
    clouds = options.clouds or -(-options.devices // limit)
    follower = Follower()
    with contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(clusters.start("ours", engine=options.engine, echo_shape=SHAPE))
            for _ in range(clouds)
        ]
        config = FleetConfig(
            urls[0],
            doors=tuple(urls[1:]),
            workload="echo",
            devices=options.devices,
            rate=options.rate,
            duration_s=options.seconds,
            processes=options.processes,
            seed=options.seed,
            connect_timeout_s=120,
        )
        before, start = accounting.snapshot("ours"), time.monotonic()
        summary = simulate(config, follower)
        after, end = accounting.snapshot("ours"), time.monotonic()
        memory_mb = resident_mb(accounting.processes("ours"))
    server_s = accounting.spent_s(before, after)
    lost = summary.inferences - summary.ok - summary.wrong
    strays = summary.duplicates + summary.misrouted + summary.unmatched + summary.unreadable
    cpu_s = summary.generator_cpu_s_per_request or math.nan
    row: dict[str, Any] = {
        "devices": summary.clients,
        "processes": summary.processes,
        "front doors": clouds,
        "requests/s": summary.throughput,
        "lag p50 ms": 1e3 * (summary.generator_lag_s["p50"] or math.nan),
        "lag p99 ms": 1e3 * (summary.generator_lag_s["p99"] or math.nan),
        "latency p50 ms": 1e3 * (summary.latency_s["p50"] or math.nan),
        "latency p99 ms": 1e3 * (summary.latency_s["p99"] or math.nan),
        "generator CPU us": 1e6 * cpu_s,
        "server CPU us": 1e6 * sum(server_s.values()) / max(1, summary.requests),
        "connecting s": follower.connecting_s,
        "cloud MB": memory_mb,
    }
    report.show(
        f"{options.devices:,} devices, {options.rate:g} requests/s of 33 kB for "
        f"{options.seconds:g} s, engine {options.engine}",
        [row],
        [
            f"HAProxy holds {limit:,} streams at most under this machine's limit of open files; "
            f"front doors: {clouds}, each with a replica and a Ray of its own, on the same cores",
            f"inferences {summary.inferences}, ok {summary.ok}, failed {summary.failed}, "
            f"wrong {summary.wrong}, unsent {summary.unsent}, retries {summary.retries}, "
            f"reconnects {summary.reconnects}, stray answers {strays}",
            f"valid: {summary.valid} {summary.invalid_reason or ''}".rstrip(),
            f"server CPU from the first look at it until the end, {end - start:.0f} s, connecting "
            "included",
            "every answer is compared bit by bit; lag counts from the schedule",
        ],
        options.json,
        devices=float(summary.clients),
        throughput=summary.throughput,
        lag_p99_ms=row["lag p99 ms"],
        lost=float(lost),
        wrong=float(summary.wrong + strays),
        connecting_s=follower.connecting_s,
        generator_cpu_us=1e6 * cpu_s,
    )


if __name__ == "__main__":
    main()
