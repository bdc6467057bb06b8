"""Which rate to try next, and what is known of the largest one that meets the objective.

From a start the rate doubles until a load fails. From then on the capacity is a matter of belief:
near it, the odds of being late are taken to rise with a power of the rate, whose exponent is not
known either; what each probe saw makes some pairs of capacity and exponent likelier than others
(:class:`Belief`). The next probe goes where it says most. The search ends when the belief is narrow
enough. A probe that could not be decided is no loss: what it saw counts as well.

Far from the capacity the power law is wrong (an overloaded queue has no share of late ones, it
grows), and so is a share near zero (one hiccup of the machine in a thousand inferences). There only
the side counts: shares are cut off at a fifth and at twenty times what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.fleet.objective import Objective
from edge.fleet.verdict import Rules, Verdict, rules_for

_POINTS = 2000  # of the grid over capacities
_EXPONENTS = np.geomspace(4.0, 160.0, 14)
_CUT_LOW, _CUT_HIGH = 0.2, 20.0  # in allowed shares
_REACH = 4.0  # how far beyond the probes the capacity may lie
_LEVEL = 0.95  # of the interval
_NEAR, _NEAR_PROBES = 0.2, 4  # so many probes so near are asked for
_RAMP_S = 3.0  # of observation while the rate still doubles

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate and what was seen there.

    Attributes:
        rate: inferences per second.
        verdict: what the load's judge said in the end.
    """

    rate: float
    verdict: Verdict

    def passes(self, allowed: float) -> bool:
        """Whether it passed, or looks as if it would where nothing is sure, or nothing was seen."""
        if self.verdict.answer == "open":
            return not self.verdict.share > allowed
        return self.verdict.answer == "pass"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to search; rates in inferences per second.

    Attributes:
        objective: what the load is to meet.
        start_rate: where to begin.
        least_rate: below it there is no capacity worth the name.
        most_rate: more is not asked for.
        tolerance: half the width of the interval at which the search ends, relative.
        most_probes: the search ends at that many probes in any case.
        most_s: of observation in one probe; None for what suits the objective.
        error: probability of a wrong answer to either side, for each probe.
    """

    objective: Objective
    start_rate: float = 32.0
    least_rate: float = 0.25
    most_rate: float = 1e6
    tolerance: float = 0.03
    most_probes: int = 24
    most_s: float | None = None
    error: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        if not 0 < self.least_rate <= self.start_rate <= self.most_rate < math.inf:
            raise ConfigError(
                f"rates are {self.least_rate}, {self.start_rate} and {self.most_rate}, expected "
                f"0 < least <= start <= most"
            )
        if not 0.001 <= self.tolerance <= 0.5:
            raise ConfigError(f"tolerance is {self.tolerance}, expected 0.001 to 0.5")
        if self.most_probes < 1:
            raise ConfigError(f"most_probes is {self.most_probes}, expected at least 1")
        self.rules(self.start_rate)  # refuses what it has to

    def rules(self, rate: float) -> Rules:
        """How a probe is judged near the capacity."""
        return rules_for(self.objective, rate, self.most_s, self.error)

    def ramp_rules(self, rate: float) -> Rules:
        """How a probe is judged while the rate doubles: enough to see an overload."""
        rules = self.rules(rate)
        most_s = max(_RAMP_S, 15 * self.objective.latency_s, rules.least_s)
        return Rules(rules.warmup_s, rules.least_s, min(most_s, rules.most_s), self.error)


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next.

    Attributes:
        rate: to try, inferences per second.
        rules: to judge it by.
    """

    rate: float
    rules: Rules


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known of the capacity, in inferences per second.

    Attributes:
        rate: the middle of the belief; None where every probe passed, or every one failed.
        low: the capacity is at least that, with 97.5%; the largest rate that passed where there is
            no belief yet, and 0 if none did.
        high: and at most that; infinite where nothing failed.
    """

    rate: float | None
    low: float
    high: float

    @property
    def width(self) -> float:
        """Half of the interval, relative to the rate; infinite without one."""
        return math.inf if self.rate is None else (self.high - self.low) / 2 / self.rate


class Belief:
    """Weights over capacities, given what was tried; uniform in their logarithm at first."""

    def __init__(self, tried: Sequence[Tried], allowed: float) -> None:
        """Weigh every capacity from a quarter of the lowest rate to four times the highest."""
        rates = [one.rate for one in tried]
        reach = math.log(_REACH)
        low, high = math.log(min(rates)) - reach, math.log(max(rates)) + reach
        weights = np.ones(_POINTS)
        for _ in range(2):  # once more where the weight is, for a finer grid
            self.logs = np.linspace(low, high, _POINTS)
            weights = self._weigh(tried, allowed)
            kept = np.flatnonzero(weights > weights.max() * 1e-9)
            margin = (high - low) / _POINTS
            low, high = self.logs[kept[0]] - margin, self.logs[kept[-1]] + margin
        self.cumulated = np.cumsum(weights) / weights.sum()

    def _weigh(self, tried: Sequence[Tried], allowed: float) -> Floats:
        floor, ceiling = _CUT_LOW * allowed, min(_CUT_HIGH * allowed, (1 + allowed) / 2)
        level = math.log(allowed / (1 - allowed))
        logs = np.zeros((len(_EXPONENTS), _POINTS))
        for one in tried:
            some, total = one.verdict.independent
            if not total:
                continue
            some = min(max(some, floor * total), ceiling * total)
            odds = level + _EXPONENTS[:, None] * (math.log(one.rate) - self.logs)
            share = 1 / (1 + np.exp(-np.clip(odds, -50, 50)))
            share = np.clip(share, floor, ceiling)
            logs += some * np.log(share) + (total - some) * np.log1p(-share)
        weights: Floats = np.exp(logs - logs.max()).sum(axis=0)
        return weights

    def quantile(self, q: float) -> float:
        """The rate below which the capacity lies with weight ``q``."""
        return float(np.exp(np.interp(q, self.cumulated, self.logs)))


def estimate(tried: Sequence[Tried], plan: Plan) -> Estimate:
    """What the probes say of the capacity."""
    allowed = plan.objective.allowed
    passed = [one.rate for one in tried if one.passes(allowed)]
    failed = [one.rate for one in tried if not one.passes(allowed)]
    if not passed or not failed:
        return Estimate(None, max(passed, default=0.0), min(failed, default=math.inf))
    belief = Belief(tried, allowed)
    tail = (1 - _LEVEL) / 2
    return Estimate(belief.quantile(0.5), belief.quantile(tail), belief.quantile(1 - tail))


def _is_known(tried: Sequence[Tried], plan: Plan) -> bool:
    """Whether the belief is narrow, and not by the luck of one probe."""
    known = estimate(tried, plan)
    if known.rate is None or known.width > plan.tolerance:
        return False
    near = [one for one in tried if abs(one.rate / known.rate - 1) <= _NEAR]
    sides = {one.passes(plan.objective.allowed) for one in near}
    return len(near) >= _NEAR_PROBES and len(sides) == 2


def next_step(tried: Sequence[Tried], plan: Plan) -> Step | None:
    """What to try after ``tried``; None where the search is over."""
    if not tried:
        return Step(plan.start_rate, plan.ramp_rules(plan.start_rate))
    if len(tried) >= plan.most_probes:
        return None
    rates = [one.rate for one in tried]
    sides = {one.passes(plan.objective.allowed) for one in tried}
    if sides == {True}:
        rate = min(2 * max(rates), plan.most_rate)
        return None if rate <= max(rates) else Step(rate, plan.ramp_rules(rate))
    if sides == {False}:
        rate = max(min(rates) / 2, plan.least_rate)
        return None if rate >= min(rates) else Step(rate, plan.rules(rate))
    if _is_known(tried, plan):
        return None
    belief = Belief(tried, plan.objective.allowed)
    # A little to either side in turn: two rates tell the exponent, one rate twice does not.
    rate = belief.quantile((0.35, 0.65)[len(tried) % 2])
    rate = min(max(rate, plan.least_rate), plan.most_rate)
    return Step(rate, plan.rules(rate))
