"""All rows of a run -> one summary and its series over time.

Definitions are in docs/fleet.md. Two rules hold everywhere: a latency counts from the schedule, and
an inference that the cloud kept waiting until the deadline counts with the time it waited, so that
giving up never makes a percentile look better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.offline import OfflineTraffic
from edge.fleet.profiles import as_dicts, charged
from edge.fleet.result import Table
from edge.fleet.stats import Sample, use
from edge.fleet.terms import ECHO, Terms
from edge.promises import sentence

LAG_BOUND_S = 0.05
CPU_BOUND = 0.9
CPU_LAG_BOUND_S = 0.01

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}

Percentiles = dict[str, float | None]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """The run second by second: lists of one length; NaN where nothing is known.

    Attributes:
        second: the start of each second, counted from the start of the run.
        offered: requests due per second (inferences times rounds).
        answered: requests answered per second.
        p50_s: median latency of the inferences that fell due in that second.
        p99_s: their 99th percentile (the largest, where there are fewer than 100).
        batch_rows: mean rows of the cloud's batches.
        engine_busy: share of the second in which the engine computed.
        latencies_s: (q, latency) points of the latency's distribution, for a plot.
    """

    second: list[float]
    offered: list[float]
    answered: list[float]
    p50_s: list[float]
    p99_s: list[float]
    batch_rows: list[float]
    engine_busy: list[float]
    latencies_s: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run says.

    Every inference that fell due is in exactly one of ok, failed, wrong, unsent, stopped and
    cancelled.

    Attributes:
        valid: whether the figures are the cloud's, and not the generator's own limit.
        invalid_reason: one sentence where they are not.
        interrupted: the run was stopped before its end.
        loop: ``open``, or ``closed``, where a device asks again once it has its answer: a cloud
            that slows down is then asked less, and a stall hardly shows in any latency.
        arrivals: the law by which inferences fell due.
        workload: ``bundle`` or ``echo``.
        mode: what leaves the devices: ``mix``, ``bounded``, ``split``, or ``echo``.
        promise: what the mode promises, in a line; None for ``echo``.
        bits_per_input: most that the operator who gets the features learns of one input, all rounds
            together; None where there is no bound.
        known_break: what is known to get around the mode; None for ``echo``.
        not_private: why both ends of ``split`` seem to have one operator, so that the promise does
            not hold; else None.
        model: the model's name.
        stem: ``cached`` (computed once per input, not charged per inference), ``charged`` (added
            to each inference, from a profile), ``partly charged`` (by some profiles) or ``none``.
        mix: ``run``, ``charged``, ``partly charged`` or ``none``, which is said of what a workload
            without a model does not have.
        encode: the same, of making messages.
        demix: the same, of de-mixing and bridges.
        head: the same, of the head.
        profiles: what each kind of device charges, its link, its share of the devices and where
            that is from; none for devices as fast as the generator on this machine's own link.
        verified: every answer was compared with the locally computed one.
        clients: devices, each with a stream.
        processes: how many processes held them.
        duration_s: for how long inferences fell due.
        elapsed_s: until the last one ended.
        seed: of the schedule.
        group_size: rows per request.
        rounds: requests per inference.
        offered_rate: requests due per second.
        throughput: requests answered per second, within ``duration_s``.
        offered_inferences_per_s: inferences due per second.
        inferences_per_s: of those, answered right, per second of ``duration_s``.
        rows_per_s: rows answered per second, within ``duration_s``.
        inferences: inferences that fell due.
        ok: answered right.
        failed: by HTTP status, or ``timeout``, ``connection``, ``answer`` (not what was asked).
        wrong: answered with other values than the local ones.
        unsent: due, but nothing left the device before the deadline.
        stopped: under way when the run was interrupted.
        cancelled: given up by the device of its own accord, or left behind when it went; in no
            latency, because nobody knows how long they would have taken.
        requests: messages sent, retries included.
        retries: messages sent again.
        reconnects: streams opened again.
        moved: messages sent again because the cloud had moved the stream unread.
        duplicates: second answers to one message.
        late: answers after the device had given up.
        misrouted: answers that came to another device.
        unmatched: answers that nobody had asked for.
        unreadable: messages that were no response.
        came: devices that came back after they had gone.
        left: devices that went.
        dropped: streams that a storm dropped.
        latency_s: of inferences, from the scheduled send.
        latency_from_send_s: of inferences, from the real send.
        generator_lag_s: real minus scheduled time of the first message.
        queue_s: waiting in the cloud, per request, by the cloud's clock (mean).
        compute_s: the engine's step, per request, by the cloud's clock (mean).
        batch_rows_mean: rows per batch, from the replica's statistics; None where it gives none.
        batch_rows_per_request: rows of the batch that a request was in, on average.
        engine_busy_ratio: share of time the engine computed; None where it gives no statistics.
        generator_cpu_s_per_request: processor time of all processes per message sent.
        generator_cpu_ratio: of the busiest process, in cores.
        bytes_up_per_input: sent per classified input, all rounds; ``split``: to operator A.
        bytes_down_per_input: received per classified input, all rounds; ``split``: from operator A.
        masks_fetched: groups that operator B answered seeds for; None but in ``split``, like all
            that is said of it.
        masks_used: of those, that an inference took; the rest was wiped.
        masks_waited: inferences that fell due and found no masks ready.
        offline_requests: messages to operator B, retries included.
        offline_retries: messages sent again to it.
        offline_bytes_up_per_input: sent to it per input that masks were fetched for.
        offline_bytes_down_per_input: received from it, likewise.
        accuracy_cloud: share of inputs with the labelled class, by way of the cloud.
        accuracy_local: the same inputs, computed locally.
        accuracy_edge_only: of a network that never uses the cloud, as the bundle says.
        series: the run second by second; not in the JSON.
        start_error_s: by how much the shards' common start may differ, where they are on several
            machines; 0 on one.
    """

    valid: bool
    invalid_reason: str | None
    interrupted: bool
    loop: str
    arrivals: str
    workload: str
    mode: str
    promise: str | None
    bits_per_input: float | None
    known_break: str | None
    not_private: str | None
    model: str
    stem: str
    mix: str
    encode: str
    demix: str
    head: str
    profiles: list[dict[str, Any]]
    verified: bool
    clients: int
    processes: int
    duration_s: float
    elapsed_s: float
    seed: int
    group_size: int
    rounds: int
    offered_rate: float
    throughput: float
    offered_inferences_per_s: float
    inferences_per_s: float
    rows_per_s: float
    inferences: int
    ok: int
    failed: dict[str, int]
    wrong: int
    unsent: int
    stopped: int
    cancelled: int
    requests: int
    retries: int
    reconnects: int
    moved: int
    duplicates: int
    late: int
    misrouted: int
    unmatched: int
    unreadable: int
    came: int
    left: int
    dropped: int
    latency_s: Percentiles
    latency_from_send_s: Percentiles
    generator_lag_s: Percentiles
    queue_s: float | None
    compute_s: float | None
    batch_rows_mean: float | None
    batch_rows_per_request: float | None
    engine_busy_ratio: float | None
    generator_cpu_s_per_request: float | None
    generator_cpu_ratio: float
    bytes_up_per_input: float | None
    bytes_down_per_input: float | None
    masks_fetched: int | None
    masks_used: int | None
    masks_waited: int | None
    offline_requests: int | None
    offline_retries: int | None
    offline_bytes_up_per_input: float | None
    offline_bytes_down_per_input: float | None
    accuracy_cloud: float | None
    accuracy_local: float | None
    accuracy_edge_only: float | None
    series: Series = field(repr=False)
    start_error_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything but the series, ready for JSON."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "series"
        }

    @property
    def privacy(self) -> str:
        """The mode, its promise and its known break; first why nothing holds, where it does not."""
        if self.promise is None or self.known_break is None:
            return ECHO
        return sentence(self.promise, self.known_break, self.not_private)

    @property
    def exit_code(self) -> int:
        """0: valid, and every inference answered right; 1: the cloud failed some; 3: invalid."""
        if not self.valid:
            return 3
        strays = self.duplicates + self.misrouted + self.unmatched + self.unreadable
        clean = not (self.failed or self.wrong or self.unsent or strays) and self.ok > 0
        return 0 if clean else 1


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
    terms: Terms | None = None
    offline: OfflineTraffic | None = None


