"""The emulated engine: it takes the time of a real one and computes nothing.

So that many replicas, large clusters and plans fit on a laptop. Its device is two numbers, the
moments at which its copier and its processor are free again: waiting sleeps until then, and nothing
runs in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from datamix.errors import ConfigError
from deployments.engine import Array, EchoEngine, Pending, Rows, Shape


class Cost(NamedTuple):
    """What one batch of a block takes, in seconds: ``a_s + b_s * rows``, after its copy.

    Attributes:
        a_s: computation per batch.
        b_s: computation per row.
        copy_a_s: copy to the device per batch.
        copy_b_s: copy to the device per row.
    """

    a_s: float
    b_s: float
    copy_a_s: float = 0.0
    copy_b_s: float = 0.0

    def check(self) -> None:
        """Check that a batch can take so long.

        Raises:
            ConfigError: a duration is negative or not finite.
        """
        if not all(math.isfinite(seconds) and seconds >= 0 for seconds in self):
            raise ConfigError(
                f"emulated engine has a_s={self.a_s}, b_s={self.b_s}, copy_a_s={self.copy_a_s}, "
                f"copy_b_s={self.copy_b_s}, expected seconds >= 0"
            )


class _Sleeping:
    """A batch whose outputs are there, and late."""

    __slots__ = ("_engine", "_outputs", "copied_bytes", "copy_s", "ends")

    def __init__(
        self, engine: EmulatedEngine, computed: Pending, copy_s: float, ends: float
    ) -> None:
        self._engine = engine
        self._outputs = computed.wait()
        self.copied_bytes = computed.copied_bytes
        self.copy_s = copy_s
        self.ends = ends

    def done(self) -> bool:
        return self._engine.clock() >= self.ends

    def wait(self) -> Sequence[Array]:
        while (left_s := self.ends - self._engine.clock()) > 0:
            self._engine.sleep(left_s)
        return self._outputs


class EmulatedEngine(EchoEngine):
    """Echoes rows, late by its cost: copy, then computation, one batch after the other.

    With depth 2 the copy of one batch goes on while another is computed.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        costs: Sequence[Cost],
        *,
        name: str,
        depth: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Echo blocks of the given row shapes, each at its cost.

        Raises:
            ConfigError: another number of costs than of blocks, or an impossible duration.
        """
        super().__init__(shapes)
        if len(costs) != len(shapes):
            raise ConfigError(
                f"emulated engine has costs of {len(costs)} blocks, expected {len(shapes)}"
            )
        for cost in costs:
            cost.check()
        self.name = f"emulated:{name}"
        self.costs = list(costs)
        self.depth = depth
        self.clock, self.sleep = clock, sleep
        self._copier_free = self._processor_free = -math.inf

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        """Book the device's time, behind what it does already."""
        rows = sum(len(request.features) for request in requests)
        a_s, b_s, copy_a_s, copy_b_s = self.costs[block]
        copy_s = copy_a_s + copy_b_s * rows
        copied = max(self.clock(), self._copier_free) + copy_s
        ends = max(copied, self._processor_free) + a_s + b_s * rows
        self._copier_free, self._processor_free = copied, ends
        return _Sleeping(self, super().start(block, requests), copy_s, ends)


def emulated(shapes: Sequence[Shape], a_s: float, b_s: float) -> EmulatedEngine:
    """The engine of ``emulated:a_s,b_s``: all blocks cost the same, and copies take no time."""
    return EmulatedEngine(shapes, [Cost(a_s, b_s)] * len(shapes), name=f"{a_s:g},{b_s:g}")
