"""The simulated clusters and the rivals in them: are they what they are said to be?"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.autoscaling import GPU, ONGOING, OURS, SHIPPED, Point, best, candidates
from benchmarks.autoscaling_policies import GpuShare, OngoingRequests
from benchmarks.autoscaling_traces import PEAK, TRACES
from benchmarks.autoscaling_world import Outcome, Plan, View, simulate

PLAN = Plan()


class Fixed:
    """As many as said, from a second on."""

    def __init__(self, replicas: int, from_s: float = 0.0) -> None:
        self.replicas, self.from_s = replicas, from_s
        self.seen: list[View] = []

    def __call__(self, view: View) -> int:
        self.seen.append(view)
        return self.replicas if view.now_s >= self.from_s else view.target


def fixed(load: float, replicas: int, seconds: int = 40, first: int = 0) -> tuple[Outcome, Fixed]:
    """``load`` in replicas' full capacities."""
    policy = Fixed(replicas)
    rate = np.full(seconds, load * PLAN.capacity)
    (outcome,) = simulate(PLAN, [rate], [policy], 0, [first or replicas])
    return outcome, policy


def view(started: int, target: int, now_s: float, **figures: float) -> View:
    each = {"offered_rows": 0.0, "wait_s": 0.0, "ongoing": 0.0, "busy": 0.0, "active": 0.0}
    lists = {name: [value] * started for name, value in (each | figures).items()}
    return View(now_s, target, list(range(started)), **lists)


def test_the_emulated_replica_does_what_its_costs_allow() -> None:
    outcome, policy = fixed(0.9, 1)
    assert outcome.miss_share < 0.001
    assert outcome.replica_hours == pytest.approx(40 / 3600)
    last = policy.seen[-1]
    assert sum(last.offered_rows) == pytest.approx(0.9 * PLAN.capacity * 4, rel=0.1)
    assert last.busy[0] == 1
    assert 0 < last.wait_s[0] <= PLAN.deadline_s
    outcome, _ = fixed(6.0, 4)
    assert outcome.miss_share == pytest.approx(1 - 4 / 6, abs=0.03)


def test_an_idle_engine_is_idle_and_a_little_load_keeps_it_busy() -> None:
    _, idle = fixed(1e-6, 1)
    assert idle.seen[-1].busy == [0]
    _, little = fixed(0.3, 1)
    busy = np.mean([each.busy[0] for each in little.seen[5:]])
    active = np.mean([each.active[0] for each in little.seen[5:]])
    assert busy > 0.9
    assert active == pytest.approx(0.3 * PLAN.capacity * 4 * PLAN.b_s, rel=0.05)


def test_a_replica_costs_from_the_decision_and_works_after_its_start() -> None:
    outcome, policy = fixed(1.8, 2, first=1)
    started = [len(each.ids) for each in policy.seen]
    assert started[int(PLAN.start_s) - 2] == 1
    assert started[int(PLAN.start_s) + 2] == 2
    assert outcome.replica_hours == pytest.approx((1 + 39 * 2) / 3600)
    assert 0.15 < outcome.miss_share < 0.35  # nearly half of it while there was one
    assert outcome.changes == 1


def test_streams_come_to_a_new_replica_little_by_little() -> None:
    plan = Plan(start_s=5, spread_s=20)
    policy = Fixed(2, 1.0)
    simulate(plan, [np.full(40, plan.capacity)], [policy], 0, [1])
    newest = [each.offered_rows[1] for each in policy.seen if len(each.ids) == 2]
    assert newest[2] < newest[10] < newest[30]
    assert newest[30] == pytest.approx(plan.capacity * 2, rel=0.15)


def test_a_deadline_of_less_than_two_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least two full batches"):
        simulate(Plan(deadline_s=0.3), [np.ones(1)], [Fixed(1)], 0, [1])


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_seeded_and_within_what_64_replicas_can_do(name: str) -> None:
    trace = TRACES[name](3)
    np.testing.assert_array_equal(trace, TRACES[name](3))
    assert not np.array_equal(trace, TRACES[name](4))
    assert 0 < trace.min() < trace.max() / 3
    assert 0.6 * PEAK < trace.max() < 1.3 * PEAK


def test_the_autoscaler_of_kubernetes() -> None:
    policy = GpuShare(0.5, "busy", stabilisation_s=30)
    assert policy(view(4, 4, 14, busy=1.0)) == 4  # not yet
    assert policy(view(4, 4, 15, busy=1.0)) == 8
    for second in range(16, 30):
        policy(view(4, 8, second, busy=1.0))
    assert policy(view(4, 8, 30, busy=1.0)) == 8  # those that start count as idle
    for second in range(31, 45):
        policy(view(8, 8, second, busy=0.52))
    assert policy(view(8, 8, 45, busy=0.52)) == 8  # within the tolerance
    targets = []
    for second in range(46, 106):
        targets.append(policy(view(8, 8, second, busy=0.1)))
    assert targets[-1] == 2
    assert targets[14] == targets[28] == 8  # what was recommended within 30 s


def test_serves_policy_waits_its_delays_and_then_follows_its_target() -> None:
    policy = OngoingRequests(PLAN, 10.0)
    targets = [2]
    for second in range(60):
        targets.append(policy(view(2, targets[-1], second, ongoing=30.0)))
    assert targets[15] == 2
    assert targets[-1] == 6
    fast = OngoingRequests(PLAN, 10.0, up_delay_s=0, down_delay_s=20, look_back_s=5, push_s=1)
    assert fast(view(2, 2, 0, ongoing=30.0)) == 6
    downs = [6]
    for second in range(1, 60):
        downs.append(fast(view(6, downs[-1], second, ongoing=1.0)))
    assert downs[15] == 6
    assert downs[-1] == 1


def test_a_rival_is_shown_at_its_best() -> None:
    def point(policy: str, hours: float, misses: float) -> Point:
        return Point(policy, f"{hours}", (Outcome(misses, hours, 0, 1),))

    ours = point(OURS, 10, 0.02)
    rivals = [point(GPU, 9, 0.05), point(GPU, 10, 0.04), point(GPU, 12, 0.02), point(GPU, 15, 0.0)]
    fewest, cheapest = best([ours, *rivals, point(ONGOING, 1, 0.0)], GPU, ours)
    assert (fewest.hours, cheapest and cheapest.hours) == (10, 12)
    fewest, cheapest = best([ours, *rivals[3:]], GPU, ours)
    assert (fewest.hours, cheapest and cheapest.hours) == (15, 15)
    assert best([ours, rivals[0]], GPU, ours) == (rivals[0], None)


def test_what_ships_is_among_the_candidates_as_it_ships() -> None:
    from benchmarks.autoscaling_policies import PredictedWait
    from deployments.autoscaling import Settings

    made = candidates()[OURS, SHIPPED](PLAN)
    assert isinstance(made, PredictedWait)
    shipped = Settings(wait_target_s=0.75, lead_s=PLAN.start_s)
    assert made._settings == shipped