def percentiles(values: Floats) -> Percentiles:
    """Observed values at the quantiles, and the largest; None where samples are too few.

    A quantile q needs 1 / (1 - q) samples: below that nothing was seen beyond it, and a figure
    would be made up.
    """
    ordered = np.sort(values)
    count = len(ordered)
    figures: Percentiles = {
        name: float(ordered[math.ceil(q * count) - 1]) if count * (1 - q) > 1 - 1e-9 else None
        for name, q in QUANTILES.items()
    }
    figures["max"] = float(ordered[-1]) if count else None
    return figures


def waited(table: Table) -> npt.NDArray[np.bool_]:
    """Which inferences have a latency: answered, or kept waiting until the deadline.

    A refusal is quick and says nothing about how long an answer takes; it counts as a failure.
    """
    statuses = (result.OK, result.WRONG, result.TIMEOUT, result.UNSENT)
    kept: npt.NDArray[np.bool_] = np.isin(table["status"], statuses) & ~np.isnan(table["done_s"])
    return kept


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
    failed = {result.STATUS_NAMES.get(code, str(code)): n for code, n in by_status.items()}

    kept = table[waited(table)]
    sent = kept[~np.isnan(kept["sent_s"])]
    lag = percentiles(generator_lag(table, run.elapsed_s))
    lag_p99_s = lag["p99"] if lag["p99"] is not None else lag["max"] or 0.0
    cpu_ratio = max(run.busy_ratios, default=0.0)
    reason = invalid_reason(lag_p99_s, cpu_ratio, len(table))

    answered = table[np.isin(table["status"], (result.OK, result.WRONG))]
    inputs = len(answered) * run.group_size
    rounds = int(table["rounds"].sum())
    in_window = (table["status"] == result.OK) & (table["done_s"] < run.window_s)
    # Without the drain at the end, in which the engine has little to do.
    during = [s for s in run.samples if s.at_s <= run.start_s + run.window_s + 1]
    cloud = use(during if len(during) > 1 else run.samples)
    bundle = config.workload == "bundle"
    steps = stages(config)

    def per_s(count: int) -> float:
        return count / run.window_s if run.window_s > 0 else 0.0

    def share(column: str, known: bool) -> float | None:
        return float(answered[column].sum()) / inputs if inputs and known else None

    def per_request(column: str) -> float | None:
        return float(table[column].sum(dtype=np.float64)) / rounds if rounds else None

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
        offered_rate=per_s(len(table) * run.rounds),
        throughput=per_s(counters["requests_in_window"]),
        offered_inferences_per_s=per_s(len(table)),
        inferences_per_s=per_s(int(in_window.sum())),
        rows_per_s=per_s(counters["rows_in_window"]),
        inferences=len(table),
        ok=ok,
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
        latency_s=percentiles(kept["done_s"] - kept["scheduled_s"]),
        latency_from_send_s=percentiles(sent["done_s"] - sent["sent_s"]),
        generator_lag_s=lag,
        queue_s=per_request("queue_s"),
        compute_s=per_request("compute_s"),
        batch_rows_mean=cloud.batch_rows_mean,
        batch_rows_per_request=per_request("batch_rows"),
        engine_busy_ratio=cloud.busy_ratio,
        generator_cpu_s_per_request=sum(run.cpu_s) / requests if requests else None,
        generator_cpu_ratio=cpu_ratio,
        bytes_up_per_input=share("bytes_up", True),
        bytes_down_per_input=share("bytes_down", True),
        **_offline(run.offline, run.group_size),
        accuracy_cloud=share("correct", bundle),
        accuracy_local=share("correct_local", bundle and config.verify),
        accuracy_edge_only=None if run.terms is None else run.terms.accuracy_edge_only,
        series=series(run),
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


