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

from datamix.errors import ConfigError
from edge.fleet import pacing, quantiles, report, result
from edge.fleet.config import FleetConfig
from edge.fleet.profiles import Profile
from edge.fleet.report import Run, summarise
from edge.fleet.stats import Sample, use
from edge.fleet.waterfall import PARTS

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
        (5, []),
        (6, ["p50"]),
        (35, ["p50"]),
        (36, ["p50", "p90"]),
        (367, ["p50", "p90"]),
        (368, ["p50", "p90", "p99"]),
        (3687, ["p50", "p90", "p99"]),
        (3688, ["p50", "p90", "p99", "p999"]),
    ],
)
def test_too_few_samples_give_no_percentile(count: int, known: list[str]) -> None:
    figures = report.percentiles(np.arange(count, dtype=np.float64))
    assert [name for name in quantiles.QUANTILES if figures[name] is not None] == known


@given(st.integers(3688, 3900), st.integers(0, 99), st.sampled_from([3, 1000, 10**6]))
@settings(max_examples=20, deadline=None)
def test_percentiles_are_observed_values_that_cover_their_share(
    count: int, seed: int, distinct: int
) -> None:
    values = np.random.default_rng(seed).integers(0, distinct, count).astype(float).tolist()
    figures = report.percentiles(np.array(values))
    for name, q in quantiles.QUANTILES.items():
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


def test_a_warm_up_is_counted_and_in_no_latency() -> None:
    run = make_run()
    first = run.table[:200]  # all that fell due in the first two seconds
    first["done_s"] += 5
    first["queue_s"] = 5
    first["status"][0] = 503
    cold = summarise(replace(run, config=replace(run.config, warm_up_s=2.0)))
    assert cold.warm_up_inferences == 200 and cold.latency_samples == 800
    assert cold.inferences == 1000 and cold.ok == 999 and cold.failed == {"503": 1}
    assert cold.latency_s["max"] == pytest.approx(0.02)
    assert cold.latency_from_send_s["max"] == pytest.approx(0.019)
    assert cold.queue_s == pytest.approx(0.003)
    assert cold.waterfall_s is not None and cold.waterfall_s["queue_s"] == pytest.approx(0.003)
    assert max(latency_s for _, latency_s in cold.series.latencies_s) == pytest.approx(0.02)
    assert max(cold.series.p50_s) > 5  # over time it is shown
    whole = summarise(run)
    assert whole.latency_s["max"] == pytest.approx(5.02)
    same = ("ok", "failed", "throughput", "offered_rate", "inferences_per_s", "generator_lag_s")
    assert [getattr(cold, name) for name in same] == [getattr(whole, name) for name in same]


def test_offered_retried_and_goodput_are_three_figures() -> None:
    run = make_run()
    run.table["done_s"][::4] += 1  # too late to be of use
    run.table["status"][1] = result.WRONG
    run.table["retries"][2:52] = 1
    counters = {**run.counters, "retries": 50}
    tight = replace(run, config=replace(run.config, slo_s=0.1), counters=counters)
    summary = summarise(tight)
    assert summary.offered_rate == 100 and summary.retried_rate == 5
    assert summary.within_slo == 749 and summary.ok == 999
    assert summary.goodput_inferences_per_s == pytest.approx(74.9, abs=0.3)
    assert summary.inferences_per_s > 95
    free = summarise(run)
    assert free.within_slo is None and free.goodput_inferences_per_s == free.inferences_per_s
    assert sum(summary.series.retried) == 50
    assert summary.series.failures == {"wrong": [0.0 if s else 1.0 for s in range(10)]}


def test_a_waterfall_adds_up_to_the_latency() -> None:
    run = make_run()
    for number, part in enumerate(PARTS):
        run.table[part] = number / 10_000
    run.table["done_s"][990:] += 1
    run.table["status"][5] = 503
    summary = summarise(run)
    mean, tail = summary.waterfall_s, summary.waterfall_slowest_s
    assert mean is not None and tail is not None
    assert list(mean) == [*PARTS, "rest_s"]
    assert sum(mean.values()) == pytest.approx(0.02 + 10 / 999)
    assert mean["head_s"] == pytest.approx(8e-4) and tail["head_s"] == pytest.approx(8e-4)
    assert sum(tail.values()) == pytest.approx(1.02)  # the slowest ten
    run.table["status"] = 503
    assert summarise(run).waterfall_s is None


def test_devices_by_profile() -> None:
    run = make_run()
    run.table["profile"] = run.table["device"] % 2
    run.table["done_s"] += run.table["profile"] * 0.5
    run.table["status"][np.flatnonzero(run.table["profile"])[0]] = 503
    phone, other = summarise(
        replace(run, config=replace(run.config, profiles=(Profile("phone"),)))
    ).by_profile
    assert (phone["profile"], other["profile"]) == ("phone", "profile 1")
    assert phone["inferences"] + other["inferences"] == 1000
    assert phone["devices"] + other["devices"] == len(np.unique(run.table["device"]))
    assert other["ok"] == other["inferences"] - 1
    assert phone["latency_s"]["p90"] == pytest.approx(0.02)
    assert other["latency_s"]["p50"] == pytest.approx(0.52)


def test_a_run_that_was_killed_is_not_valid() -> None:
    summary = summarise(replace(make_run(), lost=7))
    assert summary.exit_code == 3 and "7 inferences" in str(summary.invalid_reason)


@pytest.mark.parametrize(("seconds", "width"), [(600, 1), (601, 2), (3000, 5)])
def test_a_long_run_has_wider_bins_and_loses_nothing(seconds: int, width: int) -> None:
    run = make_run(rate=2, duration_s=seconds)
    found = summarise(run).series
    assert found.width_s == width and len(found.second) == -(-seconds // width)
    widths = np.clip(seconds - np.array(found.second), 0, width)
    assert float(np.dot(found.offered, widths)) == pytest.approx(len(run.table))
    assert float(np.dot(found.answered, widths)) == pytest.approx(len(run.table))
    assert found.p50_s == pytest.approx([0.02] * len(found.second))


def test_batches_have_a_histogram() -> None:
    run = make_run()
    run.table["batch_rows"][:250] = 200
    bins = summarise(run).series.batches
    assert sum(share for _, _, share in bins) == pytest.approx(1)
    assert [share for low, high, share in bins if low <= 200 < high] == [0.25]
    json.dumps(summarise(replace(run, samples=[])).series.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "settings", [{"warm_up_s": -1}, {"warm_up_s": 10}, {"warm_up_s": math.nan}, {"slo_s": 0}]
)
def test_a_warm_up_or_slo_that_means_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        FleetConfig(url="http://cloud", workload="echo", duration_s=10, **settings)
