"""Closed loops: their figures from known records, and real ones against the fake cloud."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.cli import main
from datamix import wire
from datamix.errors import ConfigError, Unavailable
from edge.fleet import closed
from edge.fleet.capacity_view import show_closed
from edge.fleet.closed import ClosedRun, Query, closed_loop
from edge.fleet.config import FleetConfig
from edge.fleet.scenario import (
    Scenario,
    multi_stream,
    observed,
    offline,
    report,
    run_scenario,
    single_stream,
    throughput,
)
from tests.fake_cloud import Connection, FakeCloud, echo, running


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    with running(FakeCloud()) as served:
        yield served


def config_for(cloud: FakeCloud, timeout_s: float = 5.0) -> FleetConfig:
    return FleetConfig(url=cloud.url, workload="echo", timeout_s=timeout_s)


def record(latency_s: float, count: int, per_query: int = 1, cpu: float = 0.1) -> ClosedRun:
    """Queries one after the other, each of the same latency."""
    queries = [Query(i * latency_s, (i + 1) * latency_s, False) for i in range(count)]
    return ClosedRun("echo", 4, 1, per_query, queries, Counter(), latency_s * count, cpu)


def test_a_loops_figures_are_those_of_its_record() -> None:
    found = report(single_stream(), record(0.01, 1000), 1.0)
    assert found.valid and found.loop == "closed" and found.queries == 900
    assert found.duration_s == pytest.approx(9.0)
    assert found.inferences_per_s == pytest.approx(100, rel=0.01)
    assert found.rows_per_s == pytest.approx(400, rel=0.01)
    assert found.bound_s == pytest.approx(0.01) == found.latency_s["p90"]
    assert found.left_out is not None and 60 < found.left_out < 90
    json.dumps(found.as_dict(), allow_nan=False)


def test_too_few_queries_make_no_figure() -> None:
    found = report(multi_stream(), record(0.01, 600, 8), 0.0)
    assert not found.valid and found.exit_code == 3
    assert "600 queries were answered right, expected 662" in str(found.invalid_reason)
    assert found.bound_s is None
    assert report(multi_stream(), record(0.01, 662, 8), 0.0).bound_s is not None
    nothing = report(offline(), ClosedRun("echo", 4, 1, 1), 1.0)
    assert not nothing.valid and nothing.latency_s["max"] is None


def test_a_generator_that_is_full_limits_throughput_only() -> None:
    assert not report(offline(), record(0.01, 1000, cpu=0.95), 1.0).valid
    assert report(single_stream(), record(0.01, 1000, cpu=0.95), 1.0).valid


def test_throughput_knows_how_sure_it_is() -> None:
    steady = np.arange(0, 10, 0.01) + 0.005
    rate, low, high = throughput(steady, 0.0, 10.0, 2)
    assert rate == 200 and low is not None and high is not None
    assert low == pytest.approx(200, abs=3) and high == pytest.approx(200, abs=3)
    bursts = np.sort(np.random.default_rng(0).random(1000)) ** 2 * 10
    rate, low, high = throughput(bursts, 0.0, 10.0, 1)
    assert rate == 100 and low is not None and high is not None and high - low > 30
    assert throughput(steady[:50], 0.0, 0.5, 1) == (100, None, None)
    assert throughput(np.empty(0), 0.0, 10.0, 1) == (0.0, None, None)


def test_an_observed_quantile_needs_something_beyond_it() -> None:
    assert observed(np.arange(99.0), 0.99) is None
    assert observed(np.arange(100.0), 0.99) == 98.0


@pytest.mark.parametrize("lanes", [(0, 1), (1, 0)])
def test_a_scenario_without_queries_is_refused(lanes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="1 or more each"):
        Scenario("none", *lanes, None)
    with pytest.raises(ConfigError, match="positive time"):
        run_scenario(single_stream(), FleetConfig("http://x", workload="echo"), 0.0)


def test_one_inference_at_a_time(cloud: FakeCloud) -> None:
    open_at_once = 0
    most = 0

    def slow(connection: Connection, request: wire.Request) -> None:
        nonlocal open_at_once, most
        open_at_once += 1
        most = max(most, open_at_once)

        def answer() -> None:
            nonlocal open_at_once
            open_at_once -= 1
            connection.send(echo(request))

        import asyncio

        asyncio.get_running_loop().call_later(0.002, answer)

    cloud.behaviour = slow
    found = run_scenario(single_stream(), config_for(cloud), 0.3)
    assert most == 1 and cloud.streams == 1
    assert found.failed == {} and found.exit_code == 0, found
    assert found.bound_s is not None and 0.002 < found.bound_s < 0.5
    most = 0
    run = closed_loop(
        config_for(cloud), lanes=2, per_query=4, enough=lambda queries, elapsed_s: queries >= 20
    )
    assert 4 < most <= 8 and len(run.queries) >= 20
    assert all(query.latency_s > 0.002 for query in run.queries)


def test_failures_are_counted_and_the_loop_goes_on(cloud: FakeCloud) -> None:
    def moody(connection: Connection, request: wire.Request) -> None:
        match cloud.requests % 5:
            case 0:
                connection.send(wire.encode_error(request.request_id, 429, "no"))
            case 1:
                connection.drop()
            case 2:
                connection.send(echo(request, features=-request.features))
            case 3:
                connection.send(b"not a message")
            case _:
                connection.send(echo(request))

    cloud.behaviour = moody
    run = closed_loop(
        config_for(cloud), lanes=1, per_query=1, enough=lambda queries, elapsed_s: queries >= 20
    )
    assert run.failed == {"429": 4, "connection": 4, "wrong": 4, "answer": 4}
    found = report(single_stream(), run, 0.0)
    assert found.queries == 4 and not found.valid


def test_a_cloud_that_is_silent_or_not_there(cloud: FakeCloud) -> None:
    cloud.behaviour = lambda connection, request: None
    run = closed_loop(
        config_for(cloud, 0.1), lanes=2, per_query=1, enough=lambda queries, elapsed_s: queries >= 2
    )
    assert set(run.failed) == {"timeout"}
    with pytest.raises(Unavailable):
        run_scenario(single_stream(), FleetConfig("http://127.0.0.1:9", workload="echo"), 1.0)


def test_the_command_reports_a_closed_loop_as_such(
    cloud: FakeCloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "offline.json"
    with pytest.raises(SystemExit) as ended:
        main(
            ["scenario", "offline", "--url", cloud.url, "--workload", "echo", "--depth", "8"]
            + ["--duration", "0.5", "--json", str(path)]
        )
    found = json.loads(path.read_text())
    assert ended.value.code == (0 if found["valid"] else 3)
    assert found["loop"] == "closed" and found["lanes"] == 8
    assert found["inferences_per_s"] > 50
    assert "closed: nothing is asked" in " ".join(capsys.readouterr().out.split())


def test_every_report_is_shown() -> None:
    for scenario, run in ((single_stream(), record(0.01, 9)), (offline(), record(0.01, 999))):
        out = io.StringIO()
        show_closed(report(scenario, run, 0.0), Console(file=out, width=100))
        assert scenario.name in out.getvalue() and "closed" in out.getvalue()


def test_more_streams_than_a_process_may_open_are_refused(
    cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed, "raise_descriptor_limit", lambda: 100)
    with pytest.raises(ConfigError, match="37 streams were asked for, expected at most 36"):
        run_scenario(offline(37), config_for(cloud), 1.0)
