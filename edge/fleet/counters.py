"""What one shard counts while it runs, and what it has to say in between and at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge.fleet import result
from edge.fleet.offline import OfflineTraffic
from edge.fleet.settled import Settled


@dataclass(slots=True)
class Counters:
    """What does not belong to one inference, or is needed while the run goes on.

    Attributes:
        begun: inferences begun.
        ok: inferences answered right.
        failed: inferences that ended otherwise, other than by the device's own wish.
        requests_ok: messages answered with status 200 and what was asked.
        requests_in_window: of those, the ones before the last inference fell due.
        rows_in_window: their rows.
        requests_sent: messages sent, retries included.
        retries: messages sent again.
        reconnects: streams opened again.
        moved: messages sent again because the cloud had moved the stream unread, which is no retry.
        duplicates: second answers to a message that was answered.
        late: answers after the device had given up.
        misrouted: answers to a message that another device of this process sent.
        unmatched: answers to a message that nobody in this process sent.
        unreadable: messages that are no response at all.
        cancelled: inferences that the device gave up of its own accord, or left with.
        came: devices that came back after they had gone.
        left: devices that went.
        dropped: streams that a storm dropped.
    """

    begun: int = 0
    ok: int = 0
    failed: int = 0
    requests_ok: int = 0
    requests_in_window: int = 0
    rows_in_window: int = 0
    requests_sent: int = 0
    retries: int = 0
    reconnects: int = 0
    moved: int = 0
    duplicates: int = 0
    late: int = 0
    misrouted: int = 0
    unmatched: int = 0
    unreadable: int = 0
    cancelled: int = 0
    came: int = 0
    left: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """What one shard did until now.

    Attributes:
        shard: which.
        elapsed_s: since the common start.
        connected: devices with an open stream.
        in_flight: inferences under way.
        counters: totals so far.
        latencies_s: of the inferences that were answered since the last progress.
        cpu_s: processor time since the common start.
        settled: the inferences that have ended since, in the order they were due; none of a closed
            loop's.
    """

    shard: int
    elapsed_s: float
    connected: int
    in_flight: int
    counters: Counters
    latencies_s: list[float]
    cpu_s: float
    settled: Settled


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What one shard has to say at the end.

    Attributes:
        table: a row per inference that fell due (:mod:`edge.fleet.result`).
        answered: (seconds, 2) messages and rows answered in each second after the start.
        counters: totals.
        cpu_s: processor time from the common start to the end.
        busy_ratio: processor time per time, until the last inference had begun.
        window_s: for how long inferences fell due; shorter than asked for where interrupted.
        elapsed_s: until the last inference ended.
        offline: what was asked of operator B; None but in the mode split.
    """

    table: result.Table
    answered: npt.NDArray[np.int64]
    counters: Counters
    cpu_s: float
    busy_ratio: float
    window_s: float
    elapsed_s: float
    offline: OfflineTraffic | None = None
