"""Where an inference's time went, part by part, and how each kind of device fared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.fleet import result
from edge.fleet.quantiles import percentiles
from edge.fleet.result import Table
from edge.fleet.series import waited, warm

PARTS = (
    "stem_s",
    "mix_s",
    "encode_s",
    "uplink_s",
    "queue_s",
    "compute_s",
    "downlink_s",
    "demix_s",
    "head_s",
)
"""Columns of the table, in the order in which an inference passes them."""
REST = "rest_s"
"""What no part explains: network, system calls, waiting for a processor, generator lag, retries."""

SLOWEST = 0.01


Bools = npt.NDArray[np.bool_]


def waterfall(table: Table, some: Bools) -> dict[str, float] | None:
    """Mean seconds of each part over the answered of ``some`` inferences, and the rest.

    The parts add up to the mean latency from the schedule. None where none was answered.
    """
    answered = some & _answered(table)
    count = int(answered.sum())
    if not count:
        return None
    means = {part: float(table[part][answered].mean(dtype=np.float64)) for part in PARTS}
    total_s = float(result.latency_s(table)[answered].mean())
    return means | {REST: total_s - sum(means.values())}


def slowest(table: Table, some: Bools, share: float = SLOWEST) -> Bools:
    """Of the answered of ``some`` the slowest ``share``, at least one where there is any."""
    places = np.flatnonzero(some & _answered(table))
    count = math.ceil(len(places) * share)
    latency_s = result.latency_s(table)[places]
    chosen = np.zeros(len(table), bool)
    if count:
        chosen[places[np.argpartition(latency_s, len(places) - count)[len(places) - count :]]] = (
            True
        )
    return chosen


def by_profile(table: Table, names: Sequence[str], warm_up_s: float = 0.0) -> list[dict[str, Any]]:
    """One entry per profile that had something to do, by its place in ``names``.

    Keys: ``profile``, ``devices`` (that owed an inference), ``inferences``, ``ok``; and without
    what was due before ``warm_up_s``: ``latency_s`` (percentiles from the schedule) and
    ``waterfall_s``.
    """
    counted = warm(table, warm_up_s)
    kept = counted & waited(table)
    latency_s = result.latency_s(table)
    entries = []
    for number in np.unique(table["profile"]).tolist():
        mine = table["profile"] == number
        entries.append(
            {
                "profile": names[number] if number < len(names) else f"profile {number}",
                "devices": len(np.unique(table["device"][mine])),
                "inferences": int(mine.sum()),
                "ok": int((mine & (table["status"] == result.OK)).sum()),
                "latency_s": percentiles(latency_s[mine & kept]),
                "waterfall_s": waterfall(table, mine & counted),
            }
        )
    return entries


def _answered(table: Table) -> Bools:
    answered: Bools = np.isin(table["status"], (result.OK, result.WRONG))
    return answered
