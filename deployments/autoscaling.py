"""How many replicas: enough to hold a wait target, from what is offered and what batches cost.

Replicas report what was offered to them (also what they refused), what their batches cost and how
long the queue is in seconds (:mod:`deployments.load`). From that:

    forecast    level of the offered rows per second, and its trend over the time a replica takes
                to start; a burst is a new level at once
    capacity    rows per second that one replica can sustain so that answers keep the wait target
    target      up at once, in bounded steps, as soon as the forecast exceeds the capacity less its
                headroom; down to the most that was needed within a window, and only where that
                leaves a band below the threshold of the way up: so it never flaps. Where bursts
                came, a share of their height stays for longer
    feedback    rows that wait longer than the target are to be caught up on; where the wait stays
                over it although the figures say enough, the figures are corrected

GPU utilisation says none of this: an engine that takes what waits is busy at a fraction of its
capacity. Neither do ongoing requests: an open stream is one. Nothing here knows Ray, and the
clock is passed in; :mod:`deployments.policy` is Serve's side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from datamix.errors import ConfigError
from deployments.capacity import Report, sustainable, typical
from deployments.forecast import BURST, forecast, is_burst, level_of

_CATCH_UP_S = 10.0  # in which rows that wait too long are to be caught up on, at least
_SAMPLE_S = 1.0  # between two samples of the offered rate
_WINDOW_S = 60.0  # of samples kept at least, for the trend
_ABSURD = 1e15  # a replica whose figures are negative, this large or no numbers is unknown
_LOWER_S = 15.0  # between two steps down
_BURST_S = 60.0  # after the beginning of a burst, in which it rises to its height
_SMOOTH = 5  # samples of the wait
_CORRECT, _MOST = 1.15, 4.0  # how the figures are corrected: at a time, and at most
_FORGET = 10.0  # windows until a correction has faded to 1/e


@dataclass(frozen=True, slots=True)
class Settings:
    """What the policy is to hold; ``policy_kwargs`` in `deployments/serve.yaml`.

    Attributes:
        wait_target_s: from a request's arrival at a replica to its answer, in seconds. It cannot be
            held below two batches of one request.
        headroom: share of a replica's sustainable rate that is kept free, from 0 to less than 1.
        lead_s: how long a new replica takes from the decision to its first answer, in seconds, its
            node's start included where there is none to spare.
        up_ratio: the target grows to at most this many times itself per ``up_period_s``, or
        up_replicas: by this many, whichever is more.
        up_period_s: seconds, from the first step up on.
        settle_s: seconds after a change until the wait says something about the figures: streams
            move for as long (``rotate_streams_within_s``).
        down_window_s: what was needed within so many seconds stays.
        burst_share: where the load has jumped, so much of what it jumped to stays covered, from
            0 to 1: bursts that nobody foresees tend to come again.
        burst_window_s: for so many seconds.
        band: share of the forecast by which a smaller number must be able to do more.
        idle_s: nothing offered for so many seconds: to zero, where ``min_replicas`` is 0.
        stale_s: a replica that has not reported anew for so many seconds is unknown; the target
            does not fall while one is.
    """

    wait_target_s: float = 0.25
    headroom: float = 0.15
    lead_s: float = 30.0
    up_ratio: float = 4.0
    up_replicas: int = 4
    up_period_s: float = 5.0
    settle_s: float = 60.0
    down_window_s: float = 120.0
    burst_share: float = 1.0
    burst_window_s: float = 1800.0
    band: float = 0.1
    idle_s: float = 600.0
    stale_s: float = 15.0

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ConfigError: one is not finite or out of its range.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            least, below, words = _RANGES[each.name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{each.name} is {value!r}, expected a number")
            if not least <= value < below:
                raise ConfigError(f"{each.name} is {value}, expected {words}")


_ZERO = (0.0, math.inf, "0 or more, finite")
_SHARE = (0.0, 1.0, "0 or more and less than 1")
_RANGES = {
    "wait_target_s": (1e-6, math.inf, "more than 0, finite"),
    "headroom": _SHARE,
    "lead_s": _ZERO,
    "up_ratio": (1.0, math.inf, "1 or more, finite"),
    "up_replicas": (1, math.inf, "1 or more, finite"),
    "up_period_s": _ZERO,
    "settle_s": _ZERO,
    "down_window_s": _ZERO,
    "burst_share": (0.0, math.nextafter(1.0, 2.0), "0 to 1"),
    "burst_window_s": _ZERO,
    "band": _SHARE,
    "idle_s": _ZERO,
    "stale_s": (1e-6, math.inf, "more than 0, finite"),
}


@dataclass(frozen=True, slots=True)
class Observation:
    """All that one decision is made from.

    Attributes:
        now_s: seconds, monotonic from one decision to the next.
        target: how many replicas were asked for last.
        running: names of those that run.
        reports: the newest report of each replica that has sent one.
        min_replicas: the fewest allowed.
        max_replicas: the most allowed.
    """

    now_s: float
    target: int
    running: Sequence[str]
    reports: Mapping[str, Report]
    min_replicas: int
    max_replicas: int


Steps = tuple[tuple[float, float], ...]  # (time, value), later ones lower


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one decision to the next; starts empty.

    Attributes:
        noticed: per replica, the time of its newest report and when that was seen first.
        samples: (time, offered rows per second) since the last burst, one a second at most.
        needed: (time, replicas) that could not be done without, the most first.
        bursts: (time, rows per second) that bursts went up to, the highest first.
        burst_s: when the last burst began.
        capacity: rows per second that a replica can sustain, as last known; 0: never.
        wait_s: what replicas predict as their wait, smoothed.
        correction: by how much a row weighs more than the costs say.
        raised_s: when the current period of steps up began.
        raised_from: the target at its beginning.
        lowered_s: when the target went down last.
        changed_s: when the target or the number of replicas changed last.
        busy_s: when something was offered last.
        now_s: when this was.
        target: the decision; -1: there was none yet.
        running: how many ran.
    """

    noticed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: tuple[tuple[float, float], ...] = ()
    needed: Steps = ()
    bursts: Steps = ()
    burst_s: float = -math.inf
    capacity: float = 0.0
    wait_s: float = 0.0
    correction: float = 1.0
    raised_s: float = -math.inf
    raised_from: int = 0
    lowered_s: float = -math.inf
    changed_s: float = -math.inf
    busy_s: float = -math.inf
    now_s: float = -math.inf
    target: int = -1
    running: int = -1


