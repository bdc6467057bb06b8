"""Does the search for a cloud's capacity find what is known of an emulated engine?

The engine sleeps a + b * rows seconds per batch, and takes what waits whenever it is free: with
Poisson arrivals that is a queue that can be solved (benchmarks/batch_queue.py), so the largest rate
at which 99% are answered within the objective is known to four digits. The search gets the same
engine behind a real replica and real sockets, and knows nothing of it but its URL.

A real replica also needs time between two batches, which the engine's formula has not. So the queue
is solved once more with that time added to each batch, as a closed loop that keeps all batches full
shows it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks import clusters, replicas, report
from benchmarks.batch_queue import BatchQueue
from edge.fleet.capacity import Capacity, Fleet, measure
from edge.fleet.capacity_command import default_timeout_s
from edge.fleet.capacity_view import probe_line
from edge.fleet.config import FleetConfig
from edge.fleet.objective import Objective, parse_objective
from edge.fleet.run import FleetProgress, simulate
from edge.fleet.search import Plan

SHAPE = (16, 4, 4)
ROWS = 4


@contextlib.contextmanager
def cloud(kind: str, a_s: float, b_s: float, max_batch_rows: int) -> Iterator[str]:
    """Start the engine behind a replica, alone or in a whole cluster; yields its URL."""
    settings: dict[str, Any] = {
        "engine": f"emulated:{a_s},{b_s}",
        "echo_shape": SHAPE,
        "max_batch_rows": max_batch_rows,
        "max_request_rows": ROWS,
    }
    start = replicas.start(**settings) if kind == "replica" else clusters.start("ours", **settings)
    with start as url:
        yield url


def between_batches_s(url: str, queue: BatchQueue) -> float:
    """What a batch takes longer than the formula says, measured with all of them full.

    A closed loop of three batches' worth of devices: what is answered is what the engine carries.
    """
    config = FleetConfig(
        url=url, workload="echo", rows=ROWS, pacer="closed:think_s=0", devices=3 * queue.most,
        duration_s=20, timeout_s=30,
    )  # fmt: skip
    seen: list[FleetProgress] = []
    simulate(config, seen.append)
    first, last = seen[len(seen) // 4], seen[-2]
    requests = last.counters["ok"] - first.counters["ok"]
    period_s = queue.most * (last.elapsed_s - first.elapsed_s) / requests
    return period_s - queue.step_s(queue.most)


def row(
    seed: int, found: Capacity, expected: float, calibrated: float, took_s: float
) -> dict[str, Any]:
    """One seed's line of the table."""
    rate = found.rate if found.rate is not None else float("nan")
    return {
        "seed": str(seed),
        "found/s": rate,
        "low/s": found.rate_low,
        "high/s": found.rate_high if found.rate_high is not None else float("nan"),
        "analytic/s": expected,
        "off by": f"{rate / expected - 1:+.1%}",
        "calibrated/s": calibrated,
        "off by then": f"{rate / calibrated - 1:+.1%}",
        "probes": str(len(found.probes)),
        "invalid probes": str(sum(not one.valid for one in found.probes)),
        "seconds": took_s,
        "ended": found.ended,
        "limit": found.limit.name,
    }


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--cloud", choices=("replica", "cluster"), default="replica")
    parser.add_argument("--slo", default="p99=150ms")
    parser.add_argument("--a", type=float, default=0.02, help="seconds per batch")
    parser.add_argument("--b", type=float, default=0.0005, help="seconds per row")
    parser.add_argument("--max-batch-rows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--probe-seconds", type=float, default=None)
    parser.add_argument("--max-streams", type=int, default=200)
    options = parser.parse_args()
    objective: Objective = parse_objective(options.slo)
    queue = BatchQueue(options.a, options.b * ROWS, options.max_batch_rows // ROWS)
    expected = queue.capacity(objective.latency_s, objective.allowed)
    print(
        f"analytic: {expected:.1f}/s, {expected / queue.saturation:.1%} of saturation", flush=True
    )
    found: list[Capacity] = []
    rows = []
    with cloud(options.cloud, options.a, options.b, options.max_batch_rows) as url:
        plan = Plan(objective, tolerance=options.tolerance, most_s=options.probe_seconds)
        base = FleetConfig(url=url, workload="echo", rows=ROWS)
        fleet = Fleet(base, 1.0, options.max_streams, default_timeout_s(objective.latency_s))
        gap_s = between_batches_s(url, queue)
        real = replace(queue, a_s=queue.a_s + gap_s)
        calibrated = real.capacity(objective.latency_s, objective.allowed)
        print(f"between batches: {gap_s * 1e3:.2f} ms, so {calibrated:.1f}/s", flush=True)
        for seed in range(options.seeds):
            start_s = time.monotonic()
            found.append(
                measure(
                    fleet,
                    plan,
                    seed=seed,
                    on_probe=lambda known: print(probe_line(known.probes[-1]), flush=True),
                )
            )
            rows.append(row(seed, found[-1], expected, calibrated, time.monotonic() - start_s))
            print(rows[-1], flush=True)
    rates = [one.rate if one.rate is not None else float("inf") for one in found]
    errors = [abs(rate / expected - 1) for rate in rates]
    calibrated_errors = [abs(rate / calibrated - 1) for rate in rates]
    inside = [
        one.rate_high is not None and one.rate_low <= calibrated <= one.rate_high for one in found
    ]
    report.show(
        f"Capacity search, {options.slo}, {ROWS} rows per request, batches of at most "
        f"{options.max_batch_rows} rows that take {options.a} + {options.b} * rows seconds",
        rows,
        [
            f"analytic: the engine's queue solved, {expected:.1f} requests/s, "
            f"{expected / queue.saturation:.0%} of what full batches would carry",
            f"calibrated: the same with the {gap_s * 1e3:.2f} ms more that each batch takes in a "
            "closed loop; what sockets and messages take besides is part of what the search finds",
            "the search's interval is to hold the calibrated answer in 19 of 20 searches",
            f"behind a {options.cloud}, generator and cloud on the same machine",
        ],
        options.json,
        between_batches_ms=gap_s * 1e3,
        worst_relative_error=max(errors),
        worst_relative_error_calibrated=max(calibrated_errors),
        median_relative_error_calibrated=statistics.median(calibrated_errors),
        median_relative_error=statistics.median(errors),
        seeds_within_3_percent=float(sum(error <= 0.03 for error in errors)),
        intervals_that_hold_the_answer=float(sum(inside)),
    )


if __name__ == "__main__":
    main()
