"""What will be offered: the level of a rate, its trend, and whether it has just jumped.

Samples are (time in seconds, rate) in order, about one a second. Pure; knows no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Samples = Sequence[tuple[float, float]]

LEVEL = 5  # samples in the level
_TREND = 20  # samples without which there is no trend: in the rise of a burst there is none
BURST = 2  # samples in a row that are far above the level: a new level
_DEVIATIONS = 4.0  # that are far, and by which a slope is not chance


def forecast(samples: Samples, lead_s: float, least: float = 0.0) -> float:
    """The offered rate in ``lead_s``: the level, and the trend where there is one upwards.

    A trend counts where it is not chance and still goes on, and is trusted as far ahead as it was
    seen to last. What seems to fall is not expected to.

    Args:
        samples: (time, rate), in order, since the last burst.
        lead_s: how far ahead, in seconds.
        least: share of the level below which a rise does not count.
    """
    level, count = level_of(samples), len(samples)
    if count < _TREND:
        return level
    slope, error = _slope(samples)
    if slope <= _DEVIATIONS * error:
        return level
    slope = min(slope, _slope(samples[count // 2 :])[0])
    first, last = samples[0][0], samples[-1][0]
    # The level is behind by half of what it is the mean of.
    rise = slope * (min(lead_s, last - first) + (last - samples[-LEVEL][0]) / 2)
    return level + rise if rise > least * level else level


def _slope(samples: Samples) -> tuple[float, float]:
    """Least squares: the rise per second, and its standard error."""
    count = len(samples)
    middle = math.fsum(time for time, _ in samples) / count
    mean = math.fsum(rate for _, rate in samples) / count
    spread = math.fsum((time - middle) ** 2 for time, _ in samples)
    slope = math.fsum((time - middle) * (rate - mean) for time, rate in samples) / spread
    rest = math.fsum((rate - mean - slope * (time - middle)) ** 2 for time, rate in samples)
    return slope, math.sqrt(rest / (count - 2) / spread)


def level_of(samples: Samples) -> float:
    """The mean of the last few."""
    newest = samples[-LEVEL:]
    return math.fsum(rate for _, rate in newest) / len(newest) if newest else 0.0


def is_burst(samples: Samples, least: float) -> bool:
    """Whether the newest samples are all far above the level before them."""
    before, newest = samples[:-BURST], samples[-BURST:]
    if len(before) < LEVEL:
        return False
    steps = [abs(later - earlier) for (_, earlier), (_, later) in pairwise(before)]
    deviation = math.fsum(steps) / len(steps) * math.sqrt(math.pi) / 2
    level = level_of(before)
    return min(rate for _, rate in newest) > level * (1 + least) + _DEVIATIONS * deviation
