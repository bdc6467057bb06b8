"""All rows of a run -> one summary and its series over time.

Definitions are in docs/fleet.md. Two rules hold everywhere: a latency counts from the schedule, and
an inference that the cloud kept waiting until the deadline counts with the time it waited, so that
giving up never makes a percentile look better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.offline import OfflineTraffic
from edge.fleet.profiles import as_dicts, charged
from edge.fleet.quantiles import Floats, intervals, observed
from edge.fleet.quantiles import percentiles as percentiles
from edge.fleet.result import Table
from edge.fleet.series import series, waited, warm
from edge.fleet.stats import Sample, use
from edge.fleet.summary import Summary as Summary
from edge.fleet.terms import Terms
from edge.fleet.waterfall import by_profile, slowest, waterfall

LAG_BOUND_S = 0.05
CPU_BOUND = 0.9
CPU_LAG_BOUND_S = 0.01


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was recorded, merged over the shards.

    Attributes:
        config: what was simulated.
        model: the model's name.
        mode: the bundle's mode, or ``echo``.
        rounds: requests per inference.
        group_size: rows per request.
        table: a row per inference that fell due.
        answered: (seconds, 2) messages and rows answered per second.
        counters: the shards' counters, added up.
        cpu_s: processor time of each shard.
        busy_ratios: of each shard, its share of a core while inferences fell due.
        window_s: for how long inferences fell due.
        elapsed_s: until the last one ended.
        interrupted: the run was stopped before its end.
        start_s: the common start by the monotonic clock.
        samples: the cloud's statistics.
        terms: what may be said about privacy; None for ``echo``.
        offline: what was asked of operator B; None but in the mode split.
        lost: inferences that had begun and have no row, where the run was killed; None where it
            came to its end.
        start_error_s: by how much the shards' common start may differ, on several machines.
        fault: what else went wrong, so that the figures do not stand; else None.
    """

    config: FleetConfig
    model: str
    mode: str
    rounds: int
    group_size: int
    table: Table
    answered: npt.NDArray[np.int64]
    counters: Mapping[str, int]
    cpu_s: Sequence[float]
    busy_ratios: Sequence[float]
    window_s: float
    elapsed_s: float
    interrupted: bool
    start_s: float
    samples: Sequence[Sample]
    lost: int | None = None
    start_error_s: float = 0.0
    fault: str | None = None
    terms: Terms | None = None
    offline: OfflineTraffic | None = None


def generator_lag(table: Table, elapsed_s: float) -> Floats:
    """How late each first message was ready, in seconds; one never begun is late until the end."""
    lag = table["lag_s"].astype(np.float64)
    return np.where(np.isnan(lag), elapsed_s - table["scheduled_s"], lag)


def invalid_reason(lag_p99_s: float, cpu_ratio: float, inferences: int) -> str | None:
    """Say why the figures are not the cloud's; None where they are."""
    if not inferences:
        return "no inference fell due, so there is nothing to report"
    if lag_p99_s > LAG_BOUND_S:
        return (
            f"generator lag p99 is {lag_p99_s * 1e3:.0f} ms, expected at most "
            f"{LAG_BOUND_S * 1e3:.0f} ms: the generator was the limit, not the cloud"
        )
    if cpu_ratio > CPU_BOUND and lag_p99_s > CPU_LAG_BOUND_S:
        return (
            f"a generator process used {cpu_ratio:.0%} of a core and lagged "
            f"{lag_p99_s * 1e3:.0f} ms at p99: the generator was the limit, not the cloud"
        )
    return None


