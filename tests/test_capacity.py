"""The queueing model of one replica, against one that is played through request by request."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.capacity import Report, sustainable, typical


def report(a_s: float, b_s: float, rows: float, request_rows: float = 4) -> Report:
    return Report(0.0, 0.0, 1000.0, 1000.0 / request_rows, a_s, b_s, rows)


def played(rate: float, a_s: float, b_s: float, most: int, request_rows: int) -> float:
    """The 99th percentile of the wait of Poisson arrivals at the busy-aware batcher."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(request_rows / rate, 20_000))
    waits, now, first = [], 0.0, 0
    while first < len(arrivals):
        now = max(now, float(arrivals[first]))
        last = min(int(np.searchsorted(arrivals, now, "right")), first + most // request_rows)
        now += a_s + b_s * request_rows * (last - first)
        waits.append(now - arrivals[first:last])
        first = last
    return float(np.quantile(np.concatenate(waits)[500:], 0.99))


@pytest.mark.parametrize(
    ("a_s", "b_s", "most", "request_rows"),
    [(0.03, 0.001, 256, 4), (0.03, 0.001, 64, 4), (0.002, 5e-5, 256, 4), (0.05, 1e-4, 256, 16)],
)
@pytest.mark.parametrize("steps", [2.2, 3.0])
def test_at_the_sustainable_rate_the_wait_is_kept_and_not_much_is_given_away(
    a_s: float, b_s: float, most: int, request_rows: int, steps: float
) -> None:
    wait_s = steps * (a_s + b_s * most)
    rate = sustainable(report(a_s, b_s, most, request_rows), wait_s)
    assert 0.6 * wait_s < played(rate, a_s, b_s, most, request_rows) <= wait_s


costs = st.tuples(
    st.floats(0, 1), st.floats(0, 0.1), st.integers(1, 4096), st.floats(1, 64)
).filter(lambda cost: cost[0] + cost[1] * cost[2] > 1e-6)


@given(costs, st.floats(1e-3, 10), st.floats(1, 10))
def test_a_longer_wait_sustains_no_less_and_nothing_more_than_full_batches(
    cost: tuple[float, float, int, float], wait_s: float, factor: float
) -> None:
    a_s, b_s, rows, request_rows = cost
    of = report(a_s, b_s, rows, request_rows)
    rate = sustainable(of, wait_s)
    assert 0 < rate <= rows / (a_s + b_s * rows) * (1 + 1e-9)
    assert sustainable(of, wait_s * factor) >= rate * (1 - 1e-5)


@given(costs, st.floats(1e-3, 10), st.floats(1, 10))
def test_dearer_batches_sustain_no_more(
    cost: tuple[float, float, int, float], wait_s: float, factor: float
) -> None:
    a_s, b_s, rows, request_rows = cost
    dearer = report(a_s * factor, b_s * factor, rows, request_rows)
    cheap = sustainable(report(a_s, b_s, rows, request_rows), wait_s)
    assert sustainable(dearer, wait_s) <= cheap * (1 + 1e-5)


def test_unknown_costs_sustain_nothing_that_could_be_named() -> None:
    assert sustainable(Report(0.0), 1.0) == 0
    assert sustainable(report(0.0, 0.0, 64), 1.0) == 0


def test_a_wait_below_that_of_one_request_asks_for_no_endless_number_of_replicas() -> None:
    assert sustainable(report(0.1, 0.01, 64, 4), 0.001) == pytest.approx(4 / 0.14 / 2)


def test_the_typical_replica_is_the_mean_of_those_that_know_their_costs() -> None:
    assert typical([]) == Report(0.0)
    known = [report(0.1, 0.01, 64), report(0.3, 0.03, 32)]
    mean = typical([*known, Report(0.0, offered_rows_per_s=9.0)])
    assert (mean.round_s, mean.row_s, mean.round_rows) == pytest.approx((0.2, 0.02, 48))
