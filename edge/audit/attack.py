"""What an attack is: from one operator's observation, within a budget, to a claim."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge.audit.observation import Observation

Array = npt.NDArray[Any]
ALL_MODES = frozenset({"mix", "bounded", "split"})


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """What an attack says about the members of the groups; None where it says nothing.

    The first axis is the groups, in the order of :func:`edge.audit.observation.requests`. An attack
    that ran out of time claims the first ones only and is scored on these. What is claimed of the
    members of a group is unordered: scoring matches it with the truth as kindly as can be.

    Attributes:
        inputs: (groups, K, C, H, W) float, pictures; see
            :func:`edge.audit.observation.pictures` for their units. Values outside are cut.
        gallery_scores: (groups, g) or (groups, K, g) float: the higher, the more likely it is that
            this item of the gallery is a member of the group, or is this member.
        attributes: (groups, K) integers, classes of the members.
        pairs: (groups, groups) float: the higher, the more likely it is that these two groups
            have an input in common. What stands above the diagonal counts.
        notes: what a reader should know.
    """

    inputs: Array | None = None
    gallery_scores: Array | None = None
    attributes: Array | None = None
    pairs: Array | None = None
    notes: str = ""


def _silent(_: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Time for one attack; it begins when this is made.

    Attributes:
        seconds: wall-clock time; an attack that cares looks at :meth:`expired`.
        seed: of everything random in the attack.
        report: takes a line of progress.
        clock: monotonic seconds.
    """

    seconds: float
    seed: int = 0
    report: Callable[[str], None] = _silent
    clock: Callable[[], float] = time.monotonic
    _begin_s: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look at the clock."""
        object.__setattr__(self, "_begin_s", self.clock())

    def left_s(self) -> float:
        """Seconds left, 0 at least."""
        return max(0.0, self.seconds - (self.clock() - self._begin_s))

    def expired(self) -> bool:
        """Whether the time is over."""
        return self.left_s() <= 0

    def rng(self) -> np.random.Generator:
        """A fresh generator from the seed."""
        return np.random.default_rng(self.seed)


class Attack(Protocol):
    """One attack; one file in :mod:`edge.audit.attacks`."""

    @property
    def name(self) -> str:
        """For command lines and rows: ``[a-z0-9-]+``."""
        ...

    @property
    def title(self) -> str:
        """What it does, in a line."""
        ...

    @property
    def modes(self) -> frozenset[str]:
        """Modes it is of use against."""
        ...

    @property
    def operators(self) -> frozenset[str]:
        """Whose view it takes: "A", "B" or both; B exists in the mode split only."""
        ...

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """Attack."""
        ...
