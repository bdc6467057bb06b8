"""What happened to each inference: one row of one array, written as the run goes.

A shard allocates a row for every inference it owes before the run starts. A row that is never
touched keeps the status UNSENT, so an inference that was never sent is counted and not forgotten.
A million inferences are 100 MB of one array, not a million objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.fleet.pacing import Schedule

# Codes below 100 are the device's own; from 100 on they are the HTTP status of the answer.
UNSENT = 0  # due, but no byte left the device before the deadline
TIMEOUT = 1  # sent; no answer before the deadline
CONNECTION = 2  # the connection was lost, and the retry budget was spent
ANSWER = 3  # answered, but not what was asked: wrong shape, not finite, unreadable
WRONG = 4  # answered and well formed, but not the values computed locally
STOPPED = 5  # on its way when the run was interrupted
MASKS = 6  # in the mode split: no masks from operator B before the deadline
CANCELLED = 7  # given up by the device of its own accord, or left behind when it went
OK = 200

STATUS_NAMES = {TIMEOUT: "timeout", CONNECTION: "connection", ANSWER: "answer", MASKS: "masks"}

COLUMNS = np.dtype(
    [
        ("index", np.uint32),
        ("device", np.uint32),
        ("scheduled_s", np.float64),
        ("sent_s", np.float64),
        ("done_s", np.float64),
        ("lag_s", np.float32),
        ("queue_s", np.float32),
        ("compute_s", np.float32),
        ("stem_s", np.float32),
        ("mix_s", np.float32),
        ("encode_s", np.float32),
        ("uplink_s", np.float32),
        ("downlink_s", np.float32),
        ("demix_s", np.float32),
        ("head_s", np.float32),
        ("batch_rows", np.float32),
        ("bytes_up", np.uint32),
        ("bytes_down", np.uint32),
        ("profile", np.uint8),
        ("status", np.uint16),
        ("retries", np.uint16),
        ("rounds", np.uint16),
        ("rows", np.uint16),
        ("correct", np.uint16),
        ("correct_local", np.uint16),
    ]
)

Table = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Result:
    """One inference as the device lived it; times in seconds after the common start.

    Attributes:
        index: the inference's number in the whole fleet.
        device: the device that owed it.
        scheduled_s: when the pacer wanted its first message sent.
        sent_s: when its first message was handed to the socket; NaN if never.
        done_s: when it ended, well or badly; NaN if it never did.
        lag_s: how late the generator was with the first message; NaN if it never got to it.
        queue_s: waiting in the cloud, summed over the answered rounds.
        compute_s: computing in the cloud, summed over the answered rounds.
        stem_s: the device's stem, before the first round.
        mix_s: mixing, summed over the rounds.
        encode_s: making messages, summed over the rounds.
        uplink_s: messages on their way up a simulated link, summed over the rounds.
        downlink_s: answers on their way down a simulated link, summed over the rounds.
        demix_s: de-mixing and bridges, summed over the answered rounds.
        head_s: the device's head, after the last round.
        batch_rows: rows of the cloud's batches, summed over the answered rounds.
        bytes_up: bytes of all messages sent, retries included.
        bytes_down: bytes of all messages received.
        profile: the device's profile, by its place in the run's list of profiles.
        status: OK, an HTTP status, or one of this module's codes.
        retries: messages sent again.
        rounds: rounds answered.
        rows: rows per round (the group size).
        correct: inputs whose class, by way of the cloud, was the labelled one.
        correct_local: inputs whose class, computed locally, was the labelled one.
    """

    index: int
    device: int
    scheduled_s: float
    sent_s: float
    done_s: float
    lag_s: float
    queue_s: float
    compute_s: float
    stem_s: float
    mix_s: float
    encode_s: float
    uplink_s: float
    downlink_s: float
    demix_s: float
    head_s: float
    batch_rows: float
    bytes_up: int
    bytes_down: int
    profile: int
    status: int
    retries: int
    rounds: int
    rows: int
    correct: int
    correct_local: int

    @property
    def latency_s(self) -> float:
        """Counted from the schedule, so a slow cloud cannot hide its queue."""
        return self.done_s - self.scheduled_s


def latency_s(table: Table) -> NDArray[np.float64]:
    """(n,) seconds from the schedule to the end of each inference; NaN where it never ended."""
    latency: NDArray[np.float64] = table["done_s"] - table["scheduled_s"]
    return latency


def kind(status: int) -> str:
    """Name a status, as figures and plots do; an HTTP status by its number."""
    named = STATUS_NAMES | {OK: "ok", WRONG: "wrong", UNSENT: "unsent", STOPPED: "stopped"}
    named[CANCELLED] = "cancelled"
    return named.get(status, str(status))


def allocate(schedule: Schedule, rows: int) -> Table:
    """Make the table of one shard: a row per inference it owes, all of them UNSENT."""
    table = np.zeros(len(schedule), COLUMNS)
    table["index"] = schedule.index
    table["device"] = schedule.device
    table["scheduled_s"] = schedule.due_s
    table["rows"] = rows
    _leave_open(table)
    return table


def grow(table: Table) -> Table:
    """Copy a table into one of twice its length, whose new rows are UNSENT and owed by nobody yet.

    A closed loop finds out while it runs what falls due.
    """
    more = np.zeros(max(1, len(table)), COLUMNS)
    more["rows"] = table["rows"][:1]
    _leave_open(more)
    return np.concatenate([table, more])


def _leave_open(table: Table) -> None:
    for column in ("sent_s", "done_s", "lag_s"):
        table[column] = np.nan


def merge(tables: Sequence[Table]) -> Table:
    """Join the shards' tables exactly, in the order of the whole fleet's schedule."""
    joined = np.concatenate(tables) if tables else np.zeros(0, COLUMNS)
    return joined[np.argsort(joined["index"], kind="stable")]


def result(table: Table, position: int) -> Result:
    """Read one row of a table as a value."""
    row: Any = table[position]
    return Result(**dict(zip(COLUMNS.names or (), row.item(), strict=True)))
