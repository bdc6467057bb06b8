"""Many small waits on one timer of the event loop: a heap of what is to happen, and when."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from typing import Any

# uvloop's timers tick in milliseconds: asking for less would spin until the tick has come.
TICK_S = 0.001


class Timers:
    """Calls functions when their time has come, in that order; equal times in the order they came.

    A call that raises ends the run: ``on_crash`` hears of it.
    """

    def __init__(self, clock: Callable[[], float], on_crash: Callable[[Exception], None]) -> None:
        """Begin empty; the loop is looked up when the first wait begins."""
        self._clock = clock
        self._on_crash = on_crash
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._handle: asyncio.TimerHandle | None = None
        self._armed_s = math.inf

    def __len__(self) -> int:
        """Count what waits."""
        return len(self._heap)

    def at(self, when_s: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function(*arguments)`` once the clock shows ``when_s``, never at once."""
        self._count += 1
        heapq.heappush(self._heap, (when_s, self._count, function, arguments))
        if when_s < self._armed_s:
            self._arm(when_s)

    def close(self) -> None:
        """Forget everything."""
        self._heap.clear()
        if self._handle is not None:
            self._handle.cancel()

    def run_due(self) -> None:
        """Call what is due by now."""
        self._armed_s = -math.inf  # what is added meanwhile needs no timer of its own
        heap, now_s = self._heap, self._clock()
        try:
            while heap and heap[0][0] <= now_s:
                _, _, function, arguments = heapq.heappop(heap)
                function(*arguments)
        except Exception as error:
            self._on_crash(error)
            return
        self._armed_s = math.inf
        if heap:
            self._arm(heap[0][0])

    def _arm(self, when_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        wait_s = max(TICK_S, when_s - self._clock())
        self._armed_s = when_s
        self._handle = asyncio.get_running_loop().call_later(wait_s, self.run_due)
