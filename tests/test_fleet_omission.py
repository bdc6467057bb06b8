"""Coordinated omission: a stalled server shows in an open loop's report, and not in a closed one's.

The same cloud stands still for half a second in the middle of each run. The fleet counts from the
schedule, so all that fell due meanwhile waited; a closed loop asked nothing, and has one late
answer per client to show for it. benchmarks/omission.py does the same with 2 s in 30 s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from datamix import wire
from edge.fleet.closed import closed_loop
from edge.fleet.config import FleetConfig
from edge.fleet.report import percentiles
from edge.fleet.run import simulate
from tests.fake_cloud import Connection, FakeCloud, polite, running

STALL_S = 0.5
RUN_S = 3.0


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    """Answers at once, but for one stall: from the first request after the middle of a run."""
    first_s = 0.0
    stalled = False

    def stalling(connection: Connection, request: wire.Request) -> None:
        nonlocal first_s, stalled
        first_s = first_s or time.monotonic()
        if not stalled and time.monotonic() - first_s > RUN_S / 2:
            stalled = True
            time.sleep(STALL_S)  # the server's only thread: nothing is read or answered meanwhile
        polite(connection, request)

    with running(FakeCloud(stalling)) as served:
        yield served


def test_an_open_loop_shows_the_stall(cloud: FakeCloud) -> None:
    summary = simulate(
        FleetConfig(
            url=cloud.url, workload="echo", devices=20, rate=200, duration_s=RUN_S, pacer="constant"
        )
    )
    assert summary.ok == summary.inferences == 600
    p50_s, p99_s = summary.latency_s["p50"], summary.latency_s["p99"]
    assert p50_s is not None and p99_s is not None
    # A sixth of all fell due in the stall; the 99th percentile waited for 94% of it.
    assert 0.85 * STALL_S < p99_s < STALL_S + 0.5
    assert p50_s < STALL_S / 4


def test_a_closed_loop_does_not(cloud: FakeCloud) -> None:
    config = FleetConfig(url=cloud.url, workload="echo")
    run = closed_loop(config, lanes=4, per_query=1, enough=lambda queries, at_s: at_s >= RUN_S)
    figures = percentiles(run.latencies_s)
    assert len(run.queries) > 500, "too slow for four late ones to be less than 1%"
    assert figures["max"] is not None and figures["max"] > 0.9 * STALL_S  # it did stall
    assert figures["p99"] is not None and figures["p99"] < STALL_S / 4
