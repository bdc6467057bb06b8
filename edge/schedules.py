"""Learning rates and other courses of a run, as pure functions of the step.

A schedule without a state needs no place in a checkpoint, and a resumed run cannot lose its way.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["one-cycle", "triangle", "cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def learning_rate(
    schedule: Schedule, step: int, total: int, peak: float, *, warm_up: float
) -> float:
    """Learning rate of ``step``, 0 to ``total - 1``.

    Args:
        schedule: ``one-cycle``: up along a cosine, down along another one to almost nothing
            (:func:`one_cycle`). The others go up along a line; then ``triangle`` goes down along
            a line and ``cosine`` along a cosine, both to almost nothing, and ``constant`` stays.
        step: from 0.
        total: planned steps.
        peak: the highest rate.
        warm_up: share of the steps in which the rate rises, 0 to 1.
    """
    if schedule == "one-cycle":
        return one_cycle(step, total, peak, rising=warm_up)
    rising = int(warm_up * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    if schedule == "constant":
        return peak
    way = (step - rising) / max(1, total - 1 - rising)
    end = peak / 1e4
    if schedule == "triangle":
        return peak + (end - peak) * min(1.0, way)
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, way))) / 2


def one_cycle(step: int, total: int, peak: float, *, rising: float = 0.3) -> float:
    """Up along a cosine for a share ``rising`` of the way, then down to almost nothing.

    Smith and Topin, "Super-convergence", arXiv:1708.07120; the shape is that of torch's
    ``OneCycleLR`` with its defaults, as a function of the step instead of an object with a state.
    """
    turn = max(1.0, rising * total - 1)
    start, end = peak / 25, peak / 25e4
    if step <= turn:
        return peak + (start - peak) * (1 + math.cos(math.pi * step / turn)) / 2
    way = (step - turn) / max(1.0, total - 1 - turn)
    return end + (peak - end) * (1 + math.cos(math.pi * way)) / 2


def average_decay(step: int, decay: float) -> float:
    """How much of the averaged weights stays at ``step``: little at first, ``decay`` later.

    An average that starts with the random weights would remember them for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


def curriculum(step: int, total: int, share: float) -> float:
    """Strength of the mixing: grows from 0 to 1 in the first ``share`` of the steps."""
    return 1.0 if share <= 0 else min(1.0, step / (share * total))
