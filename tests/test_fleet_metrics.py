"""`datamix simulate --metrics`: what Prometheus scrapes while a fleet runs."""

from __future__ import annotations

import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.fleet_metrics import FleetRecorder, serving_metrics
from cluster.local import free_port
from datamix.errors import ConfigError
from edge.fleet.command import run
from edge.fleet.counters import Counters
from edge.fleet.run import FleetProgress
from tests.fake_cloud import FakeCloud, running
from tests.test_fleet_page import PROGRESS
from tests.test_fleet_run import command, make_config


def test_progress_becomes_figures() -> None:
    registry = CollectorRegistry()
    recorder = FleetRecorder(registry)
    value = registry.get_sample_value
    counters = asdict(Counters(begun=40, ok=30, failed=1))
    recorder(replace(PROGRESS, counters=counters, latencies_s=[0.02, 0.3]))
    assert value("datamix_fleet_devices") == 2000
    assert value("datamix_fleet_connected_devices") == 1999
    assert value("datamix_fleet_open_inferences") == 12
    assert value("datamix_fleet_begun_inferences_total") == 40
    assert value("datamix_fleet_inferences_total", {"outcome": "ok"}) == 30
    assert value("datamix_fleet_inferences_total", {"outcome": "failed"}) == 1
    assert value("datamix_fleet_latency_seconds_count") == 2
    assert value("datamix_fleet_latency_seconds_bucket", {"le": "0.025"}) == 1
    again = counters | {"ok": 35, "retries": 4, "reconnects": 2, "cancelled": 3}
    recorder(replace(PROGRESS, counters=again, latencies_s=[0.01]))
    assert value("datamix_fleet_inferences_total", {"outcome": "ok"}) == 35
    assert value("datamix_fleet_inferences_total", {"outcome": "cancelled"}) == 3
    assert value("datamix_fleet_retries_total") == 4
    assert value("datamix_fleet_reconnects_total") == 2
    assert value("datamix_fleet_latency_seconds_count") == 3


def test_a_run_serves_its_figures_and_stops_with_it(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    scraped: list[str] = []

    def scrape(progress: FleetProgress) -> None:
        if progress.counters["ok"]:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                scraped.append(answer.read().decode())

    with running(FakeCloud()) as cloud, serving_metrics(address) as publish:
        run(make_config(cloud.url, duration_s=2.5), None, None, also=(publish, scrape))
    assert scraped
    found = dict(line.rsplit(" ", 1) for line in scraped[-1].splitlines() if line[0] != "#")
    assert float(found["datamix_fleet_devices"]) == 40
    answered = float(found['datamix_fleet_inferences_total{outcome="ok"}'])
    assert 0 < answered <= float(found["datamix_fleet_begun_inferences_total"])
    assert float(found["datamix_fleet_latency_seconds_count"]) == answered
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{address}/metrics", timeout=10)


def test_the_command_takes_the_address_and_refuses_what_is_none(tmp_path: Path) -> None:
    with running(FakeCloud()) as cloud:
        process = command(cloud, tmp_path, "--metrics", "9500")
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "metrics are to go to '9500', expected HOST:PORT" in said


def test_a_port_that_is_taken_is_refused() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        serving_metrics(address),
        pytest.raises(ConfigError, match=f"at {address} \\(Address already in use\\)"),
        serving_metrics(address),
    ):
        pass
