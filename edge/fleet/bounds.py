"""What a count of late inferences says about their share, and a sample about its quantile.

Exact binomial arithmetic on floats, without scipy, which a device's installation does not have. The
counts need not be whole: neighbouring latencies depend on each other, so that a thousand of them
may be worth a hundred independent ones (:mod:`edge.fleet.verdict` finds out how many).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

_STEPS = 300  # of the continued fraction; it needs about the square root of its arguments
_BISECTIONS = 60  # halvings of [0, 1]: beyond them a float64 has no more places


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and x in [0, 1].

    By Lentz's continued fraction, in logarithms, on the side where that converges.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ConfigError(f"beta_cdf got x={x}, a={a}, b={b}, expected 0 <= x <= 1 and a, b > 0")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    log_front = (
        math.lgamma(a + b)
        - math.lgamma(a)
        - math.lgamma(b)
        + a * math.log(x)
        + b * math.log1p(-x)
        - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, _STEPS + int(4 * math.sqrt(max(a, b)))):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-13:
            break
    return min(1.0, math.exp(log_front) * fraction)


def binomial_cdf(count: float, trials: float, share: float) -> float:
    """Probability of at most ``count`` among ``trials``, each with probability ``share``."""
    if count >= trials:
        return 1.0
    return 1.0 - beta_cdf(share, count + 1, trials - count)


def lower_bound(count: float, trials: float, error: float) -> float:
    """Clopper and Pearson's bound: the true share is lower with probability ``error`` at most."""
    if count <= 0:
        return 0.0
    return _solve(lambda share: beta_cdf(share, count, trials - count + 1), error)


def upper_bound(count: float, trials: float, error: float) -> float:
    """Clopper and Pearson's bound: the true share is higher with probability ``error`` at most."""
    if count >= trials:
        return 1.0
    return _solve(lambda share: beta_cdf(share, count + 1, trials - count), 1.0 - error)


def discarded(trials: int, quantile: float, error: float) -> int | None:
    """How many of the largest of ``trials`` values may be left out below which q surely lies.

    The largest t such that at most t of ``trials`` values beyond the quantile would be a surprise
    (probability ``error`` at most); the next value is then an upper bound of the quantile. None
    where ``trials`` are too few for even t = 1, so that one outlier alone never is the figure. This
    is the early stopping of MLPerf LoadGen.
    """
    _check(quantile, error)

    def surprising(count: int) -> bool:
        return binomial_cdf(count, trials, 1.0 - quantile) <= error

    if trials < 2 or not surprising(1):
        return None
    low, high = 1, max(2, math.ceil(trials * (1.0 - quantile)) + 1)
    while high - low > 1:  # the distribution function rises with the count
        middle = (low + high) // 2
        low, high = (middle, high) if surprising(middle) else (low, middle)
    return low


def trials_needed(quantile: float, error: float) -> int:
    """The fewest values whose :func:`discarded` is not None: 64 for p90 and 662 for p99 at 1%."""
    _check(quantile, error)
    low, high = 1, 2
    while discarded(high, quantile, error) is None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if discarded(middle, quantile, error) else (middle, high)
    return high


def quantile_bound(
    values: npt.NDArray[np.float64], quantile: float, error: float = 0.01
) -> float | None:
    """What the true quantile exceeds with probability ``error`` at most; None from too few values.

    values: (n,) independent samples, in any order.
    """
    left_out = discarded(len(values), quantile, error)
    return None if left_out is None else float(np.sort(values)[len(values) - left_out - 1])


def _solve(rising: Callable[[float], float], target: float) -> float:
    """Where a rising function of [0, 1] meets ``target``."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def _check(quantile: float, error: float) -> None:
    if not (0 < quantile < 1 and 0 < error < 1):
        raise ConfigError(f"quantile {quantile} and error {error} are expected between 0 and 1")
