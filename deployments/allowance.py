"""So many a second: what strangers can ask for without end gets one of these."""

from __future__ import annotations

from collections.abc import Callable


class Allowance:
    """So many a second, and no more than a second's worth at once."""

    def __init__(self, per_s: float, clock: Callable[[], float]) -> None:
        """Start with a second's worth; ``per_s`` is at least 1."""
        self._per_s = per_s
        self._clock = clock
        self._left = per_s
        self._at_s = clock()

    def take(self) -> bool:
        """Whether there is one left; it is gone then."""
        now_s = self._clock()
        self._left = min(self._per_s, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