class Decision(NamedTuple):
    """How many replicas, and why.

    Attributes:
        replicas: the target.
        forecast_rows_per_s: what is expected to be offered in ``lead_s``, with what is to be
            caught up on.
        capacity_rows_per_s: what one replica is trusted with; 0: not known yet.
    """

    replicas: int
    forecast_rows_per_s: float = 0.0
    capacity_rows_per_s: float = 0.0


def decide(settings: Settings, state: State, seen: Observation) -> tuple[Decision, State]:
    """Decide on the number of replicas, from what is seen and was remembered.

    Returns:
        The decision, within the bounds of ``seen``, and what to remember for the next.
    """
    now = seen.now_s
    state = _notice(state, seen)
    fresh = [
        seen.reports[name]
        for name, (_, noticed_s) in state.noticed.items()
        if now - noticed_s < settings.stale_s
    ]
    complete = bool(fresh) and len(fresh) == len(seen.running)
    state = _sample(settings, state, now, fresh, complete)
    if (capacity := sustainable(typical(fresh), settings.wait_target_s)) > 0:
        state = replace(state, capacity=capacity)
    state = _correct(settings, state, seen, complete)

    capacity = state.capacity * (1 - settings.headroom) / state.correction
    late_rows = math.fsum(_late_rows(report, settings.wait_target_s) for report in fresh)
    expected = forecast(state.samples, settings.lead_s, settings.band)
    expected += late_rows / max(settings.lead_s, _CATCH_UP_S)
    up = down = seen.target
    most = float(seen.max_replicas)
    if capacity > 0:
        up = math.ceil(min(most, expected / capacity))
        down = math.ceil(min(most, expected / capacity / (1 - settings.band)))
        reserve = settings.burst_share * _highest(state.bursts, now - settings.burst_window_s)
        down = max(down, math.ceil(min(most, reserve / state.capacity)))
    if not complete:
        down = max(down, seen.target)
    state = replace(state, needed=_stack(state.needed, now, settings.down_window_s, down))

    target = seen.target
    if now - state.raised_s >= settings.up_period_s:
        state = replace(state, raised_from=target)
    before = state.raised_from
    bound = max(int(min(before * settings.up_ratio, most)), before + int(settings.up_replicas))
    if up > target and bound > target:
        target = min(up, bound)
    elif state.needed[0][1] < target and now - state.lowered_s >= _LOWER_S:
        target = int(state.needed[0][1])
    if seen.target > 0:
        idle = complete and now - state.busy_s >= settings.idle_s
        target = 0 if idle else max(1, target)
    target = max(seen.min_replicas, min(seen.max_replicas, target))
    decision = Decision(target, expected, capacity)
    return decision, replace(
        state,
        raised_s=now if target > seen.target == state.raised_from else state.raised_s,
        lowered_s=now if target < seen.target else state.lowered_s,
        changed_s=now if target != seen.target else state.changed_s,
        now_s=now,
        target=target,
    )


