"""Numbers that are looked up: the same one by one and in arrays, and as good as drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.fleet.chance import Purpose, exponential, uniform

SEEDS = st.integers(0, 2**63)


@given(SEEDS, st.sampled_from(Purpose), st.lists(st.integers(0, 2**32), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_an_array_holds_what_is_found_one_by_one(
    seed: int, purpose: Purpose, places: list[int]
) -> None:
    for second in (0, 1, 2**20):
        many = uniform(seed, purpose, np.array(places), second)
        assert many.tolist() == [uniform(seed, purpose, place, second) for place in places]
        assert np.all((many >= 0) & (many < 1))


def test_numbers_are_spread_evenly_and_know_nothing_of_each_other() -> None:
    count = 100_000
    one, two = (uniform(3, Purpose.CANCEL, np.arange(count), second) for second in (0, 1))
    other = uniform(3, Purpose.STORM, np.arange(count))
    another = uniform(4, Purpose.CANCEL, np.arange(count))
    for numbers in (one, two, other, another):
        counts = np.histogram(numbers, 100, (0, 1))[0]
        # Chi-square with 99 degrees of freedom: mean 99, deviation 14.
        assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 14
    for numbers in (two, other, another, np.roll(one, 1)):
        assert abs(np.corrcoef(one, numbers)[0, 1]) < 5 / np.sqrt(count)


def test_an_exponential_number_has_its_mean_and_its_tail() -> None:
    drawn = [exponential(2.0, uniform(0, Purpose.THINK, place)) for place in range(20_000)]
    assert np.mean(drawn) == pytest.approx(2, rel=0.05)
    assert np.mean(np.array(drawn) > 4) == pytest.approx(np.exp(-2), rel=0.1)
    assert exponential(2.0, 0.0) == 0 and exponential(2.0, 1.0) < 100
