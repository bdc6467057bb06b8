"""Objectives and gates: what may be written, what is refused, and what a run is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli import main
from datamix.errors import ConfigError
from edge.fleet.objective import Objective, parse_objective, parse_seconds
from edge.fleet.report import Summary, summarise
from edge.fleet.threshold import EXIT_CODE, METRICS, exit_code, parse_threshold
from tests.fake_cloud import FakeCloud, running
from tests.test_fleet_report import make_run

GOOD = summarise(make_run())  # every latency is 20 ms


@pytest.mark.parametrize(
    ("text", "quantile", "latency_s"),
    [
        ("p99=100ms", 0.99, 0.1),
        (" p90 = 0.5s ", 0.9, 0.5),
        ("p50=250us", 0.5, 0.00025),
        ("p999=1s", 0.999, 1.0),
        ("p99.9=1s", 0.999, 1.0),
    ],
)
def test_an_objective_is_read(text: str, quantile: float, latency_s: float) -> None:
    found = parse_objective(text)
    assert found.quantile == pytest.approx(quantile) and found.latency_s == latency_s
    again = parse_objective(str(found))
    assert again.quantile == pytest.approx(quantile)
    assert again.latency_s == pytest.approx(latency_s)
    assert found.allowed == pytest.approx(1 - quantile)


@pytest.mark.parametrize(
    "text",
    [
        *("", "p99", "p99=", "p99=100", "99=1s", "p99<100ms", "p9=1s", "p100=1s", "p00=1s"),
        *("p99=-1ms", "p99=0ms", "p99=1e3ms", "p99=nans", "p99=infs", "p99=١s", "p999.9=1s"),
        *("p20=1s", "p99=1s;", "p99=1 min"),
    ],
)
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_objective(text)


@given(st.text())
def test_any_text_is_an_objective_or_a_config_error(text: str) -> None:
    for parse in (parse_objective, parse_threshold, parse_seconds):
        try:
            parse(text)
        except ConfigError as error:
            assert "expected" in str(error)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("p99<100ms", True),
        ("p99<20ms", False),
        ("p99 <= 0.0201s", True),
        ("p50>10ms", True),
        ("max<10ms", False),
        ("error-rate<1%", True),
        ("error-rate<=0", True),
        ("goodput>=90", True),
        ("goodput>=200", False),
        ("throughput>50", True),
        ("lag<5ms", True),
        ("wrong<1", True),
        ("batch-rows>=16", True),
        ("busy<60%", True),
        ("queue<2ms", False),
    ],
)
def test_a_gate_compares_with_the_run(text: str, passes: bool) -> None:
    outcome = parse_threshold(text).judge(GOOD)
    assert outcome.passed is passes
    assert outcome.threshold.text in str(outcome)
    assert outcome.as_dict()["passed"] is passes
    assert exit_code(GOOD, [outcome]) == (0 if passes else EXIT_CODE)


def test_a_gate_without_enough_samples_fails_loudly() -> None:
    few = summarise(make_run(rate=10, duration_s=5))
    outcome = parse_threshold("p999<1s").judge(few)
    assert not outcome.passed and outcome.value is None
    assert "NOT JUDGED" in str(outcome)
    assert exit_code(few, [outcome]) == EXIT_CODE
    assert not parse_threshold("accuracy>10%").judge(few).passed


def failing(share: float) -> Summary:
    count = int(1000 * share)
    return replace(GOOD, ok=1000 - count, failed={"429": count} if count else {})


def test_a_gate_on_errors_says_how_many_are_allowed() -> None:
    gate = parse_threshold("error-rate<=1%")
    assert exit_code(failing(0.01), [gate.judge(failing(0.01))]) == 0
    assert exit_code(failing(0.02), [gate.judge(failing(0.02))]) == EXIT_CODE
    other = parse_threshold("p99<1s")
    assert exit_code(failing(0.01), [other.judge(failing(0.01))]) == 1
    wrong = replace(failing(0.01), wrong=1)
    assert exit_code(wrong, [gate.judge(wrong)]) == 1


def test_a_run_that_is_not_valid_passes_no_gate() -> None:
    invalid = replace(GOOD, valid=False, invalid_reason="it lagged")
    assert exit_code(invalid, [parse_threshold("p99<1s").judge(invalid)]) == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "such as p99<100ms"),
        ("p99", "such as"),
        ("p99=100ms", "such as"),
        ("p98<1s", "expected one of p50"),
        ("p99<100", "expected as 100ms"),
        ("error-rate<1ms", "expected as 1%"),
        ("error-rate<120%", "expected as 1%"),
        ("goodput>10%", "expected as 200"),
        ("p99<<1s", "expected as"),
    ],
)
def test_a_gate_that_means_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_threshold(text)


def test_every_metric_reads_a_run() -> None:
    for name, (kind, read) in METRICS.items():
        value = read(GOOD)
        assert value is None or value >= 0, name
        assert kind in ("time", "share", "number")
    assert METRICS["p99"][1](GOOD) == pytest.approx(0.02)


@pytest.mark.parametrize("bad", [(0.4, 1.0), (1.0, 1.0), (0.99, 0.0), (0.99, float("inf"))])
def test_an_objective_that_nobody_can_promise_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Objective(*bad)


@pytest.mark.parametrize(
    ("gates", "code"),
    [(["p50<5s", "error-rate<=50%"], 0), (["p50<5s", "p50<1us"], 4), (["p999<5s"], 4)],
)
def test_the_command_ends_as_its_gates_say(
    gates: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    options = [part for gate in gates for part in ("--threshold", gate)]
    with running(FakeCloud()) as cloud, pytest.raises(SystemExit) as ended:
        main(
            ["simulate", "--url", cloud.url, "--workload", "echo", "--devices", "5"]
            + ["--rate", "100", "--duration", "0.5", "--json", str(path), *options]
        )
    figures = json.loads(path.read_text())
    assert ended.value.code == (code if figures["valid"] else 3)
    assert [one["threshold"] for one in figures["thresholds"]] == gates
    assert [one["passed"] for one in figures["thresholds"]].count(False) == (code > 0)
    assert gates[-1] in capsys.readouterr().out


def test_a_bad_gate_is_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            ["simulate", "--url", "http://127.0.0.1:9", "--workload", "echo"]
            + ["--threshold", "p99<fast"]
        )
    assert ended.value.code == 2 and "expected as 100ms" in capsys.readouterr().err
