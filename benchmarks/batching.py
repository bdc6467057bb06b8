"""Does the batcher keep up where a timer does not? Open loop at 80% of what the engine could do.

The engine is emulated: it sleeps a + b * rows seconds per batch, so its ideal capacity is known:
max_batch_rows / (a + b * max_batch_rows). Ours beside ``@serve.batch`` at its defaults, the same
engine, the same HTTP client and the same Poisson schedule; and ours over streams, by the fleet.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks import clusters, load, report
from datamix import wire
from edge.fleet.config import FleetConfig
from edge.fleet.run import simulate

SHAPE = (16, 4, 4)
ROWS = 4


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--a", type=float, default=0.02, help="seconds per batch")
    parser.add_argument("--b", type=float, default=0.0005, help="seconds per row")
    parser.add_argument("--max-batch-rows", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.8, help="of the ideal capacity")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    step_s = options.a + options.b * options.max_batch_rows
    rate = options.share * options.max_batch_rows / step_s / ROWS
    features = np.random.default_rng(1).standard_normal((ROWS, *SHAPE), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    headers = {"content-type": wire.MEDIA_TYPE, "x-request-disconnect-disabled": "?1"}
    engine = f"emulated:{options.a},{options.b}"
    runs: dict[str, list[dict[str, Any]]] = {}
    with (
        clusters.start(
            "ours", engine=engine, echo_shape=SHAPE, max_batch_rows=options.max_batch_rows,
            max_request_rows=ROWS,
        ) as ours,
        clusters.start("default", a_s=options.a, b_s=options.b) as default,
    ):  # fmt: skip
        for seed in range(options.rounds):
            for name, url in (
                ("ours, HTTP POST", f"{ours}/v2/models/echo/infer"),
                ("@serve.batch, defaults", default),
            ):
                found = load.open_posts(
                    url, message, rate=rate, seconds=options.seconds, seed=seed, headers=headers
                )
                runs.setdefault(name, []).append(
                    {
                        "answered/offered": found.answered / found.offered,
                        "p50 ms": found.p50_s * 1e3,
                        "p99 ms": found.p99_s * 1e3,
                        "p99 in steps": found.p99_s / step_s,
                        "failed": float(found.failed),
                        "client lag p99 ms": found.lag_p99_s * 1e3,
                    }
                )
            fleet = simulate(
                FleetConfig(
                    url=ours, devices=200, rate=rate, duration_s=options.seconds, seed=seed,
                    workload="echo", rows=ROWS,
                )
            )  # fmt: skip
            p99 = fleet.latency_s["p99"] or float("nan")
            runs.setdefault("ours, streams (fleet)", []).append(
                {
                    "answered/offered": fleet.throughput / fleet.offered_rate,
                    "p50 ms": (fleet.latency_s["p50"] or float("nan")) * 1e3,
                    "p99 ms": p99 * 1e3,
                    "p99 in steps": p99 / step_s,
                    "failed": float(sum(fleet.failed.values()) + fleet.unsent + fleet.wrong),
                    "client lag p99 ms": (fleet.generator_lag_s["p99"] or 0) * 1e3,
                }
            )
            print(f"round {seed + 1} of {options.rounds} done", flush=True)
    rows = [
        {"path": name} | {key: statistics.median(r[key] for r in each) for key in each[0]}
        for name, each in runs.items()
    ]
    by_name = {row["path"]: row for row in rows}
    report.show(
        f"{rate:.0f} requests/s of {ROWS} rows, {options.share:.0%} of the ideal capacity; "
        f"a full batch takes {step_s * 1e3:.0f} ms",
        rows,
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s",
            "latency counts from the scheduled send; one step is a full batch, a + b * "
            f"{options.max_batch_rows} rows",
        ],
        options.json,
        throughput_share=by_name["ours, streams (fleet)"]["answered/offered"],
        p99_steps=by_name["ours, streams (fleet)"]["p99 in steps"],
        serve_batch_throughput_share=by_name["@serve.batch, defaults"]["answered/offered"],
        serve_batch_p99_steps=by_name["@serve.batch, defaults"]["p99 in steps"],
    )


if __name__ == "__main__":
    main()
