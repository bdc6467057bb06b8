"""Does a load meet its objective? A test that looks now and then, and stops when it knows.

Neighbouring inferences wait in the same queue, so their lateness is no sequence of independent
coins. How many independent ones they are worth is found by batch means: the run is cut into equal
stretches of time, and if the count of late ones scatters more from stretch to stretch than coins
would, the counts are divided by that factor before Clopper and Pearson's bounds are taken. Where
hardly any was late there is nothing to scatter; so the slowest tenth, of which there are always
enough, is looked at in the same way, and the larger factor counts. A queue that is long for a while
shows in both.

Looking often finds anything in the end; so the looks are planned, further and further apart, and
share the error they are allowed. No clock here: the caller says what is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.fleet.bounds import lower_bound, upper_bound
from edge.fleet.objective import Objective

STRETCHES = 20
_SLOW = 0.9
_GROWTH = 1.3  # of the time from look to look

Answer = Literal["pass", "fail", "open"]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rules:
    """How a load is judged; times in seconds of scheduled sends.

    Attributes:
        warmup_s: what falls due before is not counted: queues fill, caches warm up.
        least_s: of observation after that, before the first look.
        most_s: of observation, and then the last look.
        error: probability of a wrong pass, and of a wrong fail, over all looks.
    """

    warmup_s: float
    least_s: float
    most_s: float
    error: float = 0.05

    def __post_init__(self) -> None:
        """Refuse rules that cannot be followed."""
        if not (self.warmup_s >= 0 and 0 < self.least_s <= self.most_s < math.inf):
            raise ConfigError(
                f"warm-up {self.warmup_s} s, least {self.least_s} s and most {self.most_s} s are "
                f"expected as 0 <= warm-up and 0 < least <= most"
            )
        if not 0 < self.error < 0.5:
            raise ConfigError(f"error is {self.error}, expected between 0 and 0.5")

    @property
    def duration_s(self) -> float:
        """How long inferences fall due where no look decides earlier."""
        return self.warmup_s + self.most_s

    @property
    def looks_s(self) -> list[float]:
        """When to look, in seconds since the start: ever more apart, and at the end."""
        count = max(1, math.ceil(math.log(self.most_s / self.least_s) / math.log(_GROWTH)) + 1)
        times = [self.warmup_s + self.least_s * _GROWTH**look for look in range(count)]
        return [*times[:-1], self.duration_s]


def rules_for(
    objective: Objective, rate: float, most_s: float | None = None, error: float = 0.05
) -> Rules:
    """Rules that suit an objective, and a rate in inferences per second.

    The warm-up is 10 of the objective's latencies, at least a second. ``most_s`` is by default
    twice the time in which a load passes where none is late, though every one counts as one with
    all that fall due within half the objective's latency.
    """
    latency_s = objective.latency_s
    least_s = max(1.0, 10 * latency_s, 20 / rate)
    if most_s is None:
        clean = math.log(error / 10) / math.log(1 - objective.allowed)
        most_s = max(15.0, 2 * clean * max(latency_s / 2, 1 / rate))
    return Rules(max(1.0, 10 * latency_s), min(least_s, most_s), most_s, error)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a load.

    Attributes:
        answer: ``pass``: the objective is met; ``fail``: it is not; ``open``: it may be either.
        inferences: that fell due after the warm-up.
        late: of those, not answered right in time.
        share: of the late ones; NaN without inferences.
        low: the true share is lower only with the look's part of the error.
        high: nor is it higher.
        each: how many inferences are worth an independent one.
        observed_s: time after the warm-up that this is made of.
    """

    answer: Answer
    inferences: int
    late: int
    share: float
    low: float
    high: float
    each: float
    observed_s: float

    @property
    def independent(self) -> tuple[float, float]:
        """(late, all) in independent inferences."""
        return self.late / self.each, self.inferences / self.each


