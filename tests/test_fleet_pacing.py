"""Pacers are pure, so these tests are tables and properties; none sleeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.fleet import pacing
from edge.fleet.arrivals import Constant, Poisson


@pytest.mark.parametrize(
    ("rate", "duration_s", "expected"),
    [
        (1.0, 3.0, [0.0, 1.0, 2.0]),
        (2.0, 1.25, [0.0, 0.5, 1.0]),
        (10.0, 0.3, [0.0, 0.1, 0.2]),
        (0.5, 1.0, [0.0]),
    ],
)
def test_constant_spaces_evenly(rate: float, duration_s: float, expected: list[float]) -> None:
    assert Constant().times(rate, duration_s) == pytest.approx(expected)


@given(st.floats(0.1, 500), st.floats(0.1, 20), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_poisson_is_sorted_inside_the_run_and_repeatable(
    rate: float, duration_s: float, seed: int
) -> None:
    times = Poisson().times(rate, duration_s, seed)
    assert np.all(np.diff(times) >= 0)
    assert np.all((times >= 0) & (times < duration_s))
    assert np.array_equal(times, Poisson().times(rate, duration_s, seed))


def test_poisson_has_the_rate_and_the_spread_of_a_poisson_process() -> None:
    gaps = np.diff(Poisson().times(1000, 100, seed=3))
    assert len(gaps) == pytest.approx(100_000, rel=0.02)
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps.std() == pytest.approx(1e-3, rel=0.02)  # exponential: deviation equals mean


def test_another_seed_is_another_schedule() -> None:
    first, second = (pacing.schedule("poisson", 50, 5, 10, seed) for seed in (1, 2))
    assert len(first) != len(second) or not np.array_equal(first.due_s, second.due_s)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_shards_share_one_schedule(devices: int, shards: int, seed: int) -> None:
    whole = pacing.schedule("poisson", 60, 3, devices, seed)
    parts = [whole.shard(number, shards) for number in range(shards)]
    order = np.argsort(np.concatenate([part.index for part in parts]))
    for column in ("index", "due_s", "device"):
        joined = np.concatenate([getattr(part, column) for part in parts])[order]
        assert np.array_equal(joined, getattr(whole, column))
    for number, part in enumerate(parts):
        assert np.all(part.device % shards == number)
        assert np.all(np.diff(part.due_s) >= 0)


def test_devices_share_the_load_evenly() -> None:
    counts = np.bincount(pacing.schedule("constant", 10_000, 1, 10, 0).device, minlength=10)
    assert counts.min() > 850 and counts.max() < 1150


@given(st.integers(0, 50), st.integers(1, 8), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_inputs_are_used_evenly(count: int, group: int, available: int, seed: int) -> None:
    chosen = pacing.inputs(count, group, available, seed)
    assert chosen.shape == (count, group)
    uses = np.bincount(chosen.ravel(), minlength=available)
    assert len(uses) == available and uses.max() - uses.min() <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("poisson", 0.0, 1.0, 1),
        ("poisson", float("nan"), 1.0, 1),
        ("constant", 1.0, -1.0, 1),
        ("constant", 1.0, float("inf"), 1),
        ("poisson", 1.0, 1.0, 0),
        ("bursts", 1.0, 1.0, 1),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[str, float, float, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        pacing.schedule(*arguments, seed=0)


def test_a_shard_outside_the_fleet_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        pacing.schedule("constant", 1, 1, 1, 0).shard(2, 2)
