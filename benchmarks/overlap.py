"""Do two batches under way serve more, without batches getting smaller? In process, no network.

The engine is emulated: a copy, then a computation, of known cost. With depth 1 they take turns;
with depth 2 the copy of one batch goes on beside the computation of another. The batcher closes the
second batch just in time; beside it, for comparison, one that closes it as soon as there is room:
what arrives then waits for a whole batch more.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import report
from datamix.errors import DataMixError
from deployments.batcher import Batcher
from deployments.emulated import Cost, EmulatedEngine
from deployments.engine import Rows
from deployments.waiting import Computed, Job

SHAPE = (4, 1, 1)
ROWS = 4


class Run:
    """One batcher under load, and what its requests lived."""

    def __init__(self, cost: Cost, depth: int, max_batch_rows: int) -> None:
        """Start a batcher; on a running event loop."""
        self.engine = EmulatedEngine([SHAPE], [cost], name="overlap", depth=depth)
        self.batcher = Batcher(
            self.engine,
            asyncio.get_running_loop(),
            max_batch_rows=max_batch_rows,
            max_queue_rows=1 << 20,
        )
        self.rows = Rows(np.zeros((ROWS, *SHAPE), np.float32), None)
        self.latencies_s: list[float] = []
        self.open = 0

    def ask(self, due: float) -> None:
        """Offer one request that was due then."""

        def done(outcome: Computed | DataMixError) -> None:
            self.open -= 1
            if isinstance(outcome, Computed):
                self.latencies_s.append(time.monotonic() - due)

        self.open += 1
        self.batcher.offer(Job(0, self.rows, done))

    async def saturate(self, seconds: float, waiting: int) -> float:
        """Keep ``waiting`` requests in the system; rows per second."""
        await self._fill(min(2.0, seconds / 4), waiting)
        before, start = self.batcher.statistics.rows, time.monotonic()
        await self._fill(seconds, waiting)
        return (self.batcher.statistics.rows - before) / (time.monotonic() - start)

    async def _fill(self, seconds: float, waiting: int) -> None:
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            for _ in range(waiting - self.open):
                self.ask(now)
            await asyncio.sleep(0.0005)

    async def load(self, seconds: float, rate: float, seed: int) -> None:
        """Poisson arrivals at ``rate`` requests per second, on schedule whatever happens."""
        rng = random.Random(seed)
        due = start = time.monotonic()
        while due < start + seconds:
            due += rng.expovariate(rate)
            if (early_s := due - time.monotonic()) > 0:
                await asyncio.sleep(early_s)
            self.ask(due)
        while self.open:
            await asyncio.sleep(0.001)


async def capacity(cost: Cost, depth: int, max_batch_rows: int, seconds: float) -> float:
    """Rows per second of a saturated batcher."""
    run = Run(cost, depth, max_batch_rows)
    found = await run.saturate(seconds, 6 * max_batch_rows // ROWS)
    await run.batcher.drain(60)
    return found


async def under_load(
    cost: Cost, depth: int, max_batch_rows: int, seconds: float, rows_per_s: float, seed: int
) -> dict[str, float]:
    """Latencies and batch sizes at an offered rate; the first tenth only teaches the model."""
    run = Run(cost, depth, max_batch_rows)
    await run.load(seconds / 10, rows_per_s / ROWS, seed + 1000)
    before = (run.batcher.statistics.batches, run.batcher.statistics.rows, run.batcher.busy_s)
    run.latencies_s.clear()
    start = time.monotonic()
    await run.load(seconds, rows_per_s / ROWS, seed)
    took_s = time.monotonic() - start
    batches = run.batcher.statistics.batches - before[0]
    rows = run.batcher.statistics.rows - before[1]
    await run.batcher.drain(60)
    cuts = statistics.quantiles(run.latencies_s, n=100)
    return {
        "offered rows/s": rows_per_s,
        "mean batch rows": rows / batches,
        "busy share": (run.batcher.busy_s - before[2]) / took_s,
        "p50 ms": cuts[49] * 1e3,
        "p99 ms": cuts[98] * 1e3,
    }


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--a", type=float, default=0.005, help="computation per batch, seconds")
    parser.add_argument("--b", type=float, default=0.0001, help="computation per row")
    parser.add_argument("--copy-a", type=float, default=0.0005, help="copy per batch")
    parser.add_argument("--copy-b", type=float, default=0.00003, help="copy per row")
    parser.add_argument("--max-batch-rows", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.8, help="of each one's own capacity")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    cost = Cost(options.a, options.b, options.copy_a, options.copy_b)
    most, seconds = options.max_batch_rows, options.seconds
    at_once = mock.patch("deployments.dispatch._MARGIN_S", math.inf)
    arms = {"depth 1": 1, "depth 2": 2, "depth 2, closed at once": 2}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    same: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in range(options.rounds):
        first_capacity = 0.0
        for name, depth in arms.items():
            with at_once if "at once" in name else mock.patch.dict({}):
                full = asyncio.run(capacity(cost, depth, most, seconds / 2))
                first_capacity = first_capacity or full
                own, first = (
                    asyncio.run(under_load(cost, depth, most, seconds, rate, seed))
                    for rate in (options.share * full, options.share * first_capacity)
                )
            found[name].append({"capacity rows/s": full, **own})
            same[name].append({"capacity rows/s": full, **first})
        print(f"round {seed + 1} of {options.rounds} done", flush=True)
    rows: list[dict[str, Any]] = [
        {"batcher": name, "load": load}
        | {key: statistics.median(run[key] for run in each[name]) for key in each[name][0]}
        for load, each in (
            (f"{options.share:.0%} of its own capacity", found),
            (f"{options.share:.0%} of depth 1's", same),
        )
        for name in arms
    ]
    by_name = {(row["batcher"], row["load"].endswith("own capacity")): row for row in rows}
    one, two = by_name["depth 1", True], by_name["depth 2", True]
    report.show(
        f"computation {options.a:g} + {options.b:g} * rows s, copy {options.copy_a:g} + "
        f"{options.copy_b:g} * rows s, at most {most} rows",
        rows,
        [
            f"medians of {options.rounds} rounds of {seconds:g} s; Poisson arrivals of {ROWS} rows",
            "without overlap a batch takes copy and computation, with it the longer of the two",
            "at the same offered rate a faster engine makes smaller batches, as less gathers while "
            "it computes; what counts is the batch size at the same share of the capacity",
        ],
        options.json,
        throughput_gain=two["capacity rows/s"] / one["capacity rows/s"],
        ideal_gain=(sum(cost[0::2]) + sum(cost[1::2]) * most)
        / max(cost.a_s + cost.b_s * most, cost.copy_a_s + cost.copy_b_s * most),
        batch_rows_depth_2_over_1=two["mean batch rows"] / one["mean batch rows"],
        p50_at_once_over_just_in_time=by_name["depth 2, closed at once", True]["p50 ms"]
        / two["p50 ms"],
    )


if __name__ == "__main__":
    main()
