"""The cost model on lines, noise, constant sizes, outliers and an engine that changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.cost import CostModel, Lateness

durations = st.floats(0.0, 100.0)
samples = st.lists(st.tuples(st.integers(1, 4096), durations), min_size=1, max_size=80)


def learned(sizes: list[int], a_s: float, b_s: float, noise: float = 0.0) -> CostModel:
    rng = random.Random(7)
    model = CostModel()
    for rows in sizes:
        model.observe(rows, (a_s + b_s * rows) * (1 + rng.uniform(-noise, noise)))
    return model


def varied(count: int, low: int = 1, high: int = 256) -> list[int]:
    rng = random.Random(3)
    return [rng.randint(low, high) for _ in range(count)]


def test_a_new_model_predicts_nothing_and_is_cold() -> None:
    model = CostModel()
    assert (model.predict(10), model.warm) == (0.0, False)


def test_it_is_warm_after_eight_batches() -> None:
    model = CostModel()
    for batch in range(8):
        assert not model.warm
        model.observe(batch + 1, 0.1)
    assert model.warm


@given(a_s=st.floats(0, 0.1), b_s=st.floats(0, 0.01), seed=st.integers(0, 99))
def test_a_line_is_learned(a_s: float, b_s: float, seed: int) -> None:
    rng = random.Random(seed)
    model = learned([rng.randint(1, 256) for _ in range(60)], a_s, b_s)
    for rows in (1, 64, 256):
        assert model.predict(rows) == pytest.approx(a_s + b_s * rows, rel=0.03, abs=1e-4)


def test_noise_averages_out() -> None:
    model = learned(varied(300), 0.010, 0.0005, noise=0.2)
    assert model.predict(256) == pytest.approx(0.138, rel=0.1)
    assert model.predict(1) == pytest.approx(0.0105, abs=0.008)


def test_constant_sizes_are_predicted_right() -> None:
    model = learned([64] * 100, 0.010, 0.0005, noise=0.1)
    assert model.predict(64) == pytest.approx(0.042, rel=0.05)


def test_constant_sizes_do_not_forget_the_slope() -> None:
    model = learned(varied(60) + [64] * 2000, 0.010, 0.0005)
    assert model.a_s == pytest.approx(0.010, rel=0.1)
    assert model.b_s == pytest.approx(0.0005, rel=0.1)


def test_one_other_size_gives_the_slope() -> None:
    model = learned([64] * 100 + [1], 0.010, 0.0005)
    assert model.b_s == pytest.approx(0.0005, rel=0.2)


def test_one_slow_batch_moves_it_little() -> None:
    model = learned(varied(100), 0.010, 0.0005)
    before = model.predict(128)
    model.observe(128, 100 * before)
    assert model.predict(128) < 1.1 * before


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_change_of_speed_is_learned(factor: float) -> None:
    model = learned(varied(100), 0.010, 0.0005)
    for rows in varied(300):
        model.observe(rows, factor * (0.010 + 0.0005 * rows))
    assert model.predict(256) == pytest.approx(factor * 0.138, rel=0.1)


def test_a_prediction_of_nothing_can_grow() -> None:
    model = learned([4] * 20, 0.0, 0.0)
    for _ in range(300):
        model.observe(4, 1.0)
    assert model.predict(4) == pytest.approx(1.0, rel=0.05)


@given(samples)
def test_any_history_gives_a_rising_line(history: list[tuple[int, float]]) -> None:
    model = CostModel()
    for rows, seconds in history:
        model.observe(rows, seconds)
    assert model.a_s >= 0
    assert model.b_s >= 0
    # Never more than the slowest batch per batch or per row, whatever the order.
    slowest = max(seconds for _, seconds in history)
    assert model.a_s <= slowest + 1e-9
    assert model.b_s <= slowest + 1e-9


@given(samples, st.floats(0, 100), st.integers(1, 4096))
def test_rows_within_is_the_largest_batch_that_keeps_the_time(
    history: list[tuple[int, float]], seconds: float, most: int
) -> None:
    model = CostModel()
    for rows, spent in history:
        model.observe(rows, spent)
    rows = model.rows_within(seconds, most)
    assert 1 <= rows <= most
    assert rows == 1 or model.predict(rows) <= seconds * (1 + 1e-9)
    assert rows == most or model.predict(rows + 1) > seconds * (1 - 1e-9)


def test_answers_on_time_need_no_allowance() -> None:
    lateness = Lateness()
    for late_s in (0.0, -0.5, -0.1):
        lateness.observe(late_s)
    assert lateness.allowance_s == 0.0


@given(st.floats(0.001, 1.0), st.integers(0, 2**32 - 1))
def test_the_allowance_covers_what_is_usual(late_s: float, seed: int) -> None:
    """Of answers late by up to twice ``late_s`` at random, nearly all are within the allowance."""
    lateness = Lateness()
    draws = random.Random(seed)
    for _ in range(300):
        lateness.observe(draws.uniform(0, 2 * late_s))
    within = sum(draws.uniform(0, 2 * late_s) <= lateness.allowance_s for _ in range(300))
    assert within > 270
    assert lateness.allowance_s < 4 * late_s


def test_the_allowance_follows_a_machine_that_became_busy() -> None:
    lateness = Lateness()
    for _ in range(100):
        lateness.observe(0.001)
    calm_s = lateness.allowance_s
    for _ in range(100):
        lateness.observe(0.05)
    assert calm_s < 0.005 < 0.05 < lateness.allowance_s < 0.1
    for _ in range(200):
        lateness.observe(0.001)
    assert lateness.allowance_s < 0.005
