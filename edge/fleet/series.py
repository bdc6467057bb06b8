"""A run over time: everything that a plot needs, cut into seconds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge.fleet import result
from edge.fleet.quantiles import rank
from edge.fleet.stats import Sample, use

if TYPE_CHECKING:
    from edge.fleet.report import Run

LONGEST = 600
"""Bins at most; a longer run has bins of several seconds."""
_BATCH_BINS = 24

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Series:
    """The run second by second: lists of one length; NaN where nothing is known.

    Attributes:
        second: the start of each bin, counted from the start of the run.
        width_s: how long a bin is: 1, or more where the run is longer than :data:`LONGEST`.
        offered: requests due per second (inferences times rounds).
        answered: requests answered per second.
        retried: messages sent again per second, of the inferences that fell due in that bin.
        p50_s: median latency of the inferences that fell due in that bin.
        p99_s: their 99th percentile (the largest, where there are fewer than 100).
        batch_rows: mean rows of the cloud's batches.
        engine_busy: share of the time in which the engine computed.
        failures: by kind, inferences per second that fell due in that bin and were not answered
            right.
        latencies_s: (q, latency) points of the latency's distribution, warm-up excluded.
        batches: (rows from, rows below, share) of requests by the size of their batch.
    """

    second: list[float]
    width_s: float
    offered: list[float]
    answered: list[float]
    retried: list[float]
    p50_s: list[float]
    p99_s: list[float]
    batch_rows: list[float]
    engine_busy: list[float]
    failures: dict[str, list[float]]
    latencies_s: list[tuple[float, float]]
    batches: list[tuple[float, float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: what is not known is None."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def waited(table: result.Table) -> Bools:
    """Which inferences have a latency: answered, or kept waiting until the deadline.

    A refusal is quick and says nothing about how long an answer takes; it counts as a failure.
    """
    statuses = (result.OK, result.WRONG, result.TIMEOUT, result.UNSENT)
    kept: Bools = np.isin(table["status"], statuses) & ~np.isnan(table["done_s"])
    return kept


def warm(table: result.Table, warm_up_s: float) -> Bools:
    """Which inferences count for the latency figures: due at ``warm_up_s`` or later."""
    late: Bools = table["scheduled_s"] >= warm_up_s
    return late


def series(run: Run) -> Series:
    """Cut a run into bins. The last may be a part; its rates are scaled up."""
    table = run.table
    seconds = max(1, math.ceil(run.window_s))
    width_s = math.ceil(seconds / LONGEST)
    count = math.ceil(seconds / width_s)
    starts_s = np.arange(count) * width_s
    widths_s = np.clip(run.window_s - starts_s, 1e-3, width_s)
    bins = np.minimum(table["scheduled_s"].astype(np.int64) // width_s, count - 1)
    kept = waited(table)
    latency_s = result.latency_s(table)
    middle, tail = _tails(bins[kept], latency_s[kept], count)
    batch_rows, busy = _engine(run, count, width_s)

    def per_s(weights: npt.ArrayLike, where: Bools | slice = slice(None)) -> list[float]:
        found: list[float] = (
            np.bincount(bins[where], np.asarray(weights)[where], count) / widths_s
        ).tolist()
        return found

    ones = np.ones(len(table))
    padded = np.zeros(count * width_s)
    heard = run.answered[: len(padded), 0]
    padded[: len(heard)] = heard
    return Series(
        second=starts_s.astype(float).tolist(),
        width_s=float(width_s),
        offered=per_s(ones * run.rounds),
        answered=(padded.reshape(count, width_s).sum(axis=1) / widths_s).tolist(),
        retried=per_s(table["retries"]),
        p50_s=middle,
        p99_s=tail,
        batch_rows=batch_rows,
        engine_busy=busy,
        failures={
            result.kind(code): per_s(ones, table["status"] == code)
            for code in np.unique(table["status"]).tolist()
            if code not in (result.OK, result.CANCELLED)
        },
        latencies_s=distribution(latency_s[kept & warm(table, run.config.warm_up_s)]),
        batches=_batches(table),
    )


def distribution(latencies_s: Floats, points: int = 400) -> list[tuple[float, float]]:
    """(share of inferences, latency that many do not exceed): at most ``points`` + 1 pairs."""
    ordered = np.sort(latencies_s)
    count = len(ordered)
    places = np.unique(np.linspace(1, count, min(points, count)).astype(int))
    return [(float(place / count), float(ordered[place - 1])) for place in places]


def _tails(
    bins: npt.NDArray[np.int64], latency_s: Floats, count: int
) -> tuple[list[float], list[float]]:
    """Median and 99th percentile of each bin; one sort for all of them."""
    order = np.lexsort((latency_s, bins))
    ordered, edges = latency_s[order], np.searchsorted(bins[order], np.arange(count + 1))
    middle, tail = [math.nan] * count, [math.nan] * count
    for place in range(count):
        first, size = int(edges[place]), int(edges[place + 1] - edges[place])
        if size:
            middle[place] = float(ordered[first + rank(size, 0.5) - 1])
            tail[place] = float(ordered[first + rank(size, 0.99) - 1])
    return middle, tail


def _batches(table: result.Table) -> list[tuple[float, float, float]]:
    """A histogram over the answered inferences, by the mean batch of their requests."""
    answered = table["rounds"] > 0
    rows = table["batch_rows"][answered] / table["rounds"][answered]
    if not len(rows) or not rows.max() > 0:
        return []
    step = max(1, math.ceil((rows.max() + 1) / _BATCH_BINS))
    edges = np.arange(0, rows.max() + step + 1, step)
    counts, _ = np.histogram(rows, edges)
    shares = counts / len(rows)
    return [
        (float(low), float(high), float(share))
        for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True)
    ]


def _engine(run: Run, count: int, width_s: int) -> tuple[list[float], list[float]]:
    """Batch rows and engine use per bin, from neighbouring samples of one replica."""
    rows, busy = [math.nan] * count, [math.nan] * count
    last: dict[str, Sample] = {}
    for sample in run.samples:
        before = last.get(sample.replica)
        last[sample.replica] = sample
        place = math.floor((sample.at_s - run.start_s) / width_s)
        if before is None or not 0 <= place < count:
            continue
        between = use([before, sample])
        rows[place] = math.nan if between.batch_rows_mean is None else between.batch_rows_mean
        busy[place] = math.nan if between.busy_ratio is None else between.busy_ratio
    return rows, busy


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
