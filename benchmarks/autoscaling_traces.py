"""Offered load over time, seeded: requests per second as a share of one replica's full capacity.

    diurnal    a day in two hours: low at night, two humps, slow drift and noise
    burst      a quarter of the peak, and bursts of one to four minutes at random moments, each up
               to its height within 2 to 20 s
    ramp       from 2 to 36 replicas' worth in ten minutes, a plateau, and down again

Shapes of our own; no recorded trace of anybody's is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Trace = npt.NDArray[np.float64]
PEAK = 36.0  # replicas' worth of load


def _noisy(load: Trace, rng: np.random.Generator) -> Trace:
    """Drift of a few percent over minutes: what Poisson arrivals do not have."""
    steps = rng.standard_normal(len(load)) * 0.002
    drift = np.zeros(len(load))
    for second in range(1, len(load)):
        drift[second] = 0.99 * drift[second - 1] + steps[second]
    return np.maximum(0.01, load * (1 + drift))


def diurnal(seed: int) -> Trace:
    """Two hours."""
    rng = np.random.default_rng((seed, 1))
    time = np.arange(7200) / 7200
    shift = rng.uniform(-0.03, 0.03)
    day = 0.12 + 0.55 * np.exp(-(((time - 0.42 + shift) / 0.13) ** 2))
    day += 0.85 * np.exp(-(((time - 0.78 + shift) / 0.09) ** 2))
    return _noisy(PEAK * day / day.max(), rng)


def burst(seed: int) -> Trace:
    """Two and a half hours with about fifteen bursts."""
    rng = np.random.default_rng((seed, 2))
    load = np.full(9000, PEAK * 0.25)
    start = rng.uniform(120, 360)
    while start < 8900:
        height = PEAK * rng.uniform(0.5, 0.75)
        rise, hold, fall = rng.uniform(2, 20), rng.uniform(60, 240), rng.uniform(10, 60)
        points = np.cumsum([start, rise, hold, fall])
        load += np.interp(np.arange(9000), points, [0, height, height, 0], left=0, right=0)
        start = points[-1] + rng.exponential(300) + 60
    return _noisy(load, rng)


def ramp(seed: int) -> Trace:
    """Forty minutes."""
    rng = np.random.default_rng((seed, 3))
    begin = rng.uniform(240, 360)
    points = np.cumsum([0, begin, 600, 600, 300])
    load = np.interp(np.arange(2400), points, [2, 2, PEAK, PEAK, 4])
    return _noisy(load, rng)


TRACES: dict[str, Callable[[int], Trace]] = {"diurnal": diurnal, "burst": burst, "ramp": ramp}