def summarise(run: Run) -> Summary:
    """Fold a run into its summary."""
    table, config, counters = run.table, run.config, run.counters
    statuses, counts = np.unique(table["status"], return_counts=True)
    by_status = dict(zip(statuses.tolist(), counts.tolist(), strict=True))
    ok = by_status.pop(result.OK, 0)
    wrong = by_status.pop(result.WRONG, 0)
    unsent = by_status.pop(result.UNSENT, 0)
    stopped = by_status.pop(result.STOPPED, 0)
    cancelled = by_status.pop(result.CANCELLED, 0)
    failed = {result.kind(code): n for code, n in by_status.items()}

    lags_s = generator_lag(table, run.elapsed_s)
    lag = percentiles(lags_s)
    lag_p99_s = observed(lags_s)["p99"] or lag["max"] or 0.0
    cpu_ratio = max(run.busy_ratios, default=0.0)
    reason = run.fault or _cut_off(run) or invalid_reason(lag_p99_s, cpu_ratio, len(table))

    # Masks and columns: a copy of the whole table would take longer than all sums over it.
    counted = warm(table, config.warm_up_s)
    kept = counted & waited(table)
    sent = kept & ~np.isnan(table["sent_s"])
    latency_s = result.latency_s(table)[kept]
    from_send_s = (table["done_s"] - table["sent_s"])[sent]
    soon = _within(table, config.slo_s)

    answered = np.isin(table["status"], (result.OK, result.WRONG))
    inputs = int(answered.sum()) * run.group_size
    rounds = int(table["rounds"][counted].sum())
    in_window = (table["status"] == result.OK) & (table["done_s"] < run.window_s)
    # Without the drain at the end, in which the engine has little to do.
    during = [s for s in run.samples if s.at_s <= run.start_s + run.window_s + 1]
    cloud = use(during if len(during) > 1 else run.samples)
    classified = config.workload == "bundle" and not config.precompute
    steps = stages(config)

    def per_s(count: int) -> float:
        return count / run.window_s if run.window_s > 0 else 0.0

    def share(column: str, known: bool) -> float | None:
        return float(table[column][answered].sum()) / inputs if inputs and known else None

    def per_request(column: str) -> float | None:
        return float(table[column][counted].sum(dtype=np.float64)) / rounds if rounds else None

    requests = counters["requests_sent"]
    return Summary(
        valid=reason is None,
        invalid_reason=reason,
        interrupted=run.interrupted,
        loop=config.loop,
        arrivals=config.pacer,
        workload=config.workload,
        mode=run.mode,
        **_privacy(run.terms),
        model=run.model,
        stem=steps["stem"],
        mix=steps["mix"],
        encode=steps["encode"],
        demix=steps["demix"],
        head=steps["head"],
        profiles=as_dicts(config.profiles),
        verified=config.verify,
        clients=config.devices,
        processes=len(run.cpu_s),
        duration_s=run.window_s,
        elapsed_s=run.elapsed_s,
        seed=config.seed,
        group_size=run.group_size,
        rounds=run.rounds,
        warm_up_s=config.warm_up_s,
        warm_up_inferences=int((~counted).sum()),
        slo_s=config.slo_s,
        offered_rate=per_s(len(table) * run.rounds),
        retried_rate=per_s(counters["retries"]),
        throughput=per_s(counters["requests_in_window"]),
        offered_inferences_per_s=per_s(len(table)),
        inferences_per_s=per_s(int(in_window.sum())),
        goodput_inferences_per_s=per_s(int((in_window & soon).sum())),
        rows_per_s=per_s(counters["rows_in_window"]),
        inferences=len(table),
        ok=ok,
        within_slo=None if config.slo_s is None else int(soon.sum()),
        failed=failed,
        wrong=wrong,
        unsent=unsent,
        stopped=stopped,
        cancelled=cancelled,
        requests=requests,
        retries=counters["retries"],
        reconnects=counters["reconnects"],
        moved=counters["moved"],
        duplicates=counters["duplicates"],
        late=counters["late"],
        misrouted=counters["misrouted"],
        unmatched=counters["unmatched"],
        unreadable=counters["unreadable"],
        came=counters["came"],
        left=counters["left"],
        dropped=counters["dropped"],
        latency_samples=len(latency_s),
        latency_s=percentiles(latency_s),
        latency_interval_s=intervals(latency_s),
        latency_from_send_s=percentiles(from_send_s),
        latency_from_send_interval_s=intervals(from_send_s),
        generator_lag_s=lag,
        queue_s=per_request("queue_s"),
        compute_s=per_request("compute_s"),
        waterfall_s=waterfall(table, counted),
        waterfall_slowest_s=waterfall(table, slowest(table, counted)),
        by_profile=by_profile(
            table, [profile.name for profile in config.profiles], config.warm_up_s
        ),
        batch_rows_mean=cloud.batch_rows_mean,
        batch_rows_per_request=per_request("batch_rows"),
        engine_busy_ratio=cloud.busy_ratio,
        generator_cpu_s_per_request=sum(run.cpu_s) / requests if requests else None,
        generator_cpu_ratio=cpu_ratio,
        bytes_up_per_input=share("bytes_up", True),
        bytes_down_per_input=share("bytes_down", True),
        **_offline(run.offline, run.group_size),
        accuracy_cloud=share("correct", classified),
        accuracy_local=share("correct_local", classified and config.verify),
        accuracy_edge_only=None if run.terms is None else run.terms.accuracy_edge_only,
        series=series(run),
        start_error_s=run.start_error_s,
    )


def _privacy(terms: Terms | None) -> dict[str, Any]:
    if terms is None:
        return dict.fromkeys(("promise", "bits_per_input", "known_break", "not_private"))
    promised = terms.promise
    return {
        "promise": promised.text,
        "bits_per_input": promised.bits_per_input if promised.mode != "mix" else None,
        "known_break": promised.known_break,
        "not_private": terms.not_private,
    }


def _offline(traffic: OfflineTraffic | None, group_size: int) -> dict[str, Any]:
    """Figures of operator B, apart from those of operator A."""
    inputs = 0 if traffic is None else traffic.fetched * group_size
    return {
        "masks_fetched": traffic and traffic.fetched,
        "masks_used": traffic and traffic.used,
        "masks_waited": traffic and traffic.waited,
        "offline_requests": traffic and traffic.requests,
        "offline_retries": traffic and traffic.retries,
        "offline_bytes_up_per_input": traffic.bytes_up / inputs if traffic and inputs else None,
        "offline_bytes_down_per_input": traffic.bytes_down / inputs if traffic and inputs else None,
    }


def _within(table: Table, slo_s: float | None) -> npt.NDArray[np.bool_]:
    """Which inferences were answered right and soon enough to be of use."""
    good: npt.NDArray[np.bool_] = table["status"] == result.OK
    if slo_s is not None:
        good &= table["done_s"] - table["scheduled_s"] <= slo_s
    return good


def _cut_off(run: Run) -> str | None:
    """Say that a run was killed: the inferences under way then are missing, the slow ones first."""
    if run.lost is None:
        return None
    return (
        f"the run was cut off after {run.elapsed_s:.1f} s, and {run.lost} inferences that had "
        f"begun have no row"
    )


def stages(config: FleetConfig) -> dict[str, str]:
    """For each step on the device, whether it really ran or its time was charged."""
    bundle = config.workload == "bundle"
    run = dict.fromkeys(("mix", "demix", "head"), "run" if bundle else "none")
    run = {"stem": "cached" if bundle else "none", "encode": "run", **run}
    words = {True: "charged", None: "partly charged"}
    found = {stage: words.get(charged(config.profiles, stage), word) for stage, word in run.items()}
    return found | {"stem": "precomputed"} if config.precompute else found