def stages(config: FleetConfig) -> dict[str, str]:
    """For each step on the device, whether it really ran or its time was charged."""
    bundle = config.workload == "bundle"
    run = dict.fromkeys(("mix", "demix", "head"), "run" if bundle else "none")
    run = {"stem": "cached" if bundle else "none", "encode": "run", **run}
    words = {True: "charged", None: "partly charged"}
    return {stage: words.get(charged(config.profiles, stage), word) for stage, word in run.items()}


def series(run: Run) -> Series:
    """Cut a run into seconds. The last second may be a part; its rates are scaled up."""
    table = run.table
    seconds = max(1, math.ceil(run.window_s))
    widths = np.clip(run.window_s - np.arange(seconds), 1e-3, 1.0)
    bins = np.minimum(table["scheduled_s"].astype(np.int64), seconds - 1)
    offered = np.bincount(bins, minlength=seconds) * run.rounds / widths
    answered = run.answered[:seconds, 0] / widths
    kept = waited(table)
    latency_s = table["done_s"] - table["scheduled_s"]
    middle, tail = [], []
    for second in range(seconds):
        ordered = np.sort(latency_s[kept & (bins == second)])
        count = len(ordered)
        middle.append(float(ordered[math.ceil(count * 0.5) - 1]) if count else math.nan)
        tail.append(float(ordered[math.ceil(count * 0.99) - 1]) if count else math.nan)
    batch_rows, busy = _engine(run, seconds)
    return Series(
        second=[float(second) for second in range(seconds)],
        offered=offered.tolist(),
        answered=answered.tolist(),
        p50_s=middle,
        p99_s=tail,
        batch_rows=batch_rows,
        engine_busy=busy,
        latencies_s=distribution(latency_s[kept]),
    )


def distribution(latencies_s: Floats, points: int = 400) -> list[tuple[float, float]]:
    """(share of inferences, latency that many do not exceed): at most ``points`` + 1 pairs."""
    ordered = np.sort(latencies_s)
    count = len(ordered)
    ranks = np.unique(np.linspace(1, count, min(points, count)).astype(int))
    return [(float(rank / count), float(ordered[rank - 1])) for rank in ranks]


def _engine(run: Run, seconds: int) -> tuple[list[float], list[float]]:
    """Batch rows and engine use per second, from neighbouring samples of one replica."""
    rows, busy = [math.nan] * seconds, [math.nan] * seconds
    last: dict[str, Sample] = {}
    for sample in run.samples:
        before = last.get(sample.replica)
        last[sample.replica] = sample
        second = int(sample.at_s - run.start_s)
        if before is None or not 0 <= second < seconds:
            continue
        between = use([before, sample])
        rows[second] = math.nan if between.batch_rows_mean is None else between.batch_rows_mean
        busy[second] = math.nan if between.busy_ratio is None else between.busy_ratio
    return rows, busy
