"""What one shard writes down: a row for each inference, and which answers came.

Every method runs for thousands of messages a second, so columns are written through views.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix import wire
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.counters import Counters
from edge.fleet.device import FleetDevice
from edge.fleet.pacing import Schedule
from edge.fleet.settled import Settled, settled


class Book:
    """The table of a shard, its counters, and the names of its messages.

    Attributes:
        table: a row per inference, some of them owed by nobody yet (:mod:`edge.fleet.result`).
        column: its columns, as long as the table does not grow.
        rows: how many of its rows are owed.
        counters: totals.
        start_s: the common start; infinite until it is known.
        window_s: for how long inferences fall due; shorter than asked for where interrupted.
        latencies_s: of the inferences answered right since somebody took them.
    """

    __slots__ = (
        "_answered",
        "_devices",
        "_nonce",
        "_schedule",
        "_told",
        "column",
        "counters",
        "latencies_s",
        "rows",
        "start_s",
        "table",
        "window_s",
    )

    def __init__(self, schedule: Schedule, rows: int, config: FleetConfig) -> None:
        """Allocate everything a run writes to.

        Args:
            schedule: what is owed.
            rows: of each inference.
            config: the run.
        """
        self.table = result.allocate(schedule, rows)
        self.column = _views(self.table)
        self.rows = len(self.table)
        self.counters = Counters()
        self.start_s = float("inf")
        self.window_s = config.duration_s
        self.latencies_s: list[float] = []
        self._schedule = schedule
        self._devices = config.devices
        self._answered = [[0, 0] for _ in range(int(config.duration_s + config.timeout_s) + 2)]
        self._nonce = secrets.token_hex(4)
        self._told = 0

    # --- rows ---------------------------------------------------------------------------------

    def add(self, device: FleetDevice, due_s: float) -> int:
        """Make a row for what a device owes next in a closed loop; return its position."""
        if self.rows == len(self.table):
            self.table = result.grow(self.table)
            self.column = _views(self.table)
        position, self.rows = self.rows, self.rows + 1
        column = self.column
        column["index"][position] = device.turns * self._devices + device.number
        column["device"][position] = device.number
        column["scheduled_s"][position] = due_s
        column["profile"][position] = device.profile
        return position

    def end(self, position: int, status: int, at_s: float) -> float:
        """Write down how an inference ended at ``at_s``; return that, counted from the start."""
        done_s = at_s - self.start_s
        self.column["done_s"][position] = done_s
        self.column["status"][position] = status
        if status == result.OK:
            self.counters.ok += 1
            self.latencies_s.append(done_s - float(self.column["scheduled_s"][position]))
        elif status == result.CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        return done_s

    def due(self) -> result.Table:
        """The rows of what fell due."""
        if self._schedule.closed is None:
            due_s = self._schedule.due_s
            return self.table[: np.searchsorted(due_s, self.window_s, side="left")]
        table = self.table[: self.rows]
        return table[table["scheduled_s"] < self.window_s]

    def take_latencies(self) -> list[float]:
        """Those since the last call."""
        taken, self.latencies_s = self.latencies_s, []
        return taken

    def settle(self, end: int) -> Settled:
        """Tell of the rows before ``end``, all of which have ended, since the last call."""
        if self._schedule.closed is not None:  # nobody knows what is due
            return settled(self.table[:0], 0.0)
        due_s = self._schedule.due_s
        start, self._told = self._told, end
        until_s = float(due_s[end]) if end < len(due_s) else self.window_s
        return settled(self.table[start:end], until_s)

    # --- messages -----------------------------------------------------------------------------

    def request_id(self, position: int, block: int) -> str:
        """The name of a message: of one width, so that cloud and fleet meet few layouts."""
        return f"{self._nonce}-{position:08x}-{block:x}"

    def count_answer(self, position: int, response: wire.Response, now_s: float) -> None:
        """Write down what the cloud says of a round that it answered."""
        column, counters, rows = self.column, self.counters, len(response.features)
        column["rounds"][position] += 1
        column["queue_s"][position] += response.queue_s
        column["compute_s"][position] += response.compute_s
        column["batch_rows"][position] += response.batch_rows
        elapsed_s = now_s - self.start_s
        answered = self._answered[min(int(elapsed_s), len(self._answered) - 1)]
        answered[0] += 1
        answered[1] += rows
        counters.requests_ok += 1
        if elapsed_s < self.window_s:
            counters.requests_in_window += 1
            counters.rows_in_window += rows

    def count_stray(self, request_id: str) -> None:
        """An answer that nobody waits for: why?"""
        parts = request_id.split("-")
        if len(parts) != 3 or parts[0] != self._nonce:
            self.counters.unmatched += 1
            return
        try:
            status = self.column["status"][int(parts[1], 16)]
        except (ValueError, IndexError):
            self.counters.unmatched += 1
            return
        if status in (result.TIMEOUT, result.CANCELLED, result.STOPPED):
            self.counters.late += 1
        else:
            self.counters.duplicates += 1

    def answered(self) -> npt.NDArray[np.int64]:
        """(seconds, 2) messages and rows answered in each second after the start."""
        return np.array(self._answered, np.int64)


def _views(table: result.Table) -> dict[str, Any]:
    """Each column; writing through a view of one costs half of writing through the row."""
    return {name: table[name] for name in result.COLUMNS.names or ()}
