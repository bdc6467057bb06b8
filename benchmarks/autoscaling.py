"""How many requests miss their deadline, and for how many replica-hours, under three autoscalers?

Emulated replicas (a + b * rows seconds per batch), 1 to 64 of them, on seeded traces; every policy
sees the same traces. Each rival is swept over its target and its delays, and is shown at its best:
the fewest misses at no more replica-hours than ours, and the fewest replica-hours at no more
misses.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import report
from benchmarks.autoscaling_policies import GpuShare, OngoingRequests, PredictedWait
from benchmarks.autoscaling_traces import TRACES
from benchmarks.autoscaling_world import Outcome, Plan, Policy, simulate
from deployments.autoscaling import Settings

OURS, ONGOING, GPU = "predicted wait", "ongoing requests (Ray Serve)", "GPU% (HPA)"
SHIPPED = "headroom 0.15, down 120 s, bursts 1"
Make = Callable[[Plan], Policy]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One trace under one way of starting.

    Attributes:
        trace: its name.
        plan: the emulated replica.
        skip_s: at the beginning, not counted: a cluster has been running for long, and ours is to
            have seen a burst before.
    """

    trace: str
    plan: Plan
    skip_s: int = 0

    @property
    def name(self) -> str:
        """As the table says it."""
        spread = f", streams move in {self.plan.spread_s:g} s" if self.plan.spread_s else ""
        first = ", from the first second" if self.trace == "burst" and not self.skip_s else ""
        return f"{self.trace}, start {self.plan.start_s:g} s{spread}{first}"


SCENARIOS = (
    Scenario("burst", Plan(start_s=20), 1800),
    Scenario("burst", Plan(start_s=90), 1800),
    Scenario("burst", Plan(start_s=20, spread_s=60), 1800),
    Scenario("burst", Plan(start_s=20)),
    Scenario("diurnal", Plan(start_s=20)),
    Scenario("diurnal", Plan(start_s=90)),
    Scenario("ramp", Plan(start_s=20)),
    Scenario("ramp", Plan(start_s=90)),
)


def _ours(headroom: float, down_s: float, burst_share: float) -> Make:
    def make(plan: Plan) -> Policy:
        settings = Settings(
            wait_target_s=0.75 * plan.deadline_s,
            headroom=headroom,
            lead_s=plan.start_s + plan.spread_s / 2,
            down_window_s=down_s,
            burst_share=burst_share,
        )
        return PredictedWait(plan, settings)

    return make


def _ongoing(target: float, up_s: float, down_s: float, fast: bool) -> Make:
    seconds = {"look_back_s": 5.0, "push_s": 1.0} if fast else {}
    return lambda plan: OngoingRequests(
        plan, target, up_delay_s=up_s, down_delay_s=down_s, **seconds
    )


def _gpu(share: float, reading: Literal["busy", "active"], down_s: float) -> Make:
    return lambda plan: GpuShare(share, reading, stabilisation_s=down_s)


def candidates() -> dict[tuple[str, str], Make]:
    """Every policy with every setting of the sweep, by names."""
    found: dict[tuple[str, str], Make] = {}
    windows = (60.0, 120.0, 300.0)
    for down_s in windows:
        for share in (0.0, 0.5, 0.75, 1.0):
            for headroom in (0.15, 0.3):
                text = f"headroom {headroom:g}, down {down_s:g} s, bursts {share:g}"
                found[OURS, text] = _ours(headroom, down_s, share)
    for target in (2, 4, 8, 16, 32, 48, 64, 96):
        name = f"target {target}"
        found[ONGOING, f"{name}, Serve's defaults"] = _ongoing(target, 30, 600, False)
        for down_s in windows:
            text = f"{name}, up 0 s, down {down_s:g} s, metrics every second"
            found[ONGOING, text] = _ongoing(target, 0, down_s, True)
    for down_s in windows:
        for share in (0.8, 0.85, 0.9):
            found[GPU, f"busy {share:g}, down {down_s:g} s"] = _gpu(share, "busy", down_s)
        for share in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7):
            found[GPU, f"active {share:g}, down {down_s:g} s"] = _gpu(share, "active", down_s)
    return found


@dataclass(frozen=True, slots=True)
class Point:
    """One policy with one setting, over all seeds."""

    policy: str
    setting: str
    runs: tuple[Outcome, ...]

    @property
    def misses(self) -> float:
        """Share of requests, the mean over seeds."""
        return statistics.mean(run.miss_share for run in self.runs)

    @property
    def hours(self) -> float:
        """Replica-hours, the mean over seeds."""
        return statistics.mean(run.replica_hours for run in self.runs)


def run(scenario: Scenario, seed: int) -> list[Outcome]:
    """All candidates on one scenario with one seed."""
    plan, makers = scenario.plan, candidates()
    rate = TRACES[scenario.trace](seed) * plan.capacity
    policies = [make(plan) for make in makers.values()]
    first = [math.ceil(rate[0] / plan.capacity / 0.7)] * len(policies)
    rates = [rate] * len(policies)
    return simulate(plan, rates, policies, seed, first, skip_s=scenario.skip_s)


