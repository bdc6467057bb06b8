"""What is asked of a replica and what it can do, as its autoscaling policy wants to know it.

Rates are those of the last seconds and count what was offered, refused requests too: what a
replica answers says nothing about how much too much there is. With several blocks, or models, its
engine takes turns; a **round** is one batch of each block in use, and the policy sees one server of
rounds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deployments.model import ServedModel

_LOOK_BACK_S = 2.0  # for rates: long enough to count, short enough to see a burst at once


class _Mark(NamedTuple):
    """Running totals at one moment: rows by model, version and block; requests of all."""

    time_s: float
    rows: Counter[tuple[str, str, int]]
    requests: int


class Load:
    """Rates of one replica; a report costs microseconds, a request nothing more than two sums."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin to look back from now."""
        self._clock = clock
        self._marks = deque([_Mark(clock(), Counter(), 0)])

    def report(self, models: Iterable[ServedModel]) -> dict[str, float]:
        """The figures by name, all of them floats; see :class:`deployments.capacity.Report`."""
        models = list(models)
        now = self._clock()
        rows = Counter(
            {
                (model.name, model.version, block): rows
                for model in models
                for block, rows in enumerate(model.offered_rows)
            }
        )
        requests = sum(model.offered_requests for model in models)
        marks = self._marks
        marks.append(_Mark(now, rows, requests))
        while len(marks) > 2 and now - marks[1].time_s >= _LOOK_BACK_S:
            marks.popleft()
        before = marks[0]
        passed_s = max(now - before.time_s, 1e-9)
        since = rows - before.rows  # without blocks that nobody asked for
        offered = sum(since.values())
        round_s = row_s = 0.0
        round_rows = float("inf")
        for model in models:
            for block in range(len(model.offered_rows)):
                share = since[model.name, model.version, block] / max(1, offered)
                cost = model.batcher.cost(block)
                if cost is None or not share:
                    continue
                round_s += cost.a_s
                row_s += share * cost.b_s
                round_rows = min(round_rows, cost.rows / share)
        return {
            "predicted_wait_s": max((m.batcher.predicted_wait_s() for m in models), default=0.0),
            "offered_rows_per_s": offered / passed_s,
            "offered_requests_per_s": max(0, requests - before.requests) / passed_s,
            "round_s": round_s,
            "row_s": row_s,
            "round_rows": round_rows if round_rows < float("inf") else 0.0,
        }
