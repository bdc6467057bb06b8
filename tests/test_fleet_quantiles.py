"""Percentiles and their intervals, against the binomial law written out."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.fleet import quantiles
from edge.fleet.quantiles import QUANTILES, intervals, percentiles, ranks, samples_needed


def at_most(count: int, q: Fraction, bound: int) -> Fraction:
    """How likely ``bound`` or fewer of ``count`` samples lie below the quantile: exact."""
    return sum(
        (math.comb(count, k) * q**k * (1 - q) ** (count - k) for k in range(bound + 1)),
        Fraction(0),
    )


@given(st.integers(1, 150), st.sampled_from([Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)]))
@settings(max_examples=60)
def test_ranks_are_the_tightest_that_err_no_more_than_half_on_each_side(
    count: int, q: Fraction
) -> None:
    half = Fraction(25, 1000)
    found = ranks(count, float(q))
    if found is None:
        too_low = (1 - q) ** count > half  # even the smallest sample may lie above
        too_high = q**count > half
        assert too_low or too_high
        return
    low, high = found
    assert at_most(count, q, low - 1) <= half < at_most(count, q, low)
    assert at_most(count, q, high - 1) >= 1 - half > at_most(count, q, high - 2)


@pytest.mark.parametrize("q", QUANTILES.values())
def test_the_number_of_samples_needed_is_the_first_that_has_ranks(q: float) -> None:
    needed = samples_needed(q)
    assert ranks(needed, q) is not None and ranks(needed - 1, q) is None


@pytest.mark.parametrize("count", [10**5, 10**7])
def test_many_samples_agree_with_the_normal_law(count: int) -> None:
    for q in QUANTILES.values():
        found = ranks(count, q)
        assert found is not None
        half = 1.959964 * math.sqrt(count * q * (1 - q))
        assert found[0] == pytest.approx(count * q - half, abs=2 + half / 100)
        assert found[1] == pytest.approx(count * q + half, abs=2 + half / 100)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(6)
    hits, runs = dict.fromkeys(("p50", "p90", "p99"), 0), 800
    for _ in range(runs):
        found = intervals(generator.exponential(1.0, 500))
        for name in hits:
            span = found[name]
            assert span is not None
            hits[name] += span[0] <= -math.log(1 - QUANTILES[name]) <= span[1]
    for name, count in hits.items():
        assert 0.935 < count / runs < 0.995, name  # discrete ranks cover somewhat more


@given(st.lists(st.floats(0, 1e3), max_size=500))
@settings(max_examples=40)
def test_a_percentile_lies_in_its_interval_or_neither_is_stated(values: list[float]) -> None:
    array = np.array(values)
    figures, spans = percentiles(array), intervals(array)
    for name in QUANTILES:
        value, span = figures[name], spans[name]
        assert (value is None) == (span is None)
        if value is not None and span is not None:
            assert span[0] <= value <= span[1]
            assert value in values and span[0] in values and span[1] in values


@pytest.mark.parametrize(
    ("count", "known"), [(1, []), (2, ["p50"]), (99, ["p50", "p90"]), (1000, list(QUANTILES))]
)
def test_what_was_seen_lately_needs_fewer(count: int, known: list[str]) -> None:
    seen = quantiles.observed(np.arange(count, dtype=np.float64))
    assert [name for name in QUANTILES if seen[name] is not None] == known