def run_all(scenarios: Sequence[Scenario], seeds: int, processes: int) -> list[list[Point]]:
    """Per scenario, every candidate over all seeds."""
    jobs = [(scenario, seed) for scenario in scenarios for seed in range(seeds)]
    context = multiprocessing.get_context("spawn")
    outcomes = []
    with ProcessPoolExecutor(processes, context) as pool:
        for (scenario, seed), found in zip(
            jobs, pool.map(run, *zip(*jobs, strict=True)), strict=True
        ):
            print(f"{scenario.name}, seed {seed}: done", flush=True)
            outcomes.append(found)
    return [
        [
            Point(*names, tuple(each))
            for names, each in zip(
                candidates(), zip(*outcomes[start : start + seeds], strict=True), strict=True
            )
        ]
        for start in range(0, len(jobs), seeds)
    ]


def shipped(points: list[Point]) -> Point:
    """Ours as it ships."""
    return next(p for p in points if (p.policy, p.setting) == (OURS, SHIPPED))


def best(points: list[Point], policy: str, ours: Point) -> tuple[Point, Point | None]:
    """A rival's fewest misses at no more replica-hours, and fewest hours at no more misses.

    Where no setting of its needs so few replica-hours, the one with the fewest.
    """
    own = [point for point in points if point.policy == policy]
    cheap = [point for point in own if point.hours <= ours.hours]
    good = [point for point in own if point.misses <= ours.misses]
    fewest = min(cheap, key=lambda p: p.misses) if cheap else min(own, key=lambda p: p.hours)
    return fewest, min(good, key=lambda p: p.hours, default=None)


def row(scenario: Scenario, point: Point, what: str) -> dict[str, Any]:
    """One row of the table."""
    misses = [100 * each.miss_share for each in point.runs]
    hours = [each.replica_hours for each in point.runs]
    return {
        "trace": scenario.name,
        "policy": point.policy,
        "chosen as": what,
        "setting": point.setting,
        "misses %": statistics.mean(misses),
        "from to %": f"{min(misses):.2f} to {max(misses):.2f}",
        "replica-hours": statistics.mean(hours),
        "from to h": f"{min(hours):.1f} to {max(hours):.1f}",
        "changes": statistics.mean(each.changes for each in point.runs),
        "most": max(each.most for each in point.runs),
    }


def rows(scenario: Scenario, points: list[Point]) -> list[dict[str, Any]]:
    """Ours, and each rival at its best."""
    ours = shipped(points)
    found = [row(scenario, ours, "as shipped")]
    for policy in (ONGOING, GPU):
        fewest, cheapest = best(points, policy, ours)
        within = fewest.hours <= ours.hours
        what = "fewest misses at our hours" if within else "fewest hours, more than ours"
        found.append(row(scenario, fewest, what))
        if cheapest is not None:
            found.append(row(scenario, cheapest, "fewest hours at our misses"))
    return found


def figures(points: list[Point], name: str) -> dict[str, float]:
    """Ours against each rival: misses at our hours, and hours at our misses."""
    ours = shipped(points)
    found = {f"{name}_misses": ours.misses, f"{name}_replica_hours": ours.hours}
    for policy, key in ((ONGOING, "ongoing"), (GPU, "gpu")):
        fewest, cheapest = best(points, policy, ours)
        found[f"{name}_misses_over_{key}"] = ours.misses / max(fewest.misses, 1e-9)
        if cheapest is not None:
            found[f"{name}_hours_over_{key}"] = ours.hours / cheapest.hours
    return found


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scenario", type=int, action="append", help="only these; 0 is the first")
    parser.add_argument("--sweep", type=Path, help="write every setting's figures here, by line")
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    sweep: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    scenarios = [SCENARIOS[n] for n in options.scenario or range(len(SCENARIOS))]
    results = run_all(scenarios, options.seeds, options.processes)
    for scenario, points in zip(scenarios, results, strict=True):
        table += rows(scenario, points)
        sweep += [
            {
                "trace": scenario.name,
                "policy": point.policy,
                "setting": point.setting,
                "miss_share": [round(each.miss_share, 6) for each in point.runs],
                "replica_hours": [round(each.replica_hours, 3) for each in point.runs],
                "changes": [each.changes for each in point.runs],
            }
            for point in points
        ]
        key = f"{scenario.trace}_{scenario.plan.start_s:g}s"
        key += "_streams" if scenario.plan.spread_s else ""
        key += "_first" if "first" in scenario.name else ""
        found |= figures(points, key)
    plan = SCENARIOS[0].plan
    report.show(
        f"Emulated replicas of {plan.a_s:g} + {plan.b_s:g} * rows seconds per batch of at most "
        f"{plan.max_batch_rows} rows, requests of {plan.request_rows} rows, deadline "
        f"{plan.deadline_s:g} s",
        table,
        [
            f"means of {options.seeds} seeds and their range; {len(candidates())} settings on each "
            "trace, of which ours stays as shipped and each rival is shown at its best",
            "misses: requests refused as they could not be in time; none is sent again",
            "replica-hours count from the decision, so starting replicas cost",
            "bursts: the first half-hour is not counted, but for the row that says so",
        ],
        options.json,
        **found,
    )
    if options.sweep is not None:
        options.sweep.write_text("\n".join(json.dumps(point) for point in sweep) + "\n")


if __name__ == "__main__":
    main()
