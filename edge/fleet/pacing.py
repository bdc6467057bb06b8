"""When each inference is due and which device owes it: pure functions of a seed.

Nothing here knows a clock, so tests are tables and never sleep. The schedule is made whole and then
cut by device, so a fleet in one process and a fleet in ten send the same inferences at the same
times from the same devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamix.errors import ConfigError

# Each draw has a generator of its own, so that changing one never shifts another.
_TIMES, _DEVICES, _INPUTS = range(3)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Inferences in the order they are due.

    Attributes:
        index: (n,) uint32, the inference's number in the whole fleet.
        due_s: (n,) float64, seconds after the start, never falling.
        device: (n,) uint32, the device that owes it.
    """

    index: NDArray[np.uint32]
    due_s: NDArray[np.float64]
    device: NDArray[np.uint32]

    def __len__(self) -> int:
        """Count the inferences."""
        return len(self.due_s)

    def shard(self, number: int, shards: int) -> Schedule:
        """Keep what the devices with ``device % shards == number`` owe."""
        if not 0 <= number < shards:
            raise ConfigError(f"shard is {number}, expected 0 to {shards - 1}")
        mine = self.device % shards == number
        return Schedule(self.index[mine], self.due_s[mine], self.device[mine])


def poisson(rate: float, duration_s: float, seed: int) -> NDArray[np.float64]:
    """Draw the send times of a Poisson process: (n,) float64 in [0, duration_s), rising.

    Given their number, a Poisson process's arrivals are uniform: no gap is drawn one by one.

    rate: arrivals per second, of the whole fleet.
    """
    _check(rate, duration_s)
    generator = np.random.default_rng([seed, _TIMES])
    times = generator.random(generator.poisson(rate * duration_s)) * duration_s
    times.sort()
    return times


def constant(rate: float, duration_s: float, seed: int = 0) -> NDArray[np.float64]:
    """Space the send times evenly: 0, 1/rate, 2/rate ... below the duration; no seed is used."""
    _check(rate, duration_s)
    # One more than can fit, then cut: rate * duration may fall a rounding error short of a whole.
    times = np.arange(int(rate * duration_s) + 1) / rate
    return times[times < duration_s]


PACERS = {"poisson": poisson, "constant": constant}


def schedule(pacer: str, rate: float, duration_s: float, devices: int, seed: int) -> Schedule:
    """Make the whole fleet's schedule; each inference falls on a device drawn evenly."""
    if pacer not in PACERS:
        raise ConfigError(f"pacer is {pacer!r}, expected one of {', '.join(PACERS)}")
    if devices < 1:
        raise ConfigError(f"devices is {devices}, expected at least 1")
    due_s = PACERS[pacer](rate, duration_s, seed)
    owner = np.random.default_rng([seed, _DEVICES]).integers(0, devices, len(due_s), np.uint32)
    return Schedule(np.arange(len(due_s), dtype=np.uint32), due_s, owner)


def inputs(count: int, group_size: int, available: int, seed: int) -> NDArray[np.int64]:
    """Choose which inputs each inference classifies: (count, group_size) below ``available``.

    Every input is used once before any is used again (passes over shuffled inputs), so that an
    accuracy over a run is an accuracy over the sample.
    """
    if available < 1:
        raise ConfigError(f"there are {available} inputs, expected at least 1")
    needed = count * group_size
    generator = np.random.default_rng([seed, _INPUTS])
    passes = [generator.permutation(available) for _ in range(-(-needed // available))]
    flat = np.concatenate(passes) if passes else np.empty(0, np.int64)
    return flat[:needed].reshape(count, group_size)


def _check(rate: float, duration_s: float) -> None:
    if not (rate > 0 and np.isfinite(rate)):
        raise ConfigError(f"rate is {rate}, expected a positive number of inferences per second")
    if not (duration_s > 0 and np.isfinite(duration_s)):
        raise ConfigError(f"duration is {duration_s} s, expected a positive number of seconds")
