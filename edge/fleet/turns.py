"""A closed loop: once a device's inference has ended, it thinks, and then the next one is due."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Protocol

from edge.fleet.arrivals import Closed
from edge.fleet.config import FleetConfig
from edge.fleet.device import FleetDevice
from edge.fleet.timers import Timers


class Rows(Protocol):
    """What a closed loop wants of the shard and its table; a row is known by its position."""

    def add_row(self, device: FleetDevice, due_s: float) -> int:
        """Make a row for what a device owes next; return its position."""
        ...

    def move_row(self, position: int, due_s: float) -> None:
        """Let a row fall due at another time, or never at infinity."""
        ...

    def owner(self, position: int) -> FleetDevice:
        """The device that owes a row."""
        ...

    def begin(self, position: int) -> None:
        """A row is due."""
        ...

    def on_nothing_due(self) -> None:
        """A row fell away; maybe it was the last."""
        ...


class Turns:
    """Says what is due when, which only answers can tell.

    Attributes:
        waiting: positions of the rows that will be due once their device has thought.
    """

    def __init__(
        self,
        law: Closed,
        config: FleetConfig,
        timers: Timers,
        clock: Callable[[], float],
        rows: Rows,
    ) -> None:
        """Make a loop that has not begun."""
        self.waiting: set[int] = set()
        self._law = law
        self._seed = config.seed
        self._end_s = config.duration_s
        self._timers = timers
        self._clock = clock
        self._rows = rows
        self._start_s = 0.0

    def start(self, start_s: float, first_due_s: Iterable[float]) -> None:
        """Begin: row i is due at ``first_due_s[i]`` after ``start_s``."""
        self._start_s = start_s
        for position, due_s in enumerate(first_due_s):
            self.waiting.add(position)
            self._timers.at(start_s + due_s, self._take, position)

    def think(self, device: FleetDevice, done_s: float) -> None:
        """Let a device think after an inference that ended ``done_s`` after the start."""
        device.turns += 1
        due_s = done_s + self._law.thought_s(self._seed, device.number, device.turns)
        if device.away:
            due_s = max(due_s, device.toggle_s - self._start_s)
        if due_s >= self._end_s:
            return
        position = self._rows.add_row(device, due_s)
        self.waiting.add(position)
        when_s = self._start_s + due_s
        if when_s > self._clock():
            self._timers.at(when_s, self._take, position)
        else:
            asyncio.get_running_loop().call_soon(self._take, position)

    def stop(self) -> list[int]:
        """Let nothing more fall due; return the rows that waited."""
        left, self.waiting = list(self.waiting), set()
        self._end_s = -math.inf
        return left

    def _take(self, position: int) -> None:
        """Begin what a device owes, once it is there."""
        if position not in self.waiting:
            return  # stopped
        device = self._rows.owner(position)
        due_s = device.toggle_s - self._start_s
        if device.away and due_s < self._end_s:
            self._rows.move_row(position, due_s)
            self._timers.at(device.toggle_s, self._take, position)
            return
        self.waiting.discard(position)
        if device.away:  # it comes back after the end
            self._rows.move_row(position, math.inf)
            self._rows.on_nothing_due()
        else:
            self._rows.begin(position)
