"""What devices do besides asking: come and go, all come back at once, read slowly, give up.

All off by default. Who does what and when is a pure function of the seed and the device's number,
so it is the same on any number of processes.

    --churn on_s=60,off_s=20              there for 60 s, away for 20 s, both exponential
    --storm at_s=10,share=0.5             half of the devices lose their stream at 10 s
    --slow-readers share=0.1,pause_s=0.5  a tenth reads nothing for 0.5 s after each read
    --cancel share=0.05,after_s=0.2       one inference in twenty is given up 0.2 s after it was due
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.fleet import options
from edge.fleet.chance import Purpose, exponential, uniform


@dataclass(frozen=True, slots=True)
class Churn:
    """Devices that come and go.

    Attributes:
        on_s: mean of the exponential time that a device stays.
        off_s: mean of the exponential time that it is away.
    """

    on_s: float
    off_s: float

    def __post_init__(self) -> None:
        """Refuse times that are none."""
        options.positive("churn", on_s=self.on_s, off_s=self.off_s)

    def starts_on(self, seed: int, device: int) -> bool:
        """Whether a device is there when the run starts, as it is in the long run."""
        return uniform(seed, Purpose.PRESENCE, device) < self.on_s / (self.on_s + self.off_s)

    def toggles(self, seed: int, device: int) -> Iterator[float]:
        """When a device goes or comes: endless, rising seconds after the start."""
        on, at_s, turn = self.starts_on(seed, device), 0.0, 0
        while True:
            turn += 1
            # No memory: what is left of the first stay has the law of a whole one.
            drawn = uniform(seed, Purpose.PRESENCE, device, turn)
            at_s += exponential(self.on_s if on else self.off_s, drawn)
            on = not on
            yield at_s


@dataclass(frozen=True, slots=True)
class Storm:
    """Devices that lose their stream at one moment and come back at once.

    Attributes:
        at_s: seconds after the start.
        share: of the devices, above 0.
    """

    at_s: float
    share: float

    def __post_init__(self) -> None:
        """Refuse a storm that can't be."""
        options.positive("storm", at_s=self.at_s)
        options.share("storm", self.share)

    def hits(self, seed: int, device: int, number: int) -> bool:
        """Whether storm ``number`` of the run hits a device."""
        return uniform(seed, Purpose.STORM, device, number) < self.share


@dataclass(frozen=True, slots=True)
class SlowReaders:
    """Devices that let the cloud's answers pile up.

    Attributes:
        share: of the devices, above 0.
        pause_s: for how long one reads nothing after it has read.
    """

    share: float
    pause_s: float

    def __post_init__(self) -> None:
        """Refuse readers that can't be."""
        options.positive("slow readers", pause_s=self.pause_s)
        options.share("slow readers", self.share)

    def has(self, seed: int, device: int) -> bool:
        """Whether a device is one of them."""
        return uniform(seed, Purpose.SLOW, device) < self.share


@dataclass(frozen=True, slots=True)
class Cancellations:
    """Inferences that the device gives up of its own accord.

    Attributes:
        share: of the inferences, above 0.
        after_s: how long after it was due; one that has ended by then is not given up.
    """

    share: float
    after_s: float

    def __post_init__(self) -> None:
        """Refuse what can't be."""
        options.positive("cancel", after_s=self.after_s)
        options.share("cancel", self.share)

    def has(self, seed: int, index: int) -> bool:
        """Whether the fleet's inference number ``index`` is one of them."""
        return uniform(seed, Purpose.CANCEL, index) < self.share


def churn(text: str) -> Churn:
    """Read ``on_s=60,off_s=20``.

    Raises:
        ConfigError: it is something else.
    """
    return Churn(**options.numbers("churn", text, {"on_s": None, "off_s": None}))


def storm(text: str) -> Storm:
    """Read ``at_s=10,share=0.5``.

    Raises:
        ConfigError: it is something else.
    """
    return Storm(**options.numbers("storm", text, {"at_s": None, "share": 1.0}))


def slow_readers(text: str) -> SlowReaders:
    """Read ``share=0.1,pause_s=0.5``.

    Raises:
        ConfigError: it is something else.
    """
    return SlowReaders(**options.numbers("slow readers", text, {"share": None, "pause_s": None}))


def cancellations(text: str) -> Cancellations:
    """Read ``share=0.05,after_s=0.2``.

    Raises:
        ConfigError: it is something else.
    """
    return Cancellations(**options.numbers("cancel", text, {"share": None, "after_s": None}))


def present_owners(
    law: Churn, due_s: NDArray[np.float64], devices: int, seed: int
) -> NDArray[np.int64]:
    """Give each arrival to a device that is there, drawn evenly among those.

    Returns:
        (n,) int64 devices; -1 for an arrival at a moment when nobody is there.
    """
    owners = np.full(len(due_s), -1, np.int64)
    present = [device for device in range(devices) if law.starts_on(seed, device)]
    place = {device: index for index, device in enumerate(present)}
    timelines = [law.toggles(seed, device) for device in range(devices)]
    changes = [(next(timeline), device) for device, timeline in enumerate(timelines)]
    heapq.heapify(changes)
    draws = uniform(seed, Purpose.ARRIVAL, np.arange(len(due_s)))
    for index, (at_s, draw) in enumerate(zip(due_s.tolist(), draws.tolist(), strict=True)):
        while changes[0][0] <= at_s:
            _, device = changes[0]
            heapq.heapreplace(changes, (next(timelines[device]), device))
            if device in place:
                # The last of the list takes the place of the one that goes.
                hole, last = place.pop(device), present.pop()
                if last != device:
                    present[hole], place[last] = last, hole
            else:
                place[device] = len(present)
                present.append(device)
        if present:
            owners[index] = present[int(draw * len(present))]
    return owners
