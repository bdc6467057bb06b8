"""The decision core: bounds, steps, windows, missing reports, zero; and that it never flaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError
from deployments.autoscaling import Decision, Observation, Settings, State, decide
from deployments.capacity import Report, sustainable

COST = (0.03, 0.001, 256.0)
QUICK = Settings(wait_target_s=0.75, lead_s=20)


@dataclass
class World:
    """Replicas that share a load evenly and report every second; new ones start after a while."""

    settings: Settings = QUICK
    target: int = 1
    start_s: float = 10.0
    least: int = 1
    most: int = 64
    now_s: float = 1000.0
    state: State = State()
    decision: Decision = Decision(0)
    ready_s: list[float] = field(default_factory=list)
    silent: frozenset[str] = frozenset()  # that run and do not report
    wait_s: float = 0.1

    def __post_init__(self) -> None:
        self.ready_s = [0.0] * self.target

    def second(self, rows_per_s: float) -> int:
        """Let a second pass; the target after it."""
        self.now_s += 1
        running = [str(n) for n, ready_s in enumerate(self.ready_s) if ready_s <= self.now_s]
        share = rows_per_s / max(1, len(running))
        reports = {
            name: Report(self.now_s, self.wait_s, share, share / 4, *COST)
            for name in running
            if name not in self.silent
        }
        seen = Observation(self.now_s, self.target, running, reports, self.least, self.most)
        self.decision, self.state = decide(self.settings, self.state, seen)
        self.resize(self.decision.replicas)
        return self.target

    def resize(self, target: int) -> None:
        self.target = target
        del self.ready_s[target:]
        self.ready_s += [self.now_s + self.start_s] * (target - len(self.ready_s))

    def run(self, seconds: int, load: float | Callable[[int], float]) -> list[int]:
        """The target after each second."""
        rate = load if callable(load) else lambda second: load
        return [self.second(rate(second)) for second in range(seconds)]


def each(settings: Settings = QUICK, headroom: bool = True) -> float:
    """Rows per second that a replica is trusted with."""
    full = sustainable(Report(0, 0, 4000, 1000, *COST), settings.wait_target_s)
    return full * (1 - settings.headroom) if headroom else full


def changes(targets: list[int]) -> int:
    return sum(after != before for before, after in zip(targets, targets[1:], strict=False))


def test_a_steady_load_gets_what_holds_the_wait_target_with_headroom() -> None:
    for load in (100.0, 3000.0, 20_000.0):
        assert World().run(60, load)[-1] == math.ceil(load / each())


def test_a_jump_is_answered_within_three_seconds_and_in_full() -> None:
    world = World(target=8)
    world.run(30, 5000)
    before = world.target
    targets = world.run(10, 15_000)
    needed = math.ceil(15_000 / each())
    assert targets[2] >= before * 2
    assert targets[-1] == needed  # without a step beyond it


def test_steps_up_are_bounded_and_spaced() -> None:
    bounded = Settings(wait_target_s=0.75, up_ratio=1.5, up_replicas=2, up_period_s=10)
    targets = World(bounded, start_s=0).run(150, 40_000)
    assert targets[-1] == math.ceil(40_000 / each())
    for before, after in zip(targets, targets[10:], strict=False):
        assert after <= max(before * 1.5, before + 2)


def test_a_ramp_is_met_before_it_arrives() -> None:
    def ramp(second: int) -> float:
        return 4000 + 40.0 * max(0, second - 60)

    steep = World(start_s=20)
    ahead = steep.run(300, ramp)
    for second in range(120, 280):
        assert ahead[second] * each(headroom=False) >= ramp(second + 20)


def test_what_was_needed_within_the_window_stays() -> None:
    plain = Settings(wait_target_s=0.75, down_window_s=100, burst_share=0, settle_s=10)
    world = World(plain, target=20)
    world.run(150, 10_000)
    top = world.target
    targets = world.run(250, 2000)
    assert set(targets[:95]) == {top}
    assert targets[-1] == math.ceil(2000 / each(plain) / 0.9)


def test_of_a_burst_a_share_stays_for_longer() -> None:
    patient = Settings(wait_target_s=0.75, down_window_s=50, burst_share=0.75, burst_window_s=600)
    world = World(patient, target=5)
    world.run(60, 3000)
    world.run(90, 12_000)
    targets = world.run(700, 3000)
    kept = math.ceil(0.75 * 12_000 / each(patient, headroom=False))
    assert targets[300] == kept
    assert targets[-1] == math.ceil(3000 / each(patient) / 0.9)


@settings(max_examples=15)
@given(
    st.integers(0, 2**32), st.floats(50, 30_000), st.floats(0, 0.045), st.integers(1, 64),
    st.sampled_from([0.0, 20.0]),
)  # fmt: skip
def test_a_steady_noisy_load_changes_the_count_at_most_once_after_settling(
    seed: int, load: float, noise: float, first: int, start_s: float
) -> None:
    rng = np.random.default_rng(seed)
    world = World(target=first, start_s=start_s)
    targets = world.run(700, lambda second: load * (1 + noise * rng.uniform(-1, 1)))
    # Settled: started, once through the window, and one step down.
    assert changes(targets[200:]) <= 1
    assert all(1 <= target <= 64 for target in targets)
    assert targets[-1] >= min(64, math.floor(load * (1 - noise) / each()))


@settings(max_examples=15)
@given(st.floats(10, 50_000), st.floats(1, 5), st.integers(1, 64))
def test_more_load_never_gets_fewer_replicas(load: float, factor: float, first: int) -> None:
    few, many = World(target=first), World(target=first)
    for less, more in zip(few.run(250, load), many.run(250, load * factor), strict=True):
        assert less <= more


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60),
    st.integers(0, 5), st.integers(5, 64), st.integers(0, 64),
)  # fmt: skip
def test_the_bounds_hold_whatever_comes(
    loads: list[float], least: int, most: int, first: int
) -> None:
    world = World(target=first, least=least, most=most, start_s=3)
    assert all(least <= world.second(load) <= most for load in loads)


def settled(target: int = 10, load: float = 7000, **options: object) -> World:
    world = World(target=target, **options)  # type: ignore[arg-type]
    world.run(400, load)
    return world


@pytest.mark.parametrize("missing", [1, 3, 9])
def test_replicas_that_fall_silent_are_no_reason_to_scale_down(missing: int) -> None:
    world = settled()
    before = world.target
    world.silent = frozenset(str(n) for n in range(missing))
    assert set(world.run(1000, 7000)) == {before}
    assert set(world.run(500, 100)) == {before}  # however little the others say
    world.silent = frozenset()
    assert world.run(300, 100)[-1] == 1


def test_new_replicas_that_have_not_reported_are_no_reason_either() -> None:
    world = settled()
    before = world.target
    world.resize(before + 5)
    world.ready_s[before:] = [world.now_s] * 5
    world.silent = frozenset(str(n) for n in range(before, before + 5))
    assert set(world.run(500, 7000)) == {before + 5}


def test_old_reports_that_are_sent_again_are_stale() -> None:
    state, seen = State(), None
    for second in range(100):
        reports = {"a": Report(50.0, 0.1, 10.0, 2.5, *COST)}
        seen = Observation(float(second), 5, ["a"], reports, 1, 64)
        decision, state = decide(QUICK, state, seen)
        assert decision.replicas == 5


@pytest.mark.parametrize("figure", [math.nan, math.inf, -1.0, 1e300])
@pytest.mark.parametrize("place", range(1, 7))
def test_a_replica_with_figures_that_cannot_be_is_unknown(figure: float, place: int) -> None:
    good = Report(0.0, 0.1, 400.0, 100.0, *COST)
    figures = list(good)
    figures[place] = figure
    state = State()
    for second in range(300):
        reports = {"a": good._replace(time_s=second), "b": Report(second, *figures[1:])}
        seen = Observation(float(second), 5, ["a", "b"], reports, 1, 64)
        decision, state = decide(QUICK, state, seen)
        assert decision.replicas == 5


def test_a_dead_replica_is_not_waited_for() -> None:
    world = settled()
    before = world.target
    del world.ready_s[0]  # Serve starts another one; the load goes to those that live
    world.ready_s.append(world.now_s + 10)
    assert set(world.run(300, 7000)) == {before}
    assert world.run(400, 1000)[-1] == math.ceil(1000 / each() / 0.9)


def test_a_wait_that_stays_over_the_target_corrects_the_figures_and_fades() -> None:
    world = settled()
    before = world.target
    world.wait_s = 1.0
    world.run(200, 7000)
    grown = world.target
    assert before * 1.1 < grown <= before * 4.5
    world.wait_s = 0.1
    assert world.run(200, 7000)[-1] == grown  # not at once back into the same mistake
    world.run(4000, 7000)
    assert world.target <= before + 2


def test_rows_that_wait_too_long_are_caught_up_on() -> None:
    calm, late = settled(), settled()
    late.wait_s = 20.0
    calm.second(7000)
    late.second(7000)
    behind = late.decision.forecast_rows_per_s - calm.decision.forecast_rows_per_s
    rows_per_s = COST[2] / (COST[0] + COST[1] * COST[2])
    assert behind == pytest.approx(calm.target * 19.25 * rows_per_s / QUICK.lead_s)


def test_idle_goes_to_zero_where_that_is_allowed() -> None:
    lazy = Settings(wait_target_s=0.75, idle_s=300)
    world = World(lazy, target=3, least=0)
    world.run(100, 2000)
    targets = world.run(400, 0)
    assert targets[250] == 1
    assert targets[-1] == 0
    assert World(lazy, target=3, least=1).run(500, 0)[-1] == 1


def test_from_zero_and_back() -> None:
    world = World(Settings(wait_target_s=0.75, idle_s=100), target=2, least=0, start_s=8)
    world.run(200, 0)
    assert world.target == 0
    assert set(world.run(50, 0)) == {0}
    world.resize(1)  # Serve's own doing: a request waits at its proxy
    assert set(world.run(8, 0)) == {1}  # not sent away while it starts
    assert world.run(30, 5000)[-1] == math.ceil(5000 / each())


def test_a_controller_that_starts_anew_keeps_what_runs_until_it_has_looked_for_a_window() -> None:
    world = settled()
    world.resize(30)
    world.state = State()
    assert set(world.run(115, 7000)) == {30}
    assert world.run(10, 7000)[-1] < 30


def test_what_replicas_cost_is_not_known_yet() -> None:
    reports = {"a": Report(0.0, 0.1, 5000.0, 1250.0)}
    decision, _ = decide(QUICK, State(), Observation(0.0, 3, ["a"], reports, 1, 64))
    assert decision == Decision(3, 5000.0, 0.0)


def bad() -> Iterator[tuple[str, object]]:
    for each_ in fields(Settings):
        for value in (-1, math.nan, math.inf, "1", None, True):
            yield each_.name, value
    yield from (("headroom", 1.0), ("band", 1), ("burst_share", 1.01), ("up_ratio", 0.9))
    yield from (("wait_target_s", 0), ("up_replicas", 0), ("stale_s", 0.0))


@pytest.mark.parametrize(("name", "value"), list(bad()))
def test_a_number_that_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*, expected "):
        Settings(**{name: value})  # type: ignore[arg-type]
