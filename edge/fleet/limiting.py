"""What keeps a cloud from carrying more: read off the inferences that were late at one load.

Each answered inference carries its parts: the generator's lag, the device, the simulated link, the
cloud's queue and computation by the cloud's own clock; what is left of its latency was spent on the
network, in proxies and in event loops. The largest part among the late ones is what to work on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.fleet import result
from edge.fleet.objective import Objective
from edge.fleet.report import Run, Summary
from edge.fleet.settled import counted

BUSY = 0.9  # share of time from which on an engine is taken to be full
_LAG = 0.1  # share of the objective's latency up to which a generator may lag
_REFUSED = (429, 503)
_SECTIONS = {
    "device": ("stem_s", "mix_s", "encode_s", "demix_s", "head_s"),
    "link": ("uplink_s", "downlink_s"),
    "queue": ("queue_s",),
    "compute": ("compute_s",),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What is in the way.

    Attributes:
        name: ``generator``, ``compute``, ``queue``, ``shedding``, ``connections``, ``silence``,
            ``masks``, ``network``, ``link``, ``device`` or ``none``.
        sentence: what was seen, and what would help.
        parts_s: mean seconds of each part of the late, answered inferences; empty without any.
    """

    name: str
    sentence: str
    parts_s: dict[str, float]


NONE = Limit("none", "no load was tried that did not meet the objective", {})


def parts(table: result.Table) -> dict[str, float]:
    """Mean seconds of each part of the latency over the given rows, all of them answered."""
    if not len(table):
        return {}
    found = {"generator": float(np.nan_to_num(table["lag_s"]).mean(dtype=np.float64))}
    for name, columns in _SECTIONS.items():
        found[name] = sum(float(table[column].mean(dtype=np.float64)) for column in columns)
    latency_s = float((table["done_s"] - table["scheduled_s"]).mean())
    found["network"] = max(0.0, latency_s - sum(found.values()))
    return found


def limit(run: Run, summary: Summary, objective: Objective, warmup_s: float) -> Limit:
    """Name what made inferences late in a run."""
    table = counted(run.table[run.table["scheduled_s"] >= warmup_s])
    answered = table["status"] == result.OK
    latency_s = np.where(answered, table["done_s"] - table["scheduled_s"], np.inf)
    late = latency_s > objective.latency_s
    if not late.any():
        return NONE
    seen = parts(table[late & answered])
    lag_s = np.nan_to_num(table["lag_s"].astype(np.float64), nan=np.inf)
    in_cloud = np.where(answered, latency_s - np.where(answered, lag_s, 0.0), latency_s)
    # An inference that the generator never got to send is not the cloud's either.
    own = late & ((in_cloud <= objective.latency_s) | (table["status"] == result.UNSENT))
    # A millisecond of lag tips a load that is at the boundary anyway: that is no generator's fault.
    lags = float(np.quantile(lag_s, 0.99, method="lower")) > _LAG * objective.latency_s
    if not summary.valid or (lags and (late & ~own).mean() <= objective.allowed):
        return Limit("generator", _generator(summary), seen)
    count = int(late.sum())
    refused = int(np.isin(table["status"][late], _REFUSED).sum())
    if refused * 2 >= count:
        text = (
            f"the cloud sheds: {refused} of {count} late inferences were refused (429 or 503): its "
            f"queue is full before the objective is missed; add replicas"
        )
        return Limit("shedding", text, seen)
    lost = int((table["status"][late] == result.CONNECTION).sum())
    if lost * 2 >= count:
        text = f"{lost} of {count} late inferences lost their stream: look at the cloud's replicas"
        return Limit("connections", text, seen)
    waited = summary.masks_waited or 0
    if waited * 2 >= count:
        text = (
            f"{waited} inferences found no masks ready: operator B, or the way to it, is too slow; "
            "more of them ahead helps over bursts only"
        )
        return Limit("masks", text, seen)
    busy = summary.engine_busy_ratio
    if busy is not None and busy >= BUSY:
        text = (
            f"the engine computes {busy:.0%} of the time: add replicas, a faster engine, or larger "
            f"batches"
        )
        return Limit("compute", text, seen)
    if not seen:
        text = (
            f"{count} inferences got no answer at all, and the engine does not say how busy it is"
        )
        return Limit("silence", text, seen)
    name = max(seen, key=lambda part: seen[part])
    return Limit(name, _explain(name, seen, busy, summary), seen)


def _generator(summary: Summary) -> str:
    lag_s = summary.generator_lag_s["p99"] or summary.generator_lag_s["max"] or 0.0
    cpu = summary.generator_cpu_ratio
    advice = "add --processes, or a machine"
    if cpu < 0.5:
        advice = "its machine is busy with other work, so run it on another"
    return (
        f"the generator is the limit, not the cloud (it lagged {lag_s * 1e3:.0f} ms, and its "
        f"busiest process used {cpu:.0%} of a core): {advice}"
    )


def _explain(name: str, seen: dict[str, float], busy: float | None, summary: Summary) -> str:
    total_s = sum(seen.values())
    head = f"{seen[name] / total_s:.0%} of a late inference's time ({total_s * 1e3:.0f} ms)"
    share = "" if busy is None else f", though the engine computes only {busy:.0%} of the time"
    up, down = summary.bytes_up_per_input or 0.0, summary.bytes_down_per_input or 0.0
    rows_per_s = summary.inferences_per_s * summary.group_size
    return {
        "generator": f"{head} is the generator's own lag: add --processes, or a machine",
        "device": f"{head} is the devices' own computation: no cloud makes it shorter",
        "link": f"{head} is the simulated links': no cloud makes it shorter",
        "queue": f"{head} is waiting for the engine{share}: arrivals come in bursts, or batches "
        f"are long for this objective; smaller --max-batch-rows, or more replicas",
        "compute": f"{head} is one batch's computation{share}: smaller --max-batch-rows, a faster "
        f"engine",
        "network": f"{head} is neither queue nor engine: network, proxies and event loops carry "
        f"{(up + down) * rows_per_s / 1e6:.1f} MB/s{share}",
    }[name]