def _notice(state: State, seen: Observation) -> State:
    """When did each replica last say something new, and what did others change?"""
    now = seen.now_s
    noticed = {}
    for name in seen.running:
        report, before = seen.reports.get(name), state.noticed.get(name)
        if report is not None and all(0 <= figure < _ABSURD for figure in report[1:]):
            new = before is None or report.time_s > before[0]
            noticed[name] = (report.time_s, now) if new or before is None else before
    state = replace(state, noticed=noticed)
    if len(seen.running) != state.running or seen.target != state.target:
        state = replace(state, running=len(seen.running), changed_s=now)
    if seen.target > state.target:
        # Whoever asked for so many, as Serve does at first and from zero, had a reason.
        needed = _stack(state.needed, now, math.inf, seen.target)
        state = replace(state, needed=needed, busy_s=now)
    return state


def _sample(
    settings: Settings, state: State, now: float, fresh: Sequence[Report], complete: bool
) -> State:
    """Take in the offered rate and the wait, once a second."""
    if not fresh:
        return state
    rate = math.fsum(report.offered_rows_per_s for report in fresh)
    if rate > 0:
        state = replace(state, busy_s=now)
    samples = state.samples
    if samples and now - samples[-1][0] < _SAMPLE_S * 0.999:
        return state
    if not complete and rate < level_of(samples):
        return state  # a part of it is missing
    wait_s = math.fsum(report.predicted_wait_s for report in fresh) / len(fresh)
    oldest = now - max(_WINDOW_S, settings.lead_s)
    samples = (*(sample for sample in samples if sample[0] > oldest), (now, rate))
    bursts, burst_s = state.bursts, state.burst_s
    if is_burst(samples, settings.band):
        samples = samples[-BURST:]
        burst_s = now
    if now - burst_s <= _BURST_S:
        bursts = _stack(bursts, now, settings.burst_window_s, level_of(samples))
    smoothed_s = state.wait_s + (wait_s - state.wait_s) / _SMOOTH
    return replace(state, samples=samples, bursts=bursts, burst_s=burst_s, wait_s=smoothed_s)


def _correct(settings: Settings, state: State, seen: Observation, complete: bool) -> State:
    """Believe the wait where it stays over the target although the figures say enough."""
    now = seen.now_s
    settled = (
        complete and len(seen.running) >= seen.target and now - state.changed_s >= settings.settle_s
    )
    if settled and state.wait_s > settings.wait_target_s and seen.target < seen.max_replicas:
        more = min(_MOST, state.correction * _CORRECT)
        return replace(state, correction=more, changed_s=now)
    if state.wait_s < settings.wait_target_s / 2 and state.correction > 1 and state.now_s < now:
        passed = (now - state.now_s) / max(_FORGET * settings.down_window_s, 1e-9)
        return replace(state, correction=1 + (state.correction - 1) * math.exp(-passed))
    return state


def _late_rows(report: Report, wait_s: float) -> float:
    """Rows in a replica's queue that the wait target is too short for."""
    round_s = report.round_s + report.row_s * report.round_rows
    if round_s <= 0:
        return 0.0
    return max(0.0, report.predicted_wait_s - wait_s) * report.round_rows / round_s


def _stack(steps: Steps, now: float, window_s: float, value: float) -> Steps:
    """The values within the window, without those that a later one reaches; the highest first."""
    kept = [(at, each) for at, each in steps if now - at <= window_s and each > value]
    return (*kept, (now, value))


def _highest(steps: Steps, since_s: float) -> float:
    return next((value for at, value in steps if at >= since_s), 0.0)
