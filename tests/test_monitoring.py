"""Configurations, rules and alerts as Prometheus sees them; and what `datamix monitor` makes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring import helm
from cluster.monitoring.run import (
    FOLDER,
    Options,
    _following,
    configuration,
    find_prometheus,
)
from datamix.errors import ConfigError
from deployments.metrics import TABLE
from tests.served import ROOT

RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
METRICS = {f"ray_{metric.name}" for metric in TABLE}  # as Ray's agents call them
TESTS = ROOT / "tests/monitoring.yml"
RUNBOOKS = ROOT / "docs/runbooks"


def rules(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in file["groups"] for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("NO PROMTOOL HERE: apt install prometheus, or rules go untested")
    done = subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- with promtool ------------------------------------------------------------------------------


@pytest.mark.monitoring
@pytest.mark.parametrize("path", sorted(FOLDER.glob("prometheus*.yml")), ids=lambda path: path.name)
def test_a_configuration_is_one_for_prometheus(path: Path) -> None:
    promtool("check", "config", str(path))


@pytest.mark.monitoring
def test_every_rule_and_alert_does_what_its_test_says() -> None:
    promtool("test", "rules", str(TESTS))


# --- without ------------------------------------------------------------------------------------


def test_no_rule_and_no_alert_is_without_a_test() -> None:
    text = TESTS.read_text()
    for rule in rules(RULES):
        assert f"(1e6 * {rule['record']})" in text, rule["record"]
    tests = yaml.safe_load(text)["tests"]
    for alert in rules(ALERTS):
        cases = [
            bool(case["exp_alerts"])
            for test in tests
            for case in test.get("alert_rule_test", ())
            if case["alertname"] == alert["alert"]
        ]
        assert set(cases) == {True, False}, f"{alert['alert']} shall fire in a test, and not in one"


def test_rules_read_what_the_table_or_another_rule_has() -> None:
    known = METRICS | {rule["record"] for rule in rules(RULES)} | {"up"}
    known |= {f"ray_{metric.name}_bucket" for metric in TABLE if metric.kind == "histogram"}
    for rule in rules(RULES) + rules(ALERTS):
        read = set(
            re.findall(r"\b(?:datamix:[a-z0-9_:]*|\w*datamix_[a-z0-9_]*|up)\b", rule["expr"])
        )
        assert read
        assert read <= known, rule


def test_recording_rules_are_named_by_level_and_window() -> None:
    for rule in rules(RULES):
        assert re.fullmatch(r"datamix:[a-z_]+:[a-z]+[a-z0-9_]*", rule["record"])
        for window in re.findall(r"\[(\w+)\]", rule["expr"]):
            assert rule["record"].endswith((window, ":watts")), rule


def test_each_alert_has_a_severity_and_a_page_and_each_page_an_alert() -> None:
    books = {alert["annotations"]["runbook_url"].rpartition("/")[2] for alert in rules(ALERTS)}
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == books
    for alert in rules(ALERTS):
        where, _, book = alert["annotations"]["runbook_url"].rpartition("/")
        assert where == "http://localhost:9400/runbooks"  # as `datamix monitor` serves them
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith(".")
        lines = (RUNBOOKS / f"{book}.md").read_text().splitlines()
        assert alert["alert"] in lines[0].removeprefix("# ").split(", ")
        headings = [line for line in lines if line.startswith("## ")]
        assert headings == ["## Look", "## Usual causes", "## Do"]


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_names_what_there_is(path: Path) -> None:
    text = path.read_text()
    known = METRICS | {rule["record"] for rule in rules(RULES)}
    assert set(re.findall(r"\w*datamix[_:][a-z0-9_]+(?::[a-z0-9_]+)?", text)) <= known
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / link).exists(), link


def test_the_configurations_differ_in_where_targets_come_from_only() -> None:
    configs = [yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("prometheus*.yml"))]
    assert len(configs) == 3
    for config in configs:
        (ray,) = (job for job in config["scrape_configs"] if job["job_name"] == "ray")
        assert [key for key in ray if key.endswith("_sd_configs")]
        for key in ("file_sd_configs", "http_sd_configs"):
            ray.pop(key, None)
        assert config == configs[0]


def test_the_charts_values_are_what_the_files_make() -> None:
    assert helm.VALUES.read_text() == helm.text(), "run `python -m cluster.monitoring.helm`"
    values = yaml.safe_load(helm.text())
    assert values["additionalPrometheusRulesMap"] == {"rules": RULES, "alerts": ALERTS}
    (monitor,) = values["prometheus"]["additionalPodMonitors"]
    (pods,) = monitor["podMetricsEndpoints"]
    (down,) = (rule for rule in rules(ALERTS) if rule["alert"] == "DataMixTargetDown")
    jobs = [rule["replacement"] for rule in pods["relabelings"] if rule["targetLabel"] == "job"]
    assert jobs and re.search(rf"\b{jobs[0]}\b", down["expr"])
    known = {"sourceLabels", "targetLabel", "regex", "action", "replacement"}
    for rule in pods["metricRelabelings"]:
        assert rule.keys() <= known, "not a field of the Operator's"


def test_what_compose_mounts_is_there_and_is_where_it_is_looked_for() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounts = {
        name: {
            target: FOLDER / source
            for source, target, *_ in (volume.split(":") for volume in service["volumes"])
            if source.startswith(".")
        }
        for name, service in services.items()
    }
    for places in mounts.values():
        assert places and all(source.is_dir() for source in places.values())
    arguments = dict(
        argument.lstrip("-").split("=", 1) for argument in services["prometheus"]["command"]
    )
    config = Path(arguments["config.file"])
    seen = mounts["prometheus"][str(config.parent)] / config.name
    for file in yaml.safe_load(seen.read_text())["rule_files"]:
        assert (seen.parent / file).is_file()
    provisioning = mounts["grafana"]["/etc/grafana/provisioning"]
    boards = yaml.safe_load((provisioning / "dashboards/datamix.yml").read_text())
    (provider,) = boards["providers"]
    assert list(mounts["grafana"][provider["options"]["path"]].glob("*.json"))
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())
    (source,) = sources["datasources"]
    given = services["grafana"]["environment"]
    variable = source["url"].strip("${}")
    assert given[variable] == f"http://{arguments['web.listen-address']}"
    assert given["GF_SERVER_HTTP_ADDR"] == "127.0.0.1", "open to others"


def test_nodes_stay_known_while_ray_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.monitoring.run._REFRESH_S", 0.001)
    path, seen, ended = tmp_path / "nodes.json", [], threading.Event()
    answers = iter([["a:1"], [], [], ["b:2"]])

    def targets() -> list[str]:
        seen.append(path.read_text() if path.exists() else "")
        try:
            return next(answers)
        except StopIteration:
            ended.set()
            return []

    with _following(targets, path):
        assert ended.wait(30)
    a, b = '[{"targets": ["a:1"]}]', '[{"targets": ["b:2"]}]'
    assert seen[:5] == ["", a, a, a, b] and path.read_text() == b


def test_ours_is_the_same_with_targets_of_its_own(tmp_path: Path) -> None:
    options = Options(gpu_exporters=("n:9835",), fleets=("f:9500",), interval_s=3)
    config = configuration(tmp_path / "nodes.json", options)
    ray, gpu, fleet = config["scrape_configs"]
    assert ray["file_sd_configs"][0]["files"] == [str(tmp_path / "nodes.json")]
    assert gpu["static_configs"] == [{"targets": ["n:9835"]}]
    assert fleet["static_configs"] == [{"targets": ["f:9500"]}]
    assert config["global"]["scrape_interval"] == "3s"
    assert all(Path(name).is_file() for name in config["rule_files"])
    shipped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert ray["metric_relabel_configs"] == shipped["scrape_configs"][0]["metric_relabel_configs"]


def test_without_prometheus_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"on the PATH: apt install prometheus .*--prometheus"):
        find_prometheus()
    with pytest.raises(ConfigError, match="at '/nowhere/x'"):
        find_prometheus("/nowhere/x")
    assert find_prometheus(sys.executable) == sys.executable
