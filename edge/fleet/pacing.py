"""Which device owes which inference, and when: pure functions of a seed.

Nothing here knows a clock, so tests are tables and never sleep. The schedule is made whole and then
cut by device, so a fleet in one process and a fleet in ten send the same inferences at the same
times from the same devices. The times themselves are :mod:`edge.fleet.arrivals`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamix.errors import ConfigError
from edge.fleet import arrivals
from edge.fleet.arrivals import Closed
from edge.fleet.behaviour import Churn, present_owners

# Each draw has a generator of its own, so that changing one never shifts another (0: the times).
_DEVICES, _INPUTS = 1, 2
_CLOSED_INPUTS = 1 << 16  # nobody knows how many inferences a closed loop will have


@dataclass(frozen=True, slots=True)
class Schedule:
    """Inferences in the order they are due.

    Attributes:
        index: (n,) uint32, the inference's number in the whole fleet.
        due_s: (n,) float64, seconds after the start, never falling.
        device: (n,) uint32, the device that owes it.
        closed: in a closed loop, what comes after these first inferences, one per device; else
            None, and these are all.
    """

    index: NDArray[np.uint32]
    due_s: NDArray[np.float64]
    device: NDArray[np.uint32]
    closed: Closed | None = None

    def __len__(self) -> int:
        """Count the inferences."""
        return len(self.due_s)

    @property
    def distinct(self) -> int:
        """How many inferences ask something of their own; those with larger numbers repeat it."""
        return len(self) if self.closed is None else _CLOSED_INPUTS

    def shard(self, number: int, shards: int) -> Schedule:
        """Keep what the devices with ``device % shards == number`` owe."""
        if not 0 <= number < shards:
            raise ConfigError(f"shard is {number}, expected 0 to {shards - 1}")
        mine = self.device % shards == number
        return Schedule(self.index[mine], self.due_s[mine], self.device[mine], self.closed)


def schedule(
    pacer: str,
    rate: float,
    duration_s: float,
    devices: int,
    seed: int,
    churn: Churn | None = None,
) -> Schedule:
    """Make the whole fleet's schedule; each inference falls on a device drawn evenly.

    Args:
        pacer: the law of arrivals; see :func:`edge.fleet.arrivals.parse`.
        rate: inferences per second, of the whole fleet.
        duration_s: for how long they fall due.
        devices: how many there are.
        seed: of every draw.
        churn: devices come and go by this law, and only those that are there are drawn; at a moment
            when nobody is there, nothing falls due.

    Raises:
        ConfigError: settings that make no schedule.
    """
    law = arrivals.parse(pacer)
    if devices < 1:
        raise ConfigError(f"devices is {devices}, expected at least 1")
    if isinstance(law, Closed):
        return _first_turns(law, duration_s, devices, seed)
    if isinstance(law, arrivals.Trace):
        found = law.read(duration_s)
        due_s, owner = found.due_s, found.device
        if owner is not None:
            if churn is not None:
                raise ConfigError("a trace that names devices got churn, expected one of the two")
            if owner.max() >= devices:
                raise ConfigError(
                    f"{law.path} names device {owner.max()}, expected 0 to {devices - 1}"
                )
            return _number(due_s, owner)
    else:
        due_s = law.times(rate, duration_s, seed)
    if churn is not None:
        present = present_owners(churn, due_s, devices, seed)
        return _number(due_s[present >= 0], present[present >= 0].astype(np.uint32))
    owner = np.random.default_rng([seed, _DEVICES]).integers(0, devices, len(due_s), np.uint32)
    return _number(due_s, owner)


def _number(due_s: NDArray[np.float64], owner: NDArray[np.uint32]) -> Schedule:
    return Schedule(np.arange(len(due_s), dtype=np.uint32), due_s, owner)


def _first_turns(law: Closed, duration_s: float, devices: int, seed: int) -> Schedule:
    """Every device's first inference, after it has thought; the index is the device's number."""
    due_s = np.array([law.thought_s(seed, device, 0) for device in range(devices)])
    order = np.argsort(due_s, kind="stable")
    owner = order[due_s[order] < duration_s].astype(np.uint32)
    return Schedule(owner, due_s[owner], owner, law)


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
