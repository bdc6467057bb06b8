"""The solved queue against closed forms, and against drawn requests."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.batch_queue import BatchQueue, poisson


def waits_longer(rate: float, service_s: float, bound_s: float) -> float:
    """Erlang's distribution of the wait in a queue with one server and constant service."""
    load = rate * service_s
    total = 0.0
    for k in range(int(bound_s / service_s) + 1):
        x = rate * (k * service_s - bound_s)
        total += math.exp(-x) * x**k / math.factorial(k)
    return 1 - (1 - load) * total


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("bound_s", [0.005, 0.012, 0.03])
def test_batches_of_one_are_the_queue_that_erlang_solved(load: float, bound_s: float) -> None:
    queue = BatchQueue(0.004, 0.001, 1)
    expected = waits_longer(load * queue.saturation, 0.005, bound_s - 0.005)
    assert queue.late(load * queue.saturation, bound_s) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("queue", "load", "bound_s"),
    [
        (BatchQueue(0.02, 0.002, 16), 0.8, 0.1),
        (BatchQueue(0.02, 0.002, 16), 0.3, 0.05),
        (BatchQueue(0.01, 0.0, 8), 0.9, 0.04),
        (BatchQueue(0.0, 0.003, 4), 0.7, 0.02),
    ],
)
def test_drawn_requests_are_late_as_often(queue: BatchQueue, load: float, bound_s: float) -> None:
    rate = load * queue.saturation
    latency_s = queue.simulate(rate, 120_000, 5)[1][1000:]
    late = (latency_s > bound_s).reshape(20, -1).mean(axis=1)  # by parts: neighbours are alike
    error = late.std(ddof=1) / math.sqrt(len(late))
    assert queue.late(rate, bound_s) == pytest.approx(late.mean(), abs=4 * error + 1e-4)


def test_the_capacity_is_where_the_share_is_what_is_allowed() -> None:
    queue = BatchQueue(0.01, 0.002, 4)
    rate = queue.capacity(0.06, 0.01)
    assert 0 < rate < queue.saturation
    assert queue.late(rate, 0.06) <= 0.01 < queue.late(rate * 1.005, 0.06)
    assert queue.capacity(0.011, 0.01) == 0.0  # even alone it takes longer


def test_no_load_beyond_saturation_has_an_answer() -> None:
    with pytest.raises(ValueError, match="below the saturation"):
        BatchQueue(0.01, 0.0, 1).late(101, 1.0)


def test_poisson_adds_up() -> None:
    found = poisson(12.5, 60)
    assert found.sum() == pytest.approx(1)
    assert (found * np.arange(60)).sum() == pytest.approx(12.5)
    assert poisson(0.0, 3).tolist() == [1, 0, 0]
