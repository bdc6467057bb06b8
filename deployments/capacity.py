"""What one replica can sustain so that its answers keep a wait target: a queueing model of batches.

Plain arithmetic on what replicas report (:mod:`deployments.load`); knows no Ray and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_QUANTILE, _TAIL = 2.33, 4.6  # the 99th percentile: normal in deviations, exponential in means


class Report(NamedTuple):
    """What one replica says of itself; the names are those of the metrics.

    Attributes:
        time_s: when, on the replica's clock; only compared with its own last.
        predicted_wait_s: until all that waits or runs is computed, in seconds.
        offered_rows_per_s: rows that were asked of it, refused ones included.
        offered_requests_per_s: requests likewise.
        round_s: fixed cost of a round, that is one batch of each block in use, in seconds.
        row_s: cost of a row on top, in seconds.
        round_rows: rows of a round at most; 0 where the costs are not known yet.
    """

    time_s: float
    predicted_wait_s: float = 0.0
    offered_rows_per_s: float = 0.0
    offered_requests_per_s: float = 0.0
    round_s: float = 0.0
    row_s: float = 0.0
    round_rows: float = 0.0


def sustainable(report: Report, wait_s: float) -> float:
    """Rows per second at which a replica answers within ``wait_s``, but for one request in 100.

    What arrives waits for the round under way and goes with the next. A round holds what came in
    the one before: ``rows = rate * round_s / (1 - rate * row_s)`` in the mean, and as each passes
    on its length to the next, a share of ``rate * row_s`` of it, their sizes scatter by more than
    the arrivals do. Where rounds are full, a queue builds up: in heavy traffic its wait is
    exponential, with a mean of half a request's share of a full round over what is left of use.

    Returns:
        Rows per second; half of what rounds of one request can do where even these take too long,
        since more replicas would be of no use, and 0 where costs are not known.
    """
    _, _, rows_per_s, requests_per_s, round_s, row_s, most = report
    full_s = round_s + row_s * most
    if most <= 0 or full_s <= 0:
        return 0.0
    request = min(max(1.0, rows_per_s / requests_per_s if requests_per_s > 0 else 1.0), most)
    fastest = most / full_s

    def wait(rate: float) -> float:
        repeat = rate * row_s
        rows = rate * round_s / (1 - repeat)
        rows += _QUANTILE * math.sqrt(request * rows / (1 - repeat * repeat))
        queue_s = _TAIL * full_s * request / (2 * most * (1 - rate / fastest))
        return 2 * (round_s + row_s * min(max(rows, request), most)) + queue_s

    least = request / (round_s + row_s * request) / 2
    low, high = 0.0, fastest * 0.999
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if wait(middle) <= wait_s else (low, middle)
    return max(low, least)


def typical(reports: Sequence[Report]) -> Report:
    """The mean of the replicas that know their costs; one of zeros where none does."""
    known = [report for report in reports if report.round_rows > 0]
    if not known:
        return Report(0.0)
    return Report(*(math.fsum(figures) / len(known) for figures in zip(*known, strict=True)))
