"""A fleet cut into shards reports what one process would: counts alike, percentiles within 1%."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.fleet import pacing, result
from edge.fleet.config import FleetConfig
from edge.fleet.report import Run, Summary, summarise
from edge.fleet.run import merged
from edge.fleet.shard import Counters, ShardResult

STATUSES = [result.OK] * 8 + [result.WRONG, result.TIMEOUT, result.UNSENT, 503, result.STOPPED]
BUCKET = 0.01


def fly(seed: int, devices: int, rate: float, shards: int) -> list[ShardResult]:
    """What ``shards`` shards bring back of one run, in which all fates depend on the seed only."""
    plan = pacing.schedule("poisson", rate, 2.0, devices, seed)
    generator = np.random.default_rng(seed)
    count = len(plan)
    fate = generator.choice(STATUSES, count)
    waits_s = generator.gamma(2, 0.02, count)
    lags_s = generator.exponential(0.001, count)
    whole = result.allocate(plan, 4)
    begun = fate != result.UNSENT
    whole["status"] = fate
    whole["lag_s"] = np.where(begun, lags_s, np.nan)
    whole["sent_s"] = np.where(begun, plan.due_s + lags_s, np.nan)
    whole["done_s"] = plan.due_s + np.where(begun, waits_s + lags_s, 1.0)
    whole["rounds"] = np.isin(fate, (result.OK, result.WRONG))
    whole["bytes_up"], whole["queue_s"] = 1000 * begun, waits_s / 2
    parts = []
    for number in range(shards):
        table = whole[plan.device % shards == number]
        ok = int((table["status"] == result.OK).sum())
        answered = np.zeros((4, 2), np.int64)
        seconds = table["done_s"][table["rounds"] > 0].astype(int)
        np.add.at(answered[:, 0], np.minimum(seconds, 3), 1)
        answered[:, 1] = 4 * answered[:, 0]
        sent = int((table["bytes_up"] > 0).sum())
        counters = Counters(
            begun=len(table), ok=ok, failed=len(table) - ok, requests_ok=ok, requests_sent=sent,
            requests_in_window=int(answered[:2, 0].sum()),
            rows_in_window=int(answered[:2, 1].sum()),
        )  # fmt: skip
        parts.append(ShardResult(table, answered, counters, 0.1 / shards, 0.05, 2.0, 2.5))
    return parts


def report(parts: list[ShardResult], devices: int, rate: float) -> Summary:
    config = FleetConfig(
        "http://x",
        workload="echo",
        devices=devices,
        rate=rate,
        duration_s=2.0,
        processes=len(parts),
    )
    whole = merged(parts)
    return summarise(
        Run(
            config=config, model="echo", mode="echo", rounds=1, group_size=4, table=whole.table,
            answered=whole.answered, counters=whole.counters, cpu_s=[0.1], busy_ratios=[0.05],
            window_s=2.0, elapsed_s=2.5, interrupted=False, start_s=0.0, samples=[],
        )
    )  # fmt: skip


def alike(one: Any, many: Any, name: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == many.keys(), name
        for key in one:
            alike(one[key], many[key], f"{name}.{key}")
    elif isinstance(one, float) and many is not None:
        assert abs(one - many) <= BUCKET * abs(one), (name, one, many)
    else:  # counts, names, and what there is too little of to say
        assert one == many, name


@settings(max_examples=25)
@given(
    st.integers(0, 2**31), st.integers(1, 300), st.floats(5, 2000), st.integers(2, 9), st.randoms()
)
def test_shards_report_what_one_process_does(
    seed: int, devices: int, rate: float, shards: int, order: Any
) -> None:
    one = report(fly(seed, devices, rate, 1), devices, rate)
    parts = fly(seed, devices, rate, shards)
    order.shuffle(parts)  # the first to end is heard first
    many = report(parts, devices, rate)
    for item in dataclasses.fields(Summary):
        if item.name not in ("processes", "series"):
            alike(getattr(one, item.name), getattr(many, item.name), item.name)
    assert one.series.offered == many.series.offered
    assert one.series.answered == many.series.answered


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(2, 9), st.randoms())
def test_a_merged_table_is_the_table_of_one(
    seed: int, devices: int, shards: int, order: Any
) -> None:
    parts = fly(seed, devices, 500, shards)
    order.shuffle(parts)
    one, many = merged(fly(seed, devices, 500, 1)), merged(parts)
    assert many.table.tobytes() == one.table.tobytes()
    assert np.array_equal(many.answered, one.answered) and many.counters == one.counters
