"""Requests for the batcher and its queue, and a clock for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from datamix.errors import DataMixError
from deployments.engine import Rows
from deployments.waiting import Computed, Job


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_job(
    rows: int = 1,
    *,
    block: int = 0,
    value: float = 0.0,
    deadline: float | None = None,
    priority: int = 0,
    arrived: float = 0.0,
    done: Callable[[Computed | DataMixError], None] = lambda outcome: None,
) -> Job:
    rows_of_it = Rows(np.full((rows, 1), value, np.float32), None)
    return Job(block, rows_of_it, done, deadline=deadline, priority=priority, arrived=arrived)


def counts(jobs: Sequence[Job]) -> list[int]:
    return [job.count for job in jobs]


def held(job: Job) -> int:
    """Bytes of a job's rows."""
    return sum(len(part.tobytes()) for part in job.rows if part is not None)
