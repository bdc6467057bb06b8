"""Judging loads without a clock: coins, clusters, and a queue whose answer is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.batch_queue import BatchQueue
from datamix.errors import ConfigError
from edge.fleet.objective import Objective
from edge.fleet.verdict import Judge, Rules, Verdict, judge, rules_for

P99 = Objective(0.99, 0.1)
QUEUE = BatchQueue(0.02, 0.002, 16)
CAPACITY = 238.0  # of that queue: test_batch_queue.py holds the solution, the next test this figure


def test_the_capacity_that_these_tests_know() -> None:
    assert QUEUE.late(CAPACITY, P99.latency_s) == pytest.approx(0.01, rel=0.01)


def watch(rate: float, seed: int, rules: Rules, step_s: float = 0.5) -> Verdict:
    """Let a judge see the queue at a rate, as a run would show it."""
    due_s, latency_s = QUEUE.simulate(rate, int(rate * (rules.duration_s + 2)), seed)
    judge = Judge(P99, rules)
    until_s, over = 0.0, False
    while not over:
        part = (due_s >= until_s) & (due_s < until_s + step_s)
        until_s += step_s
        over = judge.add(due_s[part], latency_s[part], until_s)
    assert judge.verdict is not None
    return judge.verdict


def answers(load: float, seeds: range) -> Counter[str]:
    rate = load * CAPACITY
    rules = rules_for(P99, rate)
    return Counter(watch(rate, seed, rules).answer for seed in seeds)


@pytest.mark.parametrize("load", [0.4, 0.8])
def test_a_load_below_the_capacity_passes(load: float) -> None:
    assert answers(load, range(12)) == {"pass": 12}


@pytest.mark.parametrize("load", [1.12, 1.6])
def test_a_load_above_the_capacity_fails(load: float) -> None:
    assert answers(load, range(20, 32)) == {"fail": 12}


def test_near_the_capacity_a_wrong_answer_is_rare() -> None:
    assert answers(0.97, range(40, 64))["fail"] <= 2
    assert answers(1.03, range(70, 94))["pass"] <= 2


def test_an_overload_is_known_at_the_first_look() -> None:
    rules = rules_for(P99, 500)
    assert watch(2 * CAPACITY, 3, rules).observed_s == pytest.approx(rules.least_s)
    assert watch(0.4 * CAPACITY, 3, rules).observed_s < rules.most_s * 2 / 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.05))
def test_coins_are_taken_for_coins(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    due_s = np.sort(generator.random(4000)) * 20 + 1
    latency_s = np.where(generator.random(4000) < share, 1.0, generator.random(4000) * 0.05)
    found = judge(due_s, latency_s, 21.0, P99, Rules(1.0, 1.0, 20.0), error=0.01)
    assert found.inferences == 4000 and found.observed_s == 20
    assert 1 <= found.each < 4  # of 20 stretches, the variance is known to within a factor
    assert found.low <= found.share <= found.high


def test_what_comes_in_clusters_counts_for_less() -> None:
    due_s = np.arange(4000) / 200 + 1
    scattered, clustered = np.full(4000, 0.01), np.full(4000, 0.01)
    scattered[::50] = 1.0  # 80 late ones, 2%
    clustered[2000:2080] = 1.0
    rules = Rules(1.0, 1.0, 20.0)
    one = judge(due_s, scattered, 21.0, P99, rules, error=0.01)
    two = judge(due_s, clustered, 21.0, P99, rules, error=0.01)
    assert one.answer == "fail" and two.answer == "open"
    assert one.share == two.share == 0.02
    assert two.each > 20 * one.each


def test_the_warm_up_and_what_may_still_be_under_way_do_not_count() -> None:
    due_s = np.array([0.0, 0.99, 1.0, 1.5, 2.0])
    latency_s = np.array([math.inf, math.inf, 0.01, 0.01, math.inf])
    found = judge(due_s, latency_s, 2.0, P99, Rules(1.0, 0.5, 20.0), error=0.05)
    assert (found.inferences, found.late) == (2, 0)
    assert judge(due_s, latency_s, 0.5, P99, Rules(1.0, 0.5, 20.0), error=0.05).answer == "open"


def test_looks_are_planned_further_and_further_apart() -> None:
    rules = Rules(2.0, 1.0, 60.0, 0.05)
    looks_s = rules.looks_s
    assert looks_s[0] == 3 and looks_s[-1] == 62 == rules.duration_s
    gaps = np.diff(looks_s[:-1])
    assert (gaps[1:] > gaps[:-1]).all() and len(looks_s) < 20
    assert Rules(0.0, 5.0, 5.0).looks_s == [5.0]


def test_a_look_that_was_slept_through_is_made_once() -> None:
    judge = Judge(P99, Rules(0.0, 1.0, 10.0))
    due_s = np.arange(1000) / 100
    assert not judge.add(due_s[:50], np.full(50, 0.01), 0.5)
    assert judge.add(due_s[50:], np.full(950, 0.01), 10.0)
    assert judge.verdict is not None and judge.verdict.inferences == 1000


def test_rules_suit_the_objective_and_the_rate() -> None:
    slow = rules_for(Objective(0.99, 2.0), 100)
    assert slow.warmup_s == 20 and slow.least_s == 20 and slow.most_s > 400
    rare = rules_for(P99, 1.0)
    assert rare.most_s > 700  # 99% of so few inferences take their time
    assert rules_for(P99, 100, most_s=5).most_s == 5


@pytest.mark.parametrize(
    "bad", [(-1.0, 1.0, 2.0), (0.0, 0.0, 2.0), (0.0, 3.0, 2.0), (0.0, 1.0, math.inf)]
)
def test_rules_that_cannot_be_followed_are_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Rules(*bad)
    with pytest.raises(ConfigError, match="error is"):
        Rules(1.0, 1.0, 2.0, error=0.6)
