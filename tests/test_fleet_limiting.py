"""What limits a cloud, from tables of which the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge.fleet import result
from edge.fleet.limiting import NONE, Limit, limit, parts
from edge.fleet.objective import Objective
from edge.fleet.report import Run, summarise
from tests.test_fleet_report import make_run

P99 = Objective(0.99, 0.1)


def late_run(**columns: Any) -> Run:
    """1,000 inferences, every tenth of which took 0.2 s, with ``columns`` for those."""
    run = make_run()
    table = run.table.copy()
    late = np.arange(len(table)) % 10 == 0
    table["done_s"][late] = table["scheduled_s"][late] + 0.2
    for name, value in columns.items():
        table[name][late] = value
    return replace(run, table=table)


def named(run: Run, busy: float | None = 0.5) -> Limit:
    summary = replace(summarise(run), engine_busy_ratio=busy)
    return limit(run, summary, P99, 0.0)


def test_where_nothing_is_late_nothing_limits() -> None:
    assert named(make_run()) == NONE


@pytest.mark.parametrize(
    ("columns", "name", "says"),
    [
        ({"queue_s": 0.15, "compute_s": 0.02}, "queue", "waiting for the engine"),
        ({"queue_s": 0.02, "compute_s": 0.15}, "compute", "one batch's computation"),
        ({"queue_s": 0.01, "compute_s": 0.01}, "network", "MB/s"),
        ({"uplink_s": 0.1, "downlink_s": 0.06}, "link", "simulated links"),
        ({"stem_s": 0.1, "head_s": 0.06}, "device", "devices' own"),
        ({"lag_s": 0.15}, "generator", "not the cloud"),
        ({"status": 429}, "shedding", "refused"),
        ({"status": 503}, "shedding", "refused"),
        ({"status": result.CONNECTION}, "connections", "lost their stream"),
        ({"status": result.TIMEOUT}, "silence", "no answer at all"),
        ({"status": result.UNSENT, "lag_s": np.nan, "done_s": np.nan}, "generator", "not the"),
    ],
)
def test_the_largest_part_of_the_late_ones_is_named(
    columns: dict[str, Any], name: str, says: str
) -> None:
    found = named(late_run(**columns))
    assert found.name == name
    assert says in found.sentence


def test_an_engine_that_is_full_is_the_limit_wherever_they_wait() -> None:
    found = named(late_run(queue_s=0.15), busy=0.97)
    assert found.name == "compute" and "97%" in found.sentence
    assert named(late_run(status=result.TIMEOUT), busy=0.97).name == "compute"


def test_a_little_lag_is_not_what_tips_a_load() -> None:
    run = make_run(latency_s=0.0995)
    table = run.table.copy()
    late = np.arange(len(table)) % 50 == 0
    table["done_s"][late] = table["scheduled_s"][late] + 0.1005
    table["queue_s"] = 0.08
    assert named(replace(run, table=table)).name == "queue"
    table["lag_s"] = 0.02
    assert named(replace(run, table=table)).name == "generator"


def test_masks_that_are_not_ready_are_operator_bs_limit() -> None:
    run = late_run(queue_s=0.15)
    summary = replace(summarise(run), masks_waited=80, engine_busy_ratio=0.99)
    found = limit(run, summary, P99, 0.0)
    assert found.name == "masks" and "80 inferences" in found.sentence


def test_an_invalid_run_says_nothing_of_the_cloud() -> None:
    run = late_run(queue_s=0.15)
    summary = replace(summarise(run), valid=False, invalid_reason="it lagged")
    assert limit(run, summary, P99, 0.0).name == "generator"


def test_the_parts_add_up_to_the_latency() -> None:
    table = late_run(queue_s=0.1, compute_s=0.05, mix_s=0.01).table
    found = parts(table[::10])
    assert sum(found.values()) == pytest.approx(0.2)
    assert found["queue"] == pytest.approx(0.1) and found["device"] == pytest.approx(0.01)
    assert parts(table[:0]) == {}


def test_the_warm_up_is_not_blamed() -> None:
    run = make_run()
    table = run.table.copy()
    table["done_s"][:50] = table["scheduled_s"][:50] + 5.0
    run = replace(run, table=table)
    assert limit(run, summarise(run), P99, 1.0) == NONE
    assert limit(run, summarise(run), P99, 0.0).name == "network"
