"""How late is an answer, from 10% to 150% of capacity, and what is left of goodput at 300%?

The engine is emulated: it sleeps a + b * rows seconds per batch, so the ideal capacity is known:
max_batch_rows / (a + b * max_batch_rows). Open loop: Poisson arrivals over streams, each request
with a deadline on the wire, none sent twice, so that every one of them counts as offered once.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks import clusters, report
from edge.fleet.config import FleetConfig
from edge.fleet.report import Summary
from edge.fleet.run import simulate

SHAPE = (16, 4, 4)
ROWS = 4
DEVICES = 200
LOADS = (0.1, 0.25, 0.5, 0.8, 0.9, 1.0, 1.2, 1.5, 3.0)  # of the ideal capacity
SATURATION = (1.0, 1.2, 1.5)


@dataclass(frozen=True, slots=True)
class Plan:
    """The engine's cost and what the clients want of it.

    Attributes:
        a_s: seconds per batch.
        b_s: seconds per row.
        max_batch_rows: rows in a batch at most.
        deadline_steps: a request's deadline in full batches, from its scheduled send.
    """

    a_s: float
    b_s: float
    max_batch_rows: int
    deadline_steps: float

    @property
    def step_s(self) -> float:
        """How long a full batch takes."""
        return self.a_s + self.b_s * self.max_batch_rows

    @property
    def capacity(self) -> float:
        """Requests per second, if every batch were full and followed the last at once."""
        return self.max_batch_rows / self.step_s / ROWS

    def fleet(self, url: str, load: float, duration_s: float, seed: int) -> FleetConfig:
        """Clients that offer ``load`` times the capacity, once."""
        return FleetConfig(
            url=url,
            devices=DEVICES,
            rate=load * self.capacity,
            duration_s=duration_s,
            seed=seed,
            workload="echo",
            rows=ROWS,
            timeout_s=self.deadline_steps * self.step_s,
            max_retries=0,
        )


def goodput(summary: Summary) -> float:
    """Answers before their deadline per second, by when they came.

    Without the first second: whatever is under way at the end is missing, so must be what was at
    the start, or a longer queue would look like a slower engine.
    """
    return statistics.mean(summary.series.answered[1:])


def share(summary: Summary, *names: str) -> float:
    """Share of the offered requests that ended so."""
    return sum(summary.failed.get(name, 0) for name in names) / summary.inferences


def others(summary: Summary) -> int:
    """Requests that ended in a way that overload does not explain."""
    known = sum(summary.failed.get(name, 0) for name in ("429", "408", "timeout"))
    return sum(summary.failed.values()) - known + summary.wrong + summary.unsent


def row(load: float, step_s: float, runs: list[Summary]) -> dict[str, Any]:
    """One load's row of the table: medians over its rounds."""

    def median(values: list[float | None]) -> float:
        return statistics.median(float("nan") if value is None else value for value in values)

    p50_s = median([run.latency_s["p50"] for run in runs])
    p99_s = median([run.latency_s["p99"] for run in runs])
    return {
        "load": f"{load:.0%}",
        "offered/s": median([run.offered_rate for run in runs]),
        "throughput/s": median([goodput(run) + run.late / run.duration_s for run in runs]),
        "goodput/s": median([goodput(run) for run in runs]),
        "p50 ms": p50_s * 1e3,
        "p99 ms": p99_s * 1e3,
        "p50 in steps": p50_s / step_s,
        "p99 in steps": p99_s / step_s,
        "shed (429)": median([share(run, "429") for run in runs]),
        "expired (408)": median([share(run, "408") for run in runs]),
        "no answer in time": median([share(run, "timeout") for run in runs]),
        "other failures": sum(others(run) for run in runs),
        "client lag p99 ms": median([run.generator_lag_s["p99"] for run in runs]) * 1e3,
    }


def kept_at_overload(runs: dict[float, list[Summary]]) -> float:
    """Goodput at the highest load over the best at saturation: the median of the rounds' ratios."""
    rounds = range(len(runs[LOADS[-1]]))
    return statistics.median(
        goodput(runs[LOADS[-1]][number]) / max(goodput(runs[load][number]) for load in SATURATION)
        for number in rounds
    )


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--a", type=float, default=0.02, help="seconds per batch")
    parser.add_argument("--b", type=float, default=0.0005, help="seconds per row")
    parser.add_argument("--max-batch-rows", type=int, default=64)
    parser.add_argument("--deadline-steps", type=float, default=10.0, help="in full batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each load and round")
    options = parser.parse_args()
    plan = Plan(options.a, options.b, options.max_batch_rows, options.deadline_steps)
    runs: dict[float, list[Summary]] = {load: [] for load in LOADS}
    with clusters.start(
        "ours",
        engine=f"emulated:{plan.a_s},{plan.b_s}",
        echo_shape=SHAPE,
        max_batch_rows=plan.max_batch_rows,
        max_request_rows=ROWS,
    ) as url:
        for seed in range(options.rounds):
            for load, each in runs.items():
                each.append(simulate(plan.fleet(url, load, options.seconds, seed)))
                print(
                    f"round {seed + 1}: {load:.0%}: {goodput(each[-1]):.0f} of "
                    f"{each[-1].offered_rate:.0f} requests/s in time",
                    flush=True,
                )
    rows = {load: row(load, plan.step_s, each) for load, each in runs.items()}
    reasons = [run.invalid_reason for each in runs.values() for run in each if not run.valid]
    report.show(
        f"Poisson arrivals of {ROWS} rows over {DEVICES} streams, deadline "
        f"{plan.deadline_steps * plan.step_s * 1e3:.0f} ms; ideal capacity {plan.capacity:.0f} "
        f"requests/s, a full batch takes {plan.step_s * 1e3:.0f} ms",
        list(rows.values()),
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s per load; no retries",
            "latency counts from the scheduled send, over requests that were answered or waited "
            "until their deadline; one step is a full batch",
            "goodput counts answers before their deadline, throughput late ones too, from the "
            "second second on; shed, expired and no answer in time are shares of what was offered",
            *(f"a run that says little: {reason}" for reason in reasons),
        ],
        options.json,
        p99_steps_at_80=rows[0.8]["p99 in steps"],
        goodput_3x_over_saturation=kept_at_overload(runs),
        goodput_at_saturation_over_ideal=max(rows[load]["goodput/s"] for load in SATURATION)
        / plan.capacity,
        runs_limited_by_the_clients=float(len(reasons)),
    )


if __name__ == "__main__":
    main()
