"""The search without a cloud: which rate comes next, and what is believed in the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.batch_queue import BatchQueue
from datamix.errors import ConfigError
from edge.fleet.objective import Objective
from edge.fleet.search import Belief, Plan, Step, Tried, estimate, next_step
from edge.fleet.verdict import Judge, Verdict

P99 = Objective(0.99, 0.15)
QUEUE = BatchQueue(0.02, 0.002, 16)
CAPACITY = 280.4


def seen(late: float, total: float) -> Verdict:
    low, high = (0.0, 1.0)
    answer = "fail" if late > 3 * total * 0.01 else "pass" if late < total * 0.003 else "open"
    return Verdict(
        answer,  # type: ignore[arg-type]
        int(total),
        int(late),
        late / total,
        low,
        high,
        1.0,
        10.0,
    )


def try_queue(step: Step, seed: list[int]) -> Tried:
    rules = step.rules
    count = int(step.rate * (rules.duration_s + 2))
    arrivals_s = np.cumsum(np.random.default_rng(seed).exponential(1 / step.rate, count))
    latency_s = QUEUE.follow(arrivals_s)
    judge = Judge(P99, rules)
    until_s, over = 0.0, False
    while not over:
        part = (arrivals_s >= until_s) & (arrivals_s < until_s + 0.5)
        until_s += 0.5
        over = judge.add(arrivals_s[part], latency_s[part], until_s)
    assert judge.verdict is not None
    return Tried(step.rate, judge.verdict)


def test_five_searches_find_what_the_queue_carries() -> None:
    assert QUEUE.late(CAPACITY, P99.latency_s) == pytest.approx(0.01, rel=0.02)
    plan, errors, inside = Plan(P99), [], 0
    for seed in range(5):
        tried: list[Tried] = []
        while (step := next_step(tried, plan)) is not None:
            tried.append(try_queue(step, [seed, len(tried)]))
        found = estimate(tried, plan)
        assert found.rate is not None and len(tried) < plan.most_probes
        assert found.width <= plan.tolerance
        errors.append(abs(found.rate / CAPACITY - 1))
        inside += found.low <= CAPACITY <= found.high
    assert max(errors) < 0.03 and inside >= 4, errors


def test_the_rate_doubles_until_a_load_fails_and_halves_until_one_passes() -> None:
    plan = Plan(P99, start_rate=10, most_rate=100)
    tried: list[Tried] = []
    rates = []
    while (step := next_step(tried, plan)) is not None:
        rates.append(step.rate)
        tried.append(Tried(step.rate, seen(0, 400)))
    assert rates == [10, 20, 40, 80, 100]
    assert estimate(tried, plan).low == 100 and math.isinf(estimate(tried, plan).high)
    plan = Plan(P99, start_rate=10, least_rate=2)
    tried, rates = [], []
    while (step := next_step(tried, plan)) is not None:
        rates.append(step.rate)
        tried.append(Tried(step.rate, seen(300, 400)))
    assert rates == [10, 5, 2.5, 2]
    assert estimate(tried, plan).rate is None and estimate(tried, plan).high == 2


def test_after_a_bracket_the_next_rate_is_inside() -> None:
    plan = Plan(P99)
    tried = [Tried(64, seen(0, 400)), Tried(128, seen(300, 400))]
    step = next_step(tried, plan)
    assert step is not None and 64 < step.rate < 128
    assert step.rules == plan.rules(step.rate)


def test_the_search_ends_at_its_number_of_probes() -> None:
    plan = Plan(P99, most_probes=2)
    assert next_step([Tried(64, seen(0, 400)), Tried(128, seen(300, 400))], plan) is None


def test_one_lucky_probe_is_not_enough() -> None:
    plan = Plan(P99, tolerance=0.5)
    tried = [Tried(100, seen(0, 1e6)), Tried(103, seen(9e5, 1e6))]
    assert estimate(tried, plan).width < 0.05
    assert next_step(tried, plan) is not None


def test_nothing_seen_is_taken_for_nothing() -> None:
    empty = Verdict("open", 0, 0, math.nan, 0.0, 1.0, 1.0, 0.0)
    assert Tried(1.0, empty).passes(0.01)
    step = next_step([Tried(1.0, empty)], Plan(P99, start_rate=1.0))
    assert step is not None and step.rate == 2.0


@settings(max_examples=40, deadline=None)
@given(st.floats(50, 500), st.floats(6, 80), st.integers(0, 1000))
def test_the_belief_finds_a_power_law(rate: float, exponent: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tried = []
    for factor in (0.7, 0.9, 0.96, 1.0, 1.03, 1.1, 1.5):
        odds = 0.01 / 0.99 * factor**exponent
        tried.append(
            Tried(rate * factor, seen(float(generator.binomial(4000, odds / (1 + odds))), 4000))
        )
    belief = Belief(tried, 0.01)
    assert belief.quantile(0.0001) * 0.97 <= rate <= belief.quantile(0.9999) * 1.03
    assert belief.quantile(0.5) == pytest.approx(rate, rel=0.1)
    assert belief.quantile(0.2) <= belief.quantile(0.5) <= belief.quantile(0.8)


def test_an_overload_says_no_more_than_that_it_is_one() -> None:
    """A queue that grows has no share: 60% late at twice the rate is no news of the exponent."""
    near = [Tried(100, seen(20, 4000)), Tried(104, seen(70, 4000))]
    far = [Tried(200, seen(600, 1000)), Tried(400, seen(990, 1000))]
    alone, both = Belief(near, 0.01), Belief(near + far, 0.01)
    assert both.quantile(0.5) == pytest.approx(alone.quantile(0.5), rel=0.01)


@pytest.mark.parametrize(
    "bad",
    [
        {"start_rate": 0.1},
        {"most_rate": 1.0},
        {"tolerance": 0},
        {"most_probes": 0},
        {"most_s": -1},
        {"error": 0.7},
        {"most_rate": math.inf},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Plan(P99, **bad)  # type: ignore[arg-type]
