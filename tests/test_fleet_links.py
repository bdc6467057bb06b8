"""Links are pure: tables of known delays, and what must hold for any traffic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.fleet.links import PACKET_BYTES, Link, Traffic

PLAIN = Link(up_bytes_per_s=1000, down_bytes_per_s=4000, round_trip_s=0.2)


def test_messages_of_one_device_wait_for_each_other() -> None:
    traffic = Traffic(PLAIN, 0)
    assert traffic.up(10.0, 500, 0, 0) == pytest.approx(10 + 0.5 + 0.1)
    assert traffic.up(10.1, 1000, 0, 1) == pytest.approx(10.5 + 1 + 0.1)  # behind the first
    assert traffic.up(13.0, 100, 0, 2) == pytest.approx(13 + 0.1 + 0.1)  # the link is free
    # The other direction knows nothing of it.
    assert traffic.down(10.0, 400, 0, 0) == pytest.approx(10 + 0.1 + 0.1)
    assert traffic.down(10.0, 400, 0, 1) == pytest.approx(10 + 0.2 + 0.1)
    traffic.reset()
    assert traffic.up(1.0, 500, 0, 0) == pytest.approx(1.6)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50_000)), min_size=1, max_size=30),
    st.floats(0, 0.3), st.floats(0, 0.5), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_nothing_overtakes_and_nothing_beats_an_empty_link(
    gaps: list[tuple[float, int]], jitter_s: float, loss: float, seed: int
) -> None:
    link = Link(1e5, 1e6, 0.05, jitter_s, loss)
    both = [Traffic(link, seed) for _ in range(2)]
    now_s = last_s = free_s = 0.0
    for turn, (gap_s, size) in enumerate(gaps):
        now_s += gap_s
        arrived_s = both[0].up(now_s, size, 3, turn)
        assert arrived_s == both[1].up(now_s, size, 3, turn)  # a seed says it all
        free_s = max(free_s, now_s) + size / 1e5
        assert arrived_s >= max(last_s, free_s + 0.025 - 1e-9)
        last_s = arrived_s


def test_jitter_has_its_mean() -> None:
    link = Link(1e9, 1e9, 0.1, jitter_s=0.02)
    # One at a time, so that none waits for the one before.
    delays = [Traffic(link, 1).up(0.0, 1, place, 0) - 0.05 for place in range(5000)]
    assert np.mean(delays) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("loss", "packets"), [(0.1, 1), (0.1, 10), (0.3, 40), (0.01, 200)])
def test_lost_packets_cost_round_trips_as_often_as_drawing_them_says(
    loss: float, packets: int
) -> None:
    """Against the thing itself: each packet is sent until it comes through, the slowest counts."""
    generator = np.random.default_rng(5)
    drawn = generator.geometric(1 - loss, (20_000, packets)).max(axis=1) - 1
    link = Link(1e9, 1e9, 0.1, loss=loss)
    shares = generator.random(20_000)
    found = np.array([link.resends(packets * PACKET_BYTES, share) for share in shares])
    for most in range(4):
        expected = np.mean(drawn <= most)
        assert np.mean(found <= most) == pytest.approx(expected, abs=0.02), most
    assert link.resends(10, 0.0) == 0 and link.resends(10, 1 - 1e-16) < 50
    assert Link(1, 1, 0.1).resends(10**9, 0.999) == 0
