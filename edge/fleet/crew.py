"""The shards of a run as their parent sees them, wherever they are at work.

    processes of this machine     :func:`edge.fleet.processes.processes`
    actors of a Ray cluster       ``cluster.ray_fleet``

A crew carries words between the parent and its shards, and knows nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from edge.fleet.config import FleetConfig
from edge.fleet.prepare import Shelf
from edge.fleet.process import Failure, Ready, Target
from edge.fleet.shard import Progress, ShardResult


@dataclass(frozen=True, slots=True)
class Lost:
    """A shard is gone without a result.

    Attributes:
        shard: which.
        reason: why, as far as is known: ``exit code -9``.
    """

    shard: int
    reason: str


Word = Progress | Ready | ShardResult | Failure | Lost


class Crew(Protocol):
    """Shards at work.

    Attributes:
        size: how many were started.
        start_error_s: by how much the common start may differ between them, at most; known when
            they were told.
    """

    size: int
    start_error_s: float

    def hear(self, timeout_s: float) -> list[Word]:
        """What the shards said, in their order; waits for the first word, but not for longer."""
        ...

    def start(self, headroom_s: float) -> float:
        """Tell every shard the common start, and return it by this machine's monotonic clock.

        headroom_s: how far ahead it is at least, so that every shard has heard it before.
        """
        ...

    def stop(self) -> None:
        """Tell every shard to end now, and to say what it has done."""
        ...


# On leaving, whatever the reason, no shard is at work any more.
Launch = Callable[[FleetConfig, Target, Shelf | None], AbstractContextManager[Crew]]
