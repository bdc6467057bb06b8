"""Two runs side by side: is B better than A, worse, or is no difference seen?

Intervals are of a bootstrap over whole seconds. An overloaded second is slow for everybody in it,
so its inferences hang together; seconds are drawn with what they hold, and a run of 60 s is taken
for 60 things seen and not for its thousands of inferences. Each figure has its own 95%: of twenty
figures that do not differ, one is called different.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.audit.intervals import of_share
from edge.fleet import result
from edge.fleet.quantiles import LABELS, QUANTILES, rank
from edge.fleet.report import Run, Summary, summarise
from edge.fleet.series import waited, warm

RESAMPLES = 1000
FEWEST_SECONDS = 10
"""Below that many seconds after the warm-up nothing is said of a difference."""
_BINS_PER_UNIT = 1000  # of the logarithm: a latency is known to 0.1%

BETTER, WORSE, SAME = "better", "worse", "no difference seen"
FEW, OTHER_LOAD = "not enough samples", "other load"
_LOAD_BOUND = 0.02
_Z = 1.959964

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both runs.

    Attributes:
        name: what it is.
        unit: of ``a``, ``b`` and ``difference``.
        a: of the first run; None where it is not stated.
        b: of the second run.
        difference: b - a.
        difference_interval: where it lies with 95%.
        ratio: b / a; None where a is 0.
        ratio_interval: where it lies with 95%.
        verdict: of b: ``better``, ``worse``, ``no difference seen``, ``not enough samples``, or
            ``other load`` for a rate of answers where the rates of questions differ.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    difference: float | None
    difference_interval: tuple[float, float] | None
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        a: name of the first run.
        b: name of the second run.
        notes: what makes the two hard to compare, a sentence each.
        differences: figure by figure.
    """

    a: str
    b: str
    notes: list[str]
    differences: list[Difference]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def compare(a: tuple[str, Run], b: tuple[str, Run], seed: int = 0) -> Comparison:
    """Compare two runs.

    Args:
        a: name and run that the other is measured against.
        b: name and run.
        seed: of the bootstrap; the same seed gives the same intervals.
    """
    summaries = summarise(a[1]), summarise(b[1])
    # A generator for each: a run does not look the same as itself only by the luck of the draw.
    drawn = [
        _Resampled(run, np.random.default_rng([seed, place]))
        for place, (_, run) in enumerate((a, b))
    ]
    seconds = min(one.seconds for one in drawn)
    differences = []
    for name, q in QUANTILES.items():
        stated = [summary.latency_s[name] for summary in summaries]
        many = all(value is not None for value in stated)
        differences.append(
            _difference(
                f"latency {LABELS[name]}",
                "s",
                stated,
                [one.quantile(q) for one in drawn] if many else None,
                seconds,
                smaller_is_better=True,
            )
        )
    other = _load_differs(*summaries)
    for name, column, values in (
        ("answered right", "right", [one.inferences_per_s for one in summaries]),
        ("goodput", "good", [one.goodput_inferences_per_s for one in summaries]),
    ):
        rates = [one.rate(column) for one in drawn]
        found = _difference(name, "inferences/s", values, rates, seconds, smaller_is_better=False)
        differences.append(replace(found, verdict=OTHER_LOAD) if other else found)
    differences.append(_failed(summaries, [one.share_failed() for one in drawn], seconds))
    return Comparison(a[0], b[0], _notes((a[0], b[0]), summaries), differences)


class _Resampled:
    """One run, drawn again ``RESAMPLES`` times second by second."""

    def __init__(self, run: Run, generator: np.random.Generator) -> None:
        config, table = run.config, run.table
        seconds = max(1, math.ceil(run.window_s))
        due = np.minimum(table["scheduled_s"].astype(np.int64), seconds - 1)
        done = table["done_s"]
        latency_s = result.latency_s(table)
        right = table["status"] == result.OK
        soon = right if config.slo_s is None else right & (latency_s <= config.slo_s)
        in_time = done < run.window_s

        def count(where: npt.NDArray[np.bool_], place: npt.NDArray[np.int64]) -> Floats:
            return np.bincount(place[where], minlength=seconds)[:seconds].astype(np.float64)

        ended = np.clip(np.nan_to_num(done), 0, seconds - 1).astype(np.int64)
        self._counts = {
            "due": count(table["status"] != result.CANCELLED, due),
            "right_due": count(right, due),
            "right": count(right & in_time, ended),
            "good": count(soon & in_time, ended),
        }
        self._weights = self._draw(generator, seconds)
        self._window_s = run.window_s
        first = math.floor(config.warm_up_s)
        self._first = first if seconds - first >= 1 else 0
        kept = waited(table) & warm(table, config.warm_up_s)
        self._tail = self._draw(generator, seconds - self._first)
        self.seconds = seconds - self._first
        self._enough = self.seconds >= FEWEST_SECONDS
        self._bin(latency_s[kept], due[kept] - self._first, seconds - self._first)

    @staticmethod
    def _draw(generator: np.random.Generator, seconds: int) -> Floats:
        """(RESAMPLES, seconds) how often each second is drawn."""
        chances = np.full(seconds, 1 / seconds)
        return generator.multinomial(seconds, chances, RESAMPLES).astype(np.float64)

    def _bin(self, latency_s: Floats, due: npt.NDArray[np.int64], seconds: int) -> None:
        """Count latencies by second and by 0.1% of their size."""
        places = np.round(np.log(np.maximum(latency_s, 1e-6)) * _BINS_PER_UNIT)
        values, where = np.unique(places, return_inverse=True)
        self._values_s = np.exp(values / _BINS_PER_UNIT)
        flat = np.bincount(due * len(values) + where, minlength=seconds * len(values))
        # Counts are below 2^24, so single precision is exact.
        self._histogram = flat.reshape(seconds, len(values)).astype(np.float32)

    def quantile(self, q: float) -> Floats | None:
        """(RESAMPLES,) the quantile of each draw; None where there are too few seconds."""
        if not self._enough or not len(self._values_s):
            return None
        found = np.empty(RESAMPLES)
        for begin in range(0, RESAMPLES, 200):  # a slice at a time: memory
            drawn = self._tail[begin : begin + 200].astype(np.float32) @ self._histogram
            below = np.cumsum(drawn, axis=1, dtype=np.float64)
            for place, counts in enumerate(below):
                total = int(round(counts[-1]))
                if not total:
                    return None
                at = int(np.searchsorted(counts, rank(total, q) - 0.5))
                found[begin + place] = self._values_s[at]
        return found

    def rate(self, column: str) -> Floats | None:
        """(RESAMPLES,) inferences per second."""
        if not self._enough:
            return None
        rates: Floats = self._weights @ self._counts[column] / self._window_s
        return rates

    def share_failed(self) -> Floats | None:
        """(RESAMPLES,) share of what was due that was not answered right."""
        if not self._enough:
            return None
        due = np.maximum(self._weights @ self._counts["due"], 1)
        shares: Floats = 1 - self._weights @ self._counts["right_due"] / due
        return shares


