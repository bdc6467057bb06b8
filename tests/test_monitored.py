"""A real cluster under load and a real Prometheus: metrics move, rules have data, alerts fire.

The GPU is a fake NVML on the path of the cluster's processes; all else is what users run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.fleet_metrics import serving_metrics
from cluster.local import free_port
from cluster.monitoring.board import live_panels
from cluster.monitoring.live import expression
from datamix import wire
from deployments.metrics import TABLE
from edge.fleet.behaviour import Storm
from edge.fleet.config import FleetConfig
from edge.fleet.run import OnProgress, simulate
from tests.autoscaled import SHAPE
from tests.served import MARK, ROOT, gone, marked
from tests.test_autoscaled import Watched, autoscaled
from tests.test_monitoring import ALERTS, RULES, rules

pytestmark = [pytest.mark.cluster, pytest.mark.monitoring, pytest.mark.timeout(600)]

PATIENCE_S = 240
PROFILE = {
    "schema_version": 1,
    "name": "copying",
    "max_batch_rows": 32,
    "depth": 2,
    "blocks": [{"a_s": 0.02, "b_s": 0.005, "copy_a_s": 0.002}],
}


class Cluster:
    """The cluster, and Prometheus beside it."""

    def __init__(
        self, watched: Watched, prometheus: str, page: str, on_progress: OnProgress
    ) -> None:
        self.watched, self.prometheus, self.page = watched, prometheus, page
        self.on_progress = on_progress

    def ask(self, path: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/{path}?{query}", timeout=30) as body:
            answer = json.load(body)
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The samples of an instant query."""
        found = self.ask("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def ray_targets(self) -> list[dict[str, Any]]:
        """The nodes that are scraped."""
        targets = self.ask("targets")["activeTargets"]
        return [target for target in targets if target["labels"]["job"] == "ray"]

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("prometheus") is None:
        pytest.skip("NO PROMETHEUS HERE: apt install prometheus, or monitoring goes untested")
    profile = tmp_path_factory.mktemp("profile") / "copying.json"
    profile.write_text(json.dumps(PROFILE))
    settings = {
        "engine": f"emulated:{profile}",
        "max_queue_rows": 96,
        "price_per_hour": 1.2,
        "power_watts": 90,
    }
    path = os.pathsep.join(map(str, (ROOT / "tests/fake_driver", ROOT)))
    environment = {"PYTHONPATH": path, "RAY_metrics_report_interval_ms": "1000"}
    with autoscaled(settings, environment) as watched:
        late(watched.url)
        fleet = f"127.0.0.1:{free_port()}"
        with (
            serving_metrics(fleet) as on_progress,
            monitoring(watched.address, fleet) as (url, page),
        ):
            yield Cluster(watched, url, page, on_progress)


@contextlib.contextmanager
def monitoring(address: str, fleet: str) -> Iterator[tuple[str, str]]:
    """`datamix monitor` as a user starts it, ended with Ctrl-C."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "monitor", "--address", address, "--port", "0"]
        + ["--interval", "2", "--page-port", "0", "--fleet", fleet],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        page = ""
        for line in process.stdout:
            if found := re.match(r"page at (\S+)", line):
                page = found[1]
            if found := re.match(r"Prometheus at (\S+),", line):
                break
        else:
            pytest.fail("datamix monitor ended before Prometheus was ready")
        names = [each.name() for each in marked(mark)]
        assert "prometheus" in names
        yield found[1], page
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert gone(mark, 5) == []
    finally:
        for left in marked(mark):  # of a run that went wrong
            left.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def late(url: str) -> None:
    """A burst with short deadlines at an engine without figures yet: some expire in the queue."""
    rows = np.ones((4, *SHAPE), np.float32)

    def post(number: int) -> int:
        body = wire.encode_request(rows, request_id=str(number), deadline_s=0.06)
        request = urllib.request.Request(
            f"{url}/v2/models/echo/infer", body, {"content-type": wire.MEDIA_TYPE}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(post, range(24)))
    assert set(found) <= {200, 408, 429}


@contextlib.contextmanager
def load(cluster: Cluster, rate: float, timeout_s: float = 0.6) -> Iterator[None]:
    """Fleets of 40 devices, one after the other, in a process of their own."""
    ended = threading.Event()

    def run() -> None:
        for seed in itertools.count():
            if ended.is_set():
                return
            simulate(
                FleetConfig(
                    url=cluster.watched.url, devices=40, rate=rate, duration_s=8, seed=seed,
                    workload="echo", rows=4, timeout_s=timeout_s, storms=(Storm(4.0, 0.2),),
                ),
                cluster.on_progress,
            )  # fmt: skip

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(120)
    assert not thread.is_alive()


def until(what: Callable[[], object], missing: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, missing()
        time.sleep(2)


def test_every_metric_moves_every_rule_has_data_and_overload_is_told(cluster: Cluster) -> None:
    still = {metric.name: metric for metric in TABLE}
    without_data = {rule["record"] for rule in rules(RULES)}
    quiet = {"DataMixShedding", "DataMixSloBurnFast", "DataMixGpuErrors"}
    assert quiet <= {alert["alert"] for alert in rules(ALERTS)}

    def look() -> bool:
        for name in list(still):
            shown = f"ray_{name}_count" if still[name].kind == "histogram" else f"ray_{name}"
            if any(value > 0 for _, value in cluster.query(f"max_over_time({shown}[1m])")):
                del still[name]
        for name in list(without_data):
            if cluster.query(name):
                without_data.discard(name)
        quiet.difference_update(cluster.firing())
        return not still and not without_data and not quiet

    with load(cluster, 200):
        until(look, lambda: (set(still), without_data, quiet))


def test_every_panel_of_the_live_page_has_data(cluster: Cluster) -> None:
    empty = {panel.name: panel for panel in live_panels()}

    def look() -> bool:
        for name, panel in list(empty.items()):
            if any(cluster.query(expression(query.expression)) for query in panel.queries):
                del empty[name]
        return not empty

    with load(cluster, 60, timeout_s=5):
        until(look, lambda: empty)
    with urllib.request.urlopen(f"{cluster.page}/live.json", timeout=30) as answer:
        told = json.load(answer)
    assert told["state"] == "ok"
    with urllib.request.urlopen(f"{cluster.page}/runbooks/shedding", timeout=30) as answer:
        assert answer.read().startswith(b"# DataMixShedding")


def test_a_node_is_scraped_without_what_nobody_asks_for(cluster: Cluster) -> None:
    def healths() -> list[str]:
        return [target["health"] for target in cluster.ray_targets()]

    until(lambda: healths() == ["up"], healths)  # a busy node may miss a scrape
    (target,) = cluster.ray_targets()
    assert not cluster.query('{__name__=~"ray_grpc_.*"}')
    (node,) = {labels["node"] for labels, _ in cluster.query("ray_datamix_rows_total")}
    assert target["scrapeUrl"].startswith(f"http://{node}:")


def test_one_process_of_a_node_publishes_its_gpus(cluster: Cluster) -> None:
    ups = cluster.query("ray_datamix_gpu_up")
    assert len(ups) == 1
    (power,) = cluster.query("datamix:gpu_power:watts") or [({}, 312.5)]  # not while it restarts
    assert power[1] == 312.5


def test_the_engine_is_as_busy_as_it_says(cluster: Cluster) -> None:
    """Prometheus and the replicas' own statistics, over the same half a minute."""
    with load(cluster, 12, timeout_s=10):
        for _ in range(4):  # the autoscaler may replace replicas, and what has gone can't be asked
            time.sleep(5)
            before, began = cluster.watched.replicas(), time.monotonic()
            time.sleep(30)
            after, passed_s = cluster.watched.replicas(), time.monotonic() - began
            shown = cluster.query("sum(rate(ray_datamix_engine_busy_seconds_total[30s]))")
            if before and before.keys() == after.keys():
                break
        else:
            pytest.fail("no half a minute with the same replicas")
    busy_s = sum(after[name]["engine_busy_s"] - before[name]["engine_busy_s"] for name in after)
    assert shown[0][1] == pytest.approx(busy_s / passed_s, rel=0.25, abs=0.02)


def test_the_pages_of_the_table_are_parsed_by_prometheus_own_format(cluster: Cluster) -> None:
    """What Ray's agent serves is valid text of the exposition format, help and type included."""
    (target,) = cluster.ray_targets()
    with urllib.request.urlopen(target["scrapeUrl"], timeout=30) as answer:
        text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for metric in TABLE:
        if metric.source in ("replica", "model"):
            name = f"ray_{metric.name}".removesuffix("_total")
            if metric.kind == "histogram":  # which replicas add up themselves
                assert families[f"{name}_bucket"].type == "gauge"
                count = {sample.value for sample in families[f"{name}_count"].samples}
                assert max(count) > 0
            else:
                assert families[name].type == metric.kind, metric.name
