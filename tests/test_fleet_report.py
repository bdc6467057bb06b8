"""From rows to figures: tables of known rows, and the properties that make a report honest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.fleet import pacing, report, result
from edge.fleet.config import FleetConfig
from edge.fleet.report import Run, summarise
from edge.fleet.stats import Sample, use

COUNTERS = {
    "requests_sent": 0,
    "requests_in_window": 0,
    "rows_in_window": 0,
    "retries": 0,
    "reconnects": 0,
    "moved": 0,
    "duplicates": 0,
    "late": 0,
    "misrouted": 0,
    "unmatched": 0,
    "unreadable": 0,
    "came": 0,
    "left": 0,
    "dropped": 0,
}


def make_run(rate: float = 100, duration_s: float = 10, latency_s: float = 0.02) -> Run:
    """A run in which every inference was answered right, ``latency_s`` after its schedule."""
    config = FleetConfig(
        url="http://cloud", workload="echo", rate=rate, duration_s=duration_s, pacer="constant"
    )
    plan = pacing.schedule("constant", rate, duration_s, config.devices, 0)
    table = result.allocate(plan, rows=4)
    count = len(table)
    table["sent_s"] = table["scheduled_s"] + 0.001
    table["lag_s"] = 0.001
    table["done_s"] = table["scheduled_s"] + latency_s
    table["status"] = result.OK
    table["rounds"] = 1
    table["queue_s"], table["compute_s"], table["batch_rows"] = 0.003, 0.004, 16
    table["bytes_up"], table["bytes_down"] = 400, 800
    counters = COUNTERS | {
        "requests_sent": count,
        "requests_in_window": count,
        "rows_in_window": 4 * count,
    }
    answered = np.zeros((int(duration_s) + 5, 2), np.int64)
    answered[: int(duration_s)] = count // int(duration_s)
    return Run(
        config=config,
        model="echo",
        mode="echo",
        rounds=1,
        group_size=4,
        table=table,
        answered=answered,
        counters=counters,
        cpu_s=[1.0, 2.0],
        busy_ratios=[0.1, 0.2],
        window_s=duration_s,
        elapsed_s=duration_s + latency_s,
        interrupted=False,
        start_s=1000.0,
        samples=[
            Sample(999.5, "one", 5.0, 50.0, 10, 100),
            Sample(1004.5, "one", 7.5, 55.0, 60, 900),
            Sample(1009.5, "one", 10.0, 60.0, 110, 1700),
        ],
    )


def test_a_clean_run_adds_up() -> None:
    summary = summarise(make_run())
    assert summary.valid and summary.invalid_reason is None and summary.exit_code == 0
    assert summary.ok == summary.inferences == 1000 and summary.failed == {}
    assert summary.offered_rate == summary.throughput == summary.offered_inferences_per_s == 100
    assert summary.rows_per_s == 400
    assert summary.inferences_per_s == pytest.approx(100, abs=0.3)
    assert summary.latency_s["p50"] == pytest.approx(0.02)
    assert summary.latency_from_send_s["p99"] == pytest.approx(0.019)
    assert summary.generator_lag_s["p99"] == pytest.approx(0.001)
    assert summary.queue_s == pytest.approx(0.003) and summary.compute_s == pytest.approx(0.004)
    assert summary.batch_rows_mean == 16 and summary.engine_busy_ratio == pytest.approx(0.5)
    assert summary.batch_rows_per_request == 16
    assert summary.bytes_up_per_input == 100 and summary.bytes_down_per_input == 200
    assert summary.generator_cpu_s_per_request == pytest.approx(0.003)
    assert summary.generator_cpu_ratio == 0.2


def test_json_holds_what_was_promised() -> None:
    promised = {
        "valid",
        "invalid_reason",
        "clients",
        "offered_rate",
        "throughput",
        "rows_per_s",
        "ok",
        "failed",
        "retries",
        "unsent",
        "wrong",
        "latency_s",
        "latency_from_send_s",
        "generator_lag_s",
        "batch_rows_mean",
        "engine_busy_ratio",
    }
    read = json.loads(json.dumps(summarise(make_run()).as_dict(), allow_nan=False))
    assert promised <= set(read)
    assert {"p50", "p90", "p99", "p999"} <= set(read["latency_s"])
    assert "series" not in read


def test_every_inference_is_in_exactly_one_place() -> None:
    run = make_run()
    codes = [result.OK, result.WRONG, result.UNSENT, result.STOPPED, result.TIMEOUT, 503, 429, 408]
    run.table["status"] = np.resize(codes, len(run.table))
    summary = summarise(run)
    assert summary.failed == {"timeout": 125, "408": 125, "429": 125, "503": 125}
    parts = (summary.ok, summary.wrong, summary.unsent, summary.stopped)
    assert parts == (125, 125, 125, 125)
    assert sum(parts) + sum(summary.failed.values()) == summary.inferences
    assert summary.exit_code == 1


def test_giving_up_never_makes_a_percentile_better() -> None:
    run = make_run()
    slow = run.table[::10]  # one in ten is answered after 3 s ...
    slow["done_s"] = slow["scheduled_s"] + 3
    patient = summarise(run).latency_s
    slow["status"] = result.TIMEOUT  # ... or given up then
    assert summarise(run).latency_s == patient
    assert patient["p99"] == pytest.approx(3)
    slow["status"] = 429  # a refusal is quick, and says nothing about how long answers take
    slow["done_s"] = slow["scheduled_s"] + 0.001
    assert summarise(run).latency_s["p50"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("count", "known"),
    [
        (0, []),
        (1, []),
        (2, ["p50"]),
        (9, ["p50"]),
        (10, ["p50", "p90"]),
        (99, ["p50", "p90"]),
        (100, ["p50", "p90", "p99"]),
        (999, ["p50", "p90", "p99"]),
        (1000, ["p50", "p90", "p99", "p999"]),
    ],
)
def test_too_few_samples_give_no_percentile(count: int, known: list[str]) -> None:
    figures = report.percentiles(np.arange(count, dtype=np.float64))
    assert [name for name in report.QUANTILES if figures[name] is not None] == known


@given(st.integers(1000, 1200), st.integers(0, 99), st.sampled_from([3, 1000, 10**6]))
@settings(max_examples=20, deadline=None)
def test_percentiles_are_observed_values_that_cover_their_share(
    count: int, seed: int, distinct: int
) -> None:
    values = np.random.default_rng(seed).integers(0, distinct, count).astype(float).tolist()
    figures = report.percentiles(np.array(values))
    for name, q in report.QUANTILES.items():
        bound = figures[name]
        assert bound in values and bound is not None
        assert sum(value <= bound for value in values) >= q * len(values)
        assert sum(value < bound for value in values) < q * len(values)


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_merged_shards_say_what_one_process_says(shards: int, seed: int) -> None:
    run = make_run()
    generator = np.random.default_rng(seed)
    run.table["done_s"] += generator.exponential(0.05, len(run.table))
    run.table["status"] = generator.choice([result.OK, result.TIMEOUT, 503], len(run.table))
    parts = [run.table[run.table["device"] % shards == number] for number in range(shards)]
    merged = result.merge(parts[::-1])
    assert np.array_equal(merged, run.table)
    assert summarise(replace(run, table=merged)) == summarise(run)


def test_a_row_reads_back_as_a_value() -> None:
    row = result.result(make_run().table, 7)
    assert row.index == 7 and row.status == result.OK and row.rows == 4
    assert row.latency_s == pytest.approx(0.02)
    with pytest.raises(AttributeError):
        row.status = 500  # type: ignore[misc]


def test_a_generator_that_lags_invalidates_the_run() -> None:
    run = make_run()
    run.table["lag_s"][::50] = 0.06
    summary = summarise(run)
    assert not summary.valid and summary.exit_code == 3
    assert summary.invalid_reason is not None and "60 ms" in summary.invalid_reason


def test_an_inference_that_was_never_begun_counts_as_lag() -> None:
    run = make_run()
    never = run.table[::20]
    never["lag_s"], never["sent_s"], never["done_s"] = math.nan, math.nan, math.nan
    never["status"] = result.UNSENT
    summary = summarise(run)
    assert summary.unsent == 50 and not summary.valid


@pytest.mark.parametrize(
    ("lag_s", "cpu", "count", "word"),
    [
        (0.0, 0.1, 0, "no inference"),
        (0.051, 0.1, 1, "51 ms"),
        (0.02, 0.95, 1, "95%"),
        (0.005, 0.95, 1, None),
        (0.02, 0.5, 1, None),
    ],
)
def test_reasons(lag_s: float, cpu: float, count: int, word: str | None) -> None:
    reason = report.invalid_reason(lag_s, cpu, count)
    assert (reason is None) if word is None else (reason is not None and word in reason)


@pytest.mark.parametrize("stray", ["duplicates", "misrouted", "unmatched", "unreadable"])
def test_stray_answers_are_not_a_success(stray: str) -> None:
    run = make_run()
    assert summarise(replace(run, counters={**run.counters, stray: 1})).exit_code == 1


def test_an_empty_run_is_invalid_and_still_reported() -> None:
    run = make_run()
    empty: dict[str, Any] = {"table": run.table[:0], "counters": COUNTERS, "samples": []}
    summary = summarise(replace(run, **empty))
    assert summary.exit_code == 3
    assert summary.latency_s["p50"] is None and summary.engine_busy_ratio is None
    json.dumps(summary.as_dict(), allow_nan=False)


def test_series_count_what_the_summary_counts() -> None:
    run = make_run()
    run.table["done_s"][300:400] += 1  # all that fell due in the fourth second
    series = summarise(run).series
    assert series.second == list(range(10))
    assert series.offered == series.answered == [100.0] * 10
    assert series.p50_s[3] == pytest.approx(1.02) and series.p50_s[4] == pytest.approx(0.02)
    assert series.engine_busy[4] == pytest.approx(0.5) and math.isnan(series.engine_busy[5])
    assert series.batch_rows[9] == 16
    shares = [share for share, _ in series.latencies_s]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_part_of_a_second_is_scaled_up() -> None:
    run = make_run(rate=100, duration_s=2.5)
    assert summarise(run).series.offered == pytest.approx([100, 100, 100], rel=0.03)


def test_replicas_are_kept_apart() -> None:
    samples = [
        Sample(0, "a", 100.0, 1000.0, 10, 100),
        Sample(0, "b", 0.0, 1.0, 0, 0),
        Sample(10, "b", 5.0, 11.0, 10, 40),
        Sample(10, "a", 101.0, 1010.0, 20, 200),
        Sample(10, "c", 9.0, 9.0, 90, 90),  # seen once: nothing is known about it
    ]
    assert use(samples).busy_ratio == pytest.approx(6 / 20)
    assert use(samples).batch_rows_mean == pytest.approx(140 / 20)
    assert use(samples[:2]).busy_ratio is None