def _difference(
    name: str,
    unit: str,
    stated: Sequence[float | None],
    draws: Sequence[Floats | None] | None,
    seconds: int,
    smaller_is_better: bool,
) -> Difference:
    a, b = stated
    if a is None or b is None:
        return Difference(name, unit, a, b, None, None, None, None, FEW)
    difference, ratio = b - a, b / a if a else None
    if draws is None or draws[0] is None or draws[1] is None:
        return Difference(name, unit, a, b, difference, None, ratio, None, FEW)
    apart = _span(draws[1] - draws[0], difference, seconds)
    ratios = None
    if ratio is not None and (draws[0] > 0).all():
        ratios = _span(draws[1] / draws[0], ratio, seconds)
    verdict = SAME
    if apart[0] > 0 or apart[1] < 0:
        verdict = BETTER if (apart[1] < 0) == smaller_is_better else WORSE
    return Difference(name, unit, a, b, difference, apart, ratio, ratios, verdict)


def _failed(
    summaries: tuple[Summary, Summary], draws: Sequence[Floats | None], seconds: int
) -> Difference:
    """The share of what was due, and not given up by the device, that was not answered right.

    As wide as the wider of the bootstrap and Newcombe's interval (Statistics in Medicine 17, 1998),
    each way: where nothing failed the bootstrap knows nothing.
    """
    name, unit = "not answered right", "share"
    asked = [one.inferences - one.cancelled for one in summaries]
    shares = [
        1 - one.ok / count if count else None for one, count in zip(summaries, asked, strict=True)
    ]
    found = _difference(name, unit, shares, draws, seconds, smaller_is_better=True)
    if found.difference is None or found.difference_interval is None:
        return found
    a, b = (
        of_share(share, count)
        for share, count in zip((found.a or 0.0, found.b or 0.0), asked, strict=True)
    )
    newcombe = (
        found.difference - math.hypot(b.value - b.low, a.high - a.value),
        found.difference + math.hypot(b.high - b.value, a.value - a.low),
    )
    low = min(found.difference_interval[0], newcombe[0])
    high = max(found.difference_interval[1], newcombe[1])
    verdict = WORSE if low > 0 else BETTER if high < 0 else SAME
    return replace(found, difference_interval=(low, high), verdict=verdict)


def _span(drawn: Floats, value: float, seconds: int) -> tuple[float, float]:
    """The middle 95% about ``value``, stretched for how few seconds were drawn from.

    A bootstrap of n things is too narrow by sqrt((n - 1) / n), and by the normal law where
    Student's holds.
    """
    low, high = np.percentile(drawn, (2.5, 97.5))
    student = _Z + (_Z**3 + _Z) / (4 * (seconds - 1))  # to 0.3% from 10 on
    stretch = student / _Z * math.sqrt(seconds / (seconds - 1))
    return min(0.0, float(low) - value) * stretch + value, (
        max(0.0, float(high) - value) * stretch + value
    )


def _load_differs(a: Summary, b: Summary) -> bool:
    return abs(b.offered_rate - a.offered_rate) > _LOAD_BOUND * max(a.offered_rate, b.offered_rate)


def _notes(names: tuple[str, str], summaries: tuple[Summary, Summary]) -> list[str]:
    """What a reader must know before the figures."""
    notes = [
        f"{name} is not valid: {one.invalid_reason}"
        for name, one in zip(names, summaries, strict=True)
        if not one.valid
    ]
    a, b = summaries
    if _load_differs(a, b):
        notes.append(
            f"the load differs: {a.offered_rate:.1f} and {b.offered_rate:.1f} requests/s offered"
        )
    for word, one, two in (
        ("workload", f"{a.workload}, {a.mode}, {a.model}", f"{b.workload}, {b.mode}, {b.model}"),
        ("rows per request", str(a.group_size), str(b.group_size)),
        ("rounds", str(a.rounds), str(b.rounds)),
        ("devices", str(a.clients), str(b.clients)),
        ("SLO", f"{a.slo_s} s", f"{b.slo_s} s"),
        ("warm-up", f"{a.warm_up_s:g} s", f"{b.warm_up_s:g} s"),
    ):
        if one != two:
            notes.append(f"the {word} differs: {one} and {two}")
    return notes