def judge(
    due_s: Floats,
    latency_s: Floats,
    until_s: float,
    objective: Objective,
    rules: Rules,
    *,
    error: float,
) -> Verdict:
    """Judge what fell due from the warm-up's end until ``until_s``, at one look.

    Args:
        due_s: (n,) when inferences fell due, in any order.
        latency_s: (n,) from then to the right answer; infinite where there was none.
        until_s: until when every one that fell due is among them.
        objective: what is promised.
        rules: of these, the warm-up.
        error: probability of a wrong answer to either side, for this look.
    """
    observed_s = until_s - rules.warmup_s
    kept = (due_s >= rules.warmup_s) & (due_s < until_s)
    due_s, latency_s = due_s[kept], latency_s[kept]
    late = latency_s > objective.latency_s
    count, late_count = len(due_s), int(late.sum())
    if not count or observed_s <= 0:
        return Verdict("open", count, late_count, math.nan, 0.0, 1.0, 1.0, max(0.0, observed_s))
    places = (due_s - rules.warmup_s) / observed_s
    slow = latency_s > np.quantile(latency_s, _SLOW, method="lower")
    each = max(1.0, _clustering(places, late), _clustering(places, slow))
    some, total = late_count / each, count / each
    low, high = lower_bound(some, total, error), upper_bound(some, total, error)
    answer: Answer = "open"
    if low > objective.allowed:
        answer = "fail"
    elif high <= objective.allowed:
        answer = "pass"
    return Verdict(answer, count, late_count, late_count / count, low, high, each, observed_s)


def _clustering(places: Floats, late: Bools) -> float:
    """How much more the late ones scatter over equal stretches than independent ones would.

    places: (n,) in [0, 1), where in the observed time each inference fell due.
    """
    stretch = np.minimum((places * STRETCHES).astype(np.int64), STRETCHES - 1)
    counts = np.bincount(stretch, minlength=STRETCHES)
    lates = np.bincount(stretch, weights=late, minlength=STRETCHES)
    share = late.mean()
    if not 0 < share < 1:
        return 1.0
    # The variance of a ratio of sums, over that of as many independent inferences.
    errors = lates - share * counts
    variance = (errors**2).sum() * STRETCHES / (STRETCHES - 1)
    return float(variance / (len(late) * share * (1 - share)))


class Judge:
    """Takes inferences as they end, and looks when a look is due.

    Attributes:
        verdict: of the last look; None before the first.
    """

    def __init__(self, objective: Objective, rules: Rules) -> None:
        """Judge a load that has not begun."""
        self.verdict: Verdict | None = None
        self._objective = objective
        self._rules = rules
        self._looks_s = rules.looks_s
        self._error = rules.error / len(self._looks_s)
        self._next = 0
        self._due_s: list[Floats] = []
        self._latency_s: list[Floats] = []

    def add(self, due_s: Floats, latency_s: Floats, until_s: float) -> bool:
        """Take inferences that have ended; return whether that is enough.

        Args:
            due_s: (n,) when they fell due.
            latency_s: (n,) from then to the right answer; infinite where there was none.
            until_s: all that fell due until then have been given by now.
        """
        self._due_s.append(due_s)
        self._latency_s.append(latency_s)
        if self._next == len(self._looks_s) or until_s < self._looks_s[self._next] - 1e-9:
            return self._over
        while self._next < len(self._looks_s) and until_s >= self._looks_s[self._next] - 1e-9:
            self._next += 1  # looks that were slept through are not made up for
        self.look(until_s)
        return self._over

    def look(self, until_s: float) -> Verdict:
        """Judge what is there, planned or not: at the end of a run that was cut short."""
        self._due_s = [np.concatenate(self._due_s)]
        self._latency_s = [np.concatenate(self._latency_s)]
        self.verdict = judge(
            self._due_s[0],
            self._latency_s[0],
            until_s,
            self._objective,
            self._rules,
            error=self._error,
        )
        return self.verdict

    @property
    def _over(self) -> bool:
        decided = self.verdict is not None and self.verdict.answer != "open"
        return decided or self._next == len(self._looks_s)
