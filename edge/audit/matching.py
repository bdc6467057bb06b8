"""The oracle that matches what was claimed of a group's members with the members, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Array = npt.NDArray[Any]


def assign(gain: Array) -> npt.NDArray[np.int64]:
    """For each row the column it is matched with, so that the sum of gains is the largest.

    Shortest augmenting paths with potentials, in n^3 (Kuhn, "The Hungarian method for the
    assignment problem", 1955; Jonker and Volgenant, Computing 38, 1987).

    Args:
        gain: (n, n), finite.

    Returns:
        (n,) a permutation of the columns.

    Raises:
        ConfigError: not square, or a value that is not finite.
    """
    n = len(gain)
    if gain.shape != (n, n) or not n or not np.isfinite(gain).all():
        raise ConfigError(f"gains have shape {gain.shape}, expected (n, n), finite")
    cost = -gain.astype(np.float64)
    # Column n stands for "none yet": a path begins there.
    row_of = np.full(n + 1, -1)
    of_rows, of_columns = np.zeros(n), np.zeros(n + 1)
    for row in range(n):
        row_of[n] = row
        column = n
        shortest = np.full(n, np.inf)
        before = np.full(n, n)
        done = np.zeros(n + 1, bool)
        while row_of[column] >= 0:
            done[column] = True
            here = row_of[column]
            reduced = cost[here] - of_rows[here] - of_columns[:n]
            better = ~done[:n] & (reduced < shortest)
            shortest[better], before[better] = reduced[better], column
            step_to = int(np.where(done[:n], np.inf, shortest).argmin())
            step = shortest[step_to]
            of_rows[row_of[done]] += step
            of_columns[done] -= step
            shortest[~done[:n]] -= step
            column = step_to
        while column != n:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    found = np.empty(n, np.int64)
    found[row_of[:n]] = np.arange(n)
    return found


def common(first: Array, second: Array) -> int:
    """How many members two collections have in common, each counted as often as both have it."""
    values, counts = np.unique(first, return_counts=True)
    others, other_counts = np.unique(second, return_counts=True)
    _, here, there = np.intersect1d(values, others, return_indices=True)
    return int(np.minimum(counts[here], other_counts[there]).sum())
