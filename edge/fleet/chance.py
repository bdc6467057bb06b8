"""Numbers that look drawn but are looked up: a pure function of a seed, a purpose and a place.

A generator hands out its numbers in turn, so two shards that share one would give each device other
numbers than one shard does. Here the third message of device 7 has its number whoever asks for it,
and whenever. The function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014), whose output passes the usual tests of randomness.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LARGEST = 1 - 2.0**-53


class Purpose(IntEnum):
    """What a number is for; each has numbers of its own, so that one never shifts another."""

    PROFILE = 1
    PRESENCE = 2
    ARRIVAL = 3
    THINK = 4
    JITTER_UP = 5
    LOSS_UP = 6
    JITTER_DOWN = 7
    LOSS_DOWN = 8
    STORM = 9
    SLOW = 10
    CANCEL = 11


@overload
def uniform(seed: int, purpose: Purpose, first: int, second: int = 0) -> float: ...
@overload
def uniform(
    seed: int, purpose: Purpose, first: NDArray[Any], second: int = 0
) -> NDArray[np.float64]: ...
def uniform(
    seed: int, purpose: Purpose, first: int | NDArray[Any], second: int = 0
) -> float | NDArray[np.float64]:
    """Look up a number in [0, 1): the one of place (``first``, ``second``), evenly spread.

    first: a whole number, or an array of them, which gives float64 of its shape.
    """
    key = _key(seed, purpose)
    if isinstance(first, np.ndarray):
        with np.errstate(over="ignore"):
            mixed = _scramble_all(np.uint64(key) + first.astype(np.uint64))
            mixed = _scramble_all(mixed + np.uint64(second))
        return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, np.float64)
    return (_scramble(_scramble(key + int(first)) + int(second)) >> 11) * 2.0**-53


def exponential(mean: float, share: float) -> float:
    """Turn a number in [0, 1) into one that is exponential with that mean."""
    return -mean * math.log1p(-min(share, _LARGEST))


@cache
def _key(seed: int, purpose: Purpose) -> int:
    return _scramble(_scramble(seed & _MASK) + purpose)


def _scramble(state: int) -> int:
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)


def _scramble_all(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Do what :func:`_scramble` does, for arrays."""
    state = state + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    return state ^ (state >> np.uint64(31))
