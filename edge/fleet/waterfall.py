"""Where an inference's time went, part by part, and how each kind of device fared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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


def waterfall(table: Table) -> dict[str, float] | None:
    """Mean seconds of each part over the answered inferences, and the rest; None without any.

    The parts add up to the mean latency from the schedule.
    """
    answered = _answered(table)
    if not len(answered):
        return None
    means = {part: float(answered[part].mean(dtype=np.float64)) for part in PARTS}
    total_s = float((answered["done_s"] - answered["scheduled_s"]).mean())
    return means | {REST: total_s - sum(means.values())}


def slowest(table: Table, share: float = SLOWEST) -> Table:
    """Of the answered inferences the slowest ``share``, at least one where there is any."""
    answered = _answered(table)
    count = int(np.ceil(len(answered) * share))
    latency_s = answered["done_s"] - answered["scheduled_s"]
    return answered[np.argsort(latency_s, kind="stable")[len(answered) - count :]]


def by_profile(table: Table, names: Sequence[str], warm_up_s: float = 0.0) -> list[dict[str, Any]]:
    """One entry per profile that had something to do, by its place in ``names``.

    Keys: ``profile``, ``devices`` (that owed an inference), ``inferences``, ``ok``; and without
    what was due before ``warm_up_s``: ``latency_s`` (percentiles from the schedule) and
    ``waterfall_s``.
    """
    entries = []
    for number in np.unique(table["profile"]).tolist():
        some = table[table["profile"] == number]
        counted = some[warm(some, warm_up_s)]
        kept = counted[waited(counted)]
        entries.append(
            {
                "profile": names[number] if number < len(names) else f"profile {number}",
                "devices": len(np.unique(some["device"])),
                "inferences": len(some),
                "ok": int((some["status"] == result.OK).sum()),
                "latency_s": percentiles(kept["done_s"] - kept["scheduled_s"]),
                "waterfall_s": waterfall(counted),
            }
        )
    return entries


def _answered(table: Table) -> Table:
    return table[np.isin(table["status"], (result.OK, result.WRONG))]
