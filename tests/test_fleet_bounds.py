"""Binomial arithmetic against exact sums, and against what LoadGen printed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.fleet.bounds import (
    beta_cdf,
    binomial_cdf,
    discarded,
    lower_bound,
    quantile_bound,
    trials_needed,
    upper_bound,
)


def exact_cdf(count: int, trials: int, share: Fraction) -> float:
    return float(
        sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(count + 1))
    )


@given(st.integers(0, 60), st.integers(1, 60), st.fractions(Fraction(1, 100), Fraction(99, 100)))
def test_the_distribution_is_the_exact_sum(count: int, trials: int, share: Fraction) -> None:
    expected = exact_cdf(min(count, trials), trials, share)
    assert binomial_cdf(count, trials, float(share)) == pytest.approx(expected, abs=1e-11)


@given(st.floats(0.01, 0.99), st.floats(0.1, 1e6), st.floats(0.1, 1e6))
def test_the_beta_function_is_a_distribution(x: float, a: float, b: float) -> None:
    value = beta_cdf(x, a, b)
    assert 0 <= value <= 1
    assert beta_cdf(1 - x, b, a) == pytest.approx(1 - value, abs=1e-9)
    assert beta_cdf(min(1.0, x * 1.01), a, b) >= value - 1e-12


@given(st.integers(0, 500), st.integers(1, 500), st.sampled_from([0.01, 0.05]))
def test_bounds_are_where_the_count_would_be_a_surprise(
    count: int, trials: int, error: float
) -> None:
    count = min(count, trials)
    low, high = lower_bound(count, trials, error), upper_bound(count, trials, error)
    assert 0 <= low <= count / trials <= high <= 1
    if count < trials:
        assert binomial_cdf(count, trials, high) == pytest.approx(error, abs=1e-9)
    if count > 0:
        assert 1 - binomial_cdf(count - 1, trials, low) == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize(
    ("queries", "quantile", "printed"),
    [
        (2048, 0.9, 172),
        (2116, 0.9, 178),
        (2145, 0.9, 181),
        (7469, 0.9, 685),
        (1179125, 0.99, 11539),
    ],
)
def test_as_many_are_left_out_as_loadgen_leaves_out(
    queries: int, quantile: float, printed: int
) -> None:
    """LoadGen prints one fewer than its own criterion allows."""
    assert discarded(queries, quantile, 0.01) == printed + 1


def test_the_fewest_queries_are_loadgens() -> None:
    assert trials_needed(0.9, 0.01) == 64
    assert trials_needed(0.99, 0.01) == 662
    assert discarded(661, 0.99, 0.01) is None and discarded(662, 0.99, 0.01) == 1


def test_the_bound_of_a_quantile_is_rarely_below_it() -> None:
    generator = np.random.default_rng(1)
    true = -math.log(0.1)  # of an exponential distribution
    bounds = [quantile_bound(generator.exponential(size=200), 0.9, 0.05) for _ in range(400)]
    below = sum(bound is not None and bound < true for bound in bounds)
    assert 2 <= below <= 32  # 5% of 400 are 20; were the bound the quantile itself, 200


def test_too_few_values_have_no_bound() -> None:
    assert quantile_bound(np.arange(63.0), 0.9) is None
    assert quantile_bound(np.arange(64.0), 0.9) == 62.0
    assert quantile_bound(np.empty(0), 0.9) is None


@pytest.mark.parametrize("bad", [(-0.1, 1, 1), (1.1, 1, 1), (0.5, 0, 1), (0.5, 1, -1)])
def test_what_is_no_probability_is_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        beta_cdf(*bad)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        discarded(10, 1.0, 0.01)
