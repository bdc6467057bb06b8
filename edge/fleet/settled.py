"""What is known of a run while it goes on: what has ended, in the order it was due.

An inference that is answered soon says so soon, and one that is late says nothing for long. Whoever
decides from those that have answered sees only the quick ones; so a shard tells of an inference
once all that were due before it have ended, and several shards are heard in step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge.fleet import result

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Settled:
    """Inferences that have ended.

    Attributes:
        until_s: all that fell due before have been told by now; seconds after the common start.
        due_s: (n,) when they fell due.
        latency_s: (n,) from then to the right answer; infinite where there was none.
    """

    until_s: float
    due_s: Floats
    latency_s: Floats


Watch = Callable[[Settled], bool]
"""Sees what has ended, piece by piece; says whether that is enough and the run may end."""


def counted(rows: result.Table) -> result.Table:
    """Leave out what no cloud could answer: given up by its device, or stopped with the run."""
    return rows[~np.isin(rows["status"], (result.CANCELLED, result.STOPPED))]


def settled(rows: result.Table, until_s: float) -> Settled:
    """Tell of the rows of a shard's table that have ended."""
    rows = counted(rows)
    due_s = rows["scheduled_s"].copy()
    answered = rows["status"] == result.OK
    return Settled(until_s, due_s, np.where(answered, rows["done_s"] - due_s, np.inf))


class Merge:
    """Brings the shards' words together: nothing is told before every shard has come so far."""

    def __init__(self, shards: int) -> None:
        """Wait for the first word of each of ``shards``."""
        self._until_s = [0.0] * shards
        self._waiting: list[Settled] = []
        self._told_s = 0.0

    def add(self, shard: int, word: Settled) -> Settled | None:
        """Take one shard's next word; what all shards together now know anew, if anything."""
        self._until_s[shard] = word.until_s
        self._waiting.append(word)
        until_s = min(self._until_s)
        if until_s <= self._told_s:
            return None
        due_s = np.concatenate([word.due_s for word in self._waiting])
        latency_s = np.concatenate([word.latency_s for word in self._waiting])
        order = np.argsort(due_s, kind="stable")
        due_s, latency_s = due_s[order], latency_s[order]
        cut = int(np.searchsorted(due_s, until_s, side="left"))
        self._waiting = [Settled(until_s, due_s[cut:], latency_s[cut:])]
        self._told_s = until_s
        return Settled(until_s, due_s[:cut], latency_s[:cut])
