"""Percentiles that were seen, each with the interval that the number of samples allows.

The interval is of order statistics: how many of the samples lie below the true quantile is
binomial, whatever the distribution, so two ranks enclose it with 95% or more. Where the samples are
too few for both ranks to exist the percentile is not stated: "not enough samples" is then the
figure. That takes 6 samples for the median, 36 for p90, 368 for p99 and 3,688 for p99.9.

Latencies in a queue hang together, and the binomial law takes them for independent: an interval is
the least that is not known. :mod:`edge.fleet.compare` draws whole seconds instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
LABELS = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9"}

Percentiles = dict[str, float | None]
Intervals = dict[str, tuple[float, float] | None]
Floats = npt.NDArray[np.float64]


def rank(count: int, q: float) -> int:
    """The place, from 1, of the smallest of ``count`` ordered samples that covers the share q."""
    return max(1, math.ceil(q * count - 1e-9))


@lru_cache(maxsize=256)
def ranks(count: int, q: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Places (from 1) of two ordered samples between which the quantile q lies.

    Each side errs with at most half of ``1 - confidence``, exactly and for every distribution.
    None where ``count`` is too small for one of them.
    """
    if count < 1:
        return None
    spread = 12 * math.sqrt(count * q * (1 - q)) + 30  # beyond it lies less than 1e-30
    low = max(0, int(count * q - spread))
    high = min(count, int(count * q + spread) + 1)
    below = np.arange(low, high + 1)  # how many samples lie below the quantile
    steps = np.log(count - below[:-1]) - np.log(below[1:]) + math.log(q / (1 - q))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    chances = np.exp(logs - logs.max())
    at_most = np.cumsum(chances / chances.sum())
    half = (1 - confidence) / 2
    # The first rank whose sample would be above the quantile too often, and the first rarely below.
    lower = low + int(np.searchsorted(at_most, half, side="right"))
    upper = low + int(np.searchsorted(at_most, 1 - half, side="left")) + 1
    return None if lower < 1 or upper > count else (lower, upper)


def percentiles(values: Floats) -> Percentiles:
    """Observed values at the quantiles, and the largest; None where samples are too few."""
    ordered = np.sort(values)
    count = len(ordered)
    figures: Percentiles = {
        name: float(ordered[rank(count, q) - 1]) if ranks(count, q) else None
        for name, q in QUANTILES.items()
    }
    figures["max"] = float(ordered[-1]) if count else None
    return figures


def intervals(values: Floats) -> Intervals:
    """Where each percentile lies with 95%; None where it is not stated."""
    ordered = np.sort(values)
    found: Intervals = {}
    for name, q in QUANTILES.items():
        places = ranks(len(ordered), q)
        found[name] = places and (float(ordered[places[0] - 1]), float(ordered[places[1] - 1]))
    return found


def observed(values: Floats) -> Percentiles:
    """What was seen lately, for a live view and for a bound: a quantile q of 1 / (1 - q) samples.

    Not a statement about the cloud, so without an interval; None where nothing lies beyond it.
    """
    ordered = np.sort(values)
    count = len(ordered)
    return {
        name: float(ordered[rank(count, q) - 1]) if count * (1 - q) > 1 - 1e-9 else None
        for name, q in QUANTILES.items()
    }


def samples_needed(q: float, confidence: float = CONFIDENCE) -> int:
    """From how many samples on the quantile q is stated."""
    half = (1 - confidence) / 2
    return math.ceil(math.log(half) / math.log(max(q, 1 - q)) - 1e-9)


def missing(figures: Mapping[str, object]) -> list[str]:
    """Labels of the percentiles that are not stated."""
    return [LABELS[name] for name in QUANTILES if figures.get(name) is None]
