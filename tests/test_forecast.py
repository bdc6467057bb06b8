"""Level, trend and bursts of a rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.forecast import BURST, forecast, is_burst, level_of

Samples = list[tuple[float, float]]


def series(rates: list[float]) -> Samples:
    return [(float(second), rate) for second, rate in enumerate(rates)]


def noisy(level: float, noise: float, seed: int, count: int = 60) -> list[float]:
    return list(level * (1 + noise * np.random.default_rng(seed).uniform(-1, 1, count)))


def test_nothing_is_expected_of_nothing() -> None:
    assert level_of([]) == forecast([], 30) == 0
    assert not is_burst([], 0.1)


def test_a_ramp_is_seen_as_far_ahead_as_it_lasted() -> None:
    ramp = series([100 + 5 * second for second in range(60)])
    assert forecast(ramp, 30) == pytest.approx(100 + 5 * (59 + 30))
    assert forecast(ramp, 500) == pytest.approx(100 + 5 * (59 + 59))
    assert forecast(ramp, 0) == pytest.approx(100 + 5 * 59)


def test_a_fall_is_not_expected_to_go_on() -> None:
    fall = series([1000 - 5 * second for second in range(60)])
    assert forecast(fall, 30) == level_of(fall)


@given(st.integers(0, 2**32), st.floats(0.001, 0.05), st.floats(1, 1e6))
def test_noise_is_neither_a_trend_nor_a_burst(seed: int, noise: float, level: float) -> None:
    samples = series(noisy(level, noise, seed))
    assert forecast(samples, 60, 0.1) == level_of(samples)
    assert not any(is_burst(samples[:count], 0.1) for count in range(60))


@given(st.integers(0, 2**32), st.floats(1.5, 20))
def test_a_jump_is_a_burst_at_its_second_sample_and_a_single_peak_is_none(
    seed: int, jump: float
) -> None:
    before = noisy(100, 0.05, seed, 20)
    peak = series([*before, 100 * jump])
    assert not is_burst(peak, 0.1)
    assert not is_burst([*peak, (21.0, 100.0)], 0.1)
    assert is_burst(series([*before, *[100 * jump] * BURST]), 0.1)


@given(st.lists(st.floats(0, 1e6), max_size=40), st.floats(0, 100), st.floats(1.1, 10))
def test_twice_the_load_is_twice_the_forecast(
    rates: list[float], lead_s: float, factor: float
) -> None:
    more = series([rate * factor for rate in rates])
    assert forecast(series(rates), lead_s) >= 0
    # A slope at the very edge of chance may fall on either side of it.
    once, scaled = forecast(series(rates), lead_s) * factor, forecast(more, lead_s)
    assert scaled == pytest.approx(once, rel=1e-6, abs=1e-6) or len(rates) >= 10
