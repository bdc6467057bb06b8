"""One training run as data, and what it found: the seam at which any trainer fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge.search.space import Candidate


@dataclass(frozen=True, slots=True)
class Trial:
    """Train this, for so long, and say how good it is.

    Attributes:
        candidate: what to train.
        seconds: CPU seconds to train it for; loading and measuring not included.
        seed: of everything random.
    """

    candidate: Candidate
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a trainer found.

    Attributes:
        accuracy: share of right answers on inputs that were held out, 0 to 1.
        n: how many those were.
    """

    accuracy: float
    n: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trial: ``measured``, or else ``problem`` says why not.

    Attributes:
        trial: which one.
        measured: what the trainer found.
        problem: one sentence.
        cpu_s: CPU seconds of the whole trial.
        wall_s: seconds it took, a process's start included.
    """

    trial: Trial
    measured: Measured | None
    problem: str | None
    cpu_s: float
    wall_s: float


Trainer = Callable[[Trial], Measured]
"""Trains and measures; goes to other processes, so it must be picklable."""
