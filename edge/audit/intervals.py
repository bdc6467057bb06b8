"""95% intervals: of a mean by bootstrap over groups, of a share by Wilson, of an AUC by both."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Array = npt.NDArray[Any]

Z = 1.959963984540054
"""Of the standard normal: 95% lies within so many deviations."""
RESAMPLES = 2000


class Interval(NamedTuple):
    """A value and where it lies with 95%."""

    value: float
    low: float
    high: float


def of_mean(by_group: Array, seed: int = 0) -> Interval:
    """Mean over groups, by percentile bootstrap over groups (Efron, 1979) with a fixed seed.

    Members of a group were mixed with each other, so groups are what is drawn again, not members.

    Args:
        by_group: (groups,) one figure each.
        seed: of the resampling.

    Raises:
        ConfigError: no group.
    """
    if by_group.ndim != 1 or not len(by_group):
        raise ConfigError(f"figures by group have shape {by_group.shape}, expected (groups,)")
    rng = np.random.default_rng([seed, len(by_group)])
    means = [
        by_group[rng.integers(0, len(by_group), len(by_group))].mean() for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    value = float(by_group.mean())
    return Interval(value, min(value, float(low)), max(value, float(high)))


def of_share(share: float, count: int) -> Interval:
    """A share of ``count`` trials (Wilson, JASA 22, 1927); not degenerate at 0 and 1.

    Raises:
        ConfigError: no trial, or a share outside 0 to 1.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ConfigError(f"share is {share} of {count}, expected 0 to 1 of at least 1")
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count)
    half *= math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def of_grouped_share(hits_by_group: Array, size: int, seed: int = 0) -> Interval:
    """Share of members that are hits: as wide as the wider of Wilson and the bootstrap, each way.

    An attack may succeed on whole groups, which Wilson does not know; the bootstrap knows nothing
    where all groups are alike.

    Args:
        hits_by_group: (groups,) how many of the ``size`` members.
        size: K.
        seed: of the resampling.
    """
    shares = hits_by_group / size
    mean = of_mean(shares, seed)
    wilson = of_share(min(1.0, mean.value), len(shares) * size)
    return Interval(mean.value, min(mean.low, wilson.low), max(mean.high, wilson.high))


def auc(scores: Array, positive: Array) -> float:
    """How likely a positive scores above a negative; ties count half (Mann and Whitney, 1947).

    Raises:
        ConfigError: no positive, or no negative.
    """
    ups, downs = int(positive.sum()), int((~positive).sum())
    if not ups or not downs:
        raise ConfigError(f"{ups} positives and {downs} negatives, expected some of both")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]
    return float((ranks[positive.reshape(-1)].sum() - ups * (ups + 1) / 2) / (ups * downs))


def of_pairs(scores: Array, linked: Array, seed: int = 0) -> Interval:
    """AUC over pairs of groups, by bootstrap over groups: a group's pairs hang together.

    Args:
        scores: (groups, groups).
        linked: (groups, groups) bool; both are read above the diagonal.
        seed: of the resampling.

    Raises:
        ConfigError: no linked pair, or none that is not.
    """
    count = len(scores)
    first, second = np.triu_indices(count, 1)
    value = auc(scores[first, second], linked[first, second])
    symmetric = np.triu(scores, 1) + np.triu(scores, 1).T
    rng = np.random.default_rng([seed, count])
    found = []
    for _ in range(RESAMPLES // 10):
        chosen = rng.integers(0, count, count)
        rows, columns = chosen[first], chosen[second]
        apart = rows != columns  # a group drawn twice says nothing about two groups
        rows, columns = rows[apart], columns[apart]
        flags = linked[np.minimum(rows, columns), np.maximum(rows, columns)]
        if flags.any() and not flags.all():
            found.append(auc(symmetric[rows, columns], flags))
    low, high = np.percentile(found or [value], (2.5, 97.5))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def of_chance_auc(ups: int, downs: int) -> Interval:
    """The AUC of scores that say nothing, over so many positives and negatives."""
    half = Z * math.sqrt((ups + downs + 1) / (12 * ups * downs))
    return Interval(0.5, max(0.0, 0.5 - half), min(1.0, 0.5 + half))
