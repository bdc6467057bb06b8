"""Successive halving: many short trainings, then fewer and longer ones.

The inner loop of Hyperband (Li, Jamieson, DeSalvo, Rostamizadeh and Talwalkar, arXiv:1603.06560),
after Jamieson and Talwalkar, arXiv:1502.07943. Every rung costs about the same. Every training
starts anew, because a learning rate's cycle is planned for the training's whole length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamix.errors import ConfigError
from edge.search import pareto


@dataclass(frozen=True, slots=True)
class Rung:
    """One round of the race.

    Attributes:
        trainings: how many candidates are trained.
        seconds: CPU seconds that each gets.
    """

    trainings: int
    seconds: float

    @property
    def total_s(self) -> float:
        """CPU seconds of all of them."""
        return self.trainings * self.seconds


@dataclass(frozen=True, slots=True)
class Halving:
    """The plan of a race.

    Attributes:
        seconds: CPU seconds of each training in the first rung.
        rungs: how many there are.
        factor: from rung to rung, so many times the seconds for so many times fewer candidates.
    """

    seconds: float = 20.0
    rungs: int = 3
    factor: int = 2

    def __post_init__(self) -> None:
        """Refuse a plan that is none."""
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"seconds is {self.seconds}, expected more than 0")
        if not 1 <= self.rungs <= 20:
            raise ConfigError(f"rungs is {self.rungs}, expected 1 to 20")
        if not 2 <= self.factor <= 10:
            raise ConfigError(f"factor is {self.factor}, expected 2 to 10")

    def plan(self, candidates: int) -> list[Rung]:
        """The rungs for so many candidates; the last has at least one."""
        return [
            Rung(-(-candidates // self.factor**rung), self.seconds * self.factor**rung)
            for rung in range(self.rungs)
        ]


def promote(points: Sequence[pareto.Point], keep: int) -> list[int]:
    """Places of the ``keep`` points that are trained for longer, in order.

    Half of them (rounded up) are the most accurate, as in plain successive halving: the best
    network for the budget is among these. The others come from the Pareto front, far apart: by
    accuracy alone the race would drop every cheap network, and the front with them.

    Args:
        points: minus the accuracy first, then the costs.
        keep: how many, at most as many as there are points.
    """
    best = sorted(range(len(points)), key=lambda place: (points[place], place))
    chosen = best[: -(-keep // 2)]
    return sorted([*chosen, *pareto.spread(points, keep - len(chosen), chosen)])
