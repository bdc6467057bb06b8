"""Runs that look like runs: every part takes its time, some seconds are slow, some fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edge.fleet import result
from edge.fleet.profiles import Profile
from edge.fleet.recorder import Recorder
from edge.fleet.report import Run, summarise
from edge.fleet.stats import Sample
from edge.fleet.waterfall import PARTS
from tests.test_fleet_report import make_run

PROFILES = tuple(Profile(name, 1 / 3) for name in ("phone", "microcontroller", "laptop"))
_MEANS_S = (0.004, 0.0003, 0.0002, 0.008, 0.003, 0.006, 0.003, 0.0004, 0.0001)


def lively(
    seed: int, rate: float = 100, duration_s: float = 20, slow: float = 1.0, failing: float = 0.01
) -> Run:
    """A run of three profiles with a slow start; ``slow`` stretches what the cloud takes."""
    generator = np.random.default_rng(seed)
    run = make_run(rate=rate, duration_s=duration_s)
    table = run.table
    count = len(table)
    for part, mean_s in zip(PARTS, _MEANS_S, strict=True):
        table[part] = generator.gamma(4, mean_s / 4, count)
    level = generator.exponential(1, int(duration_s) + 1)[table["scheduled_s"].astype(int)]
    table["queue_s"] *= slow * (0.5 + level)
    table["profile"] = table["device"] % 3
    spent_s = sum(table[part].astype(np.float64) for part in PARTS)
    table["done_s"] = table["scheduled_s"] + spent_s + generator.exponential(0.002, count)
    table["done_s"] += 0.08 * (table["scheduled_s"] < 1.5)
    table["batch_rows"] = 4 * generator.integers(1, 40, count)
    bad = generator.random(count) < failing
    codes = [503, result.TIMEOUT, result.CONNECTION]
    table["status"][bad] = generator.choice(codes, int(bad.sum()))
    table["retries"] = bad
    samples = [
        Sample(1000 + second, "one", 5 + 0.4 * second, 50.0 + second, 50 * second, 800 * second)
        for second in range(int(duration_s) + 1)
    ]
    return replace(
        run,
        samples=samples,
        config=replace(run.config, warm_up_s=2.0, slo_s=0.1, profiles=PROFILES),
        counters={**run.counters, "retries": int(bad.sum())},
    )


def record(folder: Path, run: Run) -> Path:
    """Write a run's folder, as ``datamix simulate --out`` does."""
    recorder = Recorder(replace(run.config, out=str(folder)))
    recorder.begin(
        model=run.model,
        mode=run.mode,
        rounds=run.rounds,
        group_size=run.group_size,
        start_s=run.start_s,
        terms=run.terms,
    )
    for sample in run.samples:
        recorder.sample(sample)
    recorder.end(run, summarise(run))
    return folder
