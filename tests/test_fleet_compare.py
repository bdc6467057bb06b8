"""Better, worse, or no difference seen: right in direction, and not more often than it says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from datamix.errors import ConfigError
from edge.fleet import compare as module
from edge.fleet.compare import BETTER, FEW, OTHER_LOAD, SAME, WORSE, Difference, compare
from edge.fleet.report import Run
from edge.fleet.reporting import unique_names
from tests.fleet_runs import lively, record
from tests.test_fleet_report import make_run


def datamix(*arguments: str) -> Any:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code or 0


def figures(a: Run, b: Run) -> dict[str, Difference]:
    return {one.name: one for one in compare(("a", a), ("b", b)).differences}


def test_a_run_against_itself_shows_no_difference() -> None:
    run = lively(1)
    found = figures(run, run)
    assert {one.verdict for one in found.values()} == {SAME, FEW}
    for one in found.values():
        if one.difference_interval is not None:
            assert one.difference == 0 and one.difference_interval[0] < 0
            assert one.difference_interval[1] > 0


def test_a_slower_cloud_is_worse_and_the_other_way_round_better() -> None:
    a, b = lively(1), lively(2, slow=4, failing=0.05)
    worse, better = figures(a, b), figures(b, a)
    for name in ("latency p50", "latency p90", "not answered right"):
        assert worse[name].verdict == WORSE and better[name].verdict == BETTER, name
    one = worse["latency p50"]
    assert one.a is not None and one.b is not None and one.difference == one.b - one.a > 0
    assert one.ratio == one.b / one.a and one.ratio_interval is not None
    assert 1 < one.ratio_interval[0] <= one.ratio <= one.ratio_interval[1]
    assert worse["latency p99.9"].verdict == FEW and worse["latency p99.9"].difference is None


def test_runs_of_one_law_differ_no_more_often_than_they_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 200)
    verdicts: Counter[str] = Counter()
    for seed in range(25):
        a, b = lively(2 * seed, rate=40), lively(2 * seed + 1, rate=40)
        verdicts.update(one.verdict for one in figures(a, b).values() if one.verdict != FEW)
    differ = verdicts[BETTER] + verdicts[WORSE]
    assert sum(verdicts.values()) > 100
    assert differ / sum(verdicts.values()) < 0.12, verdicts  # 5%, hanging together by fives


def test_no_failure_seen_is_not_none_at_all() -> None:
    one = figures(make_run(), make_run())["not answered right"]
    assert one.a == one.b == one.difference == 0 and one.verdict == SAME
    low, high = one.difference_interval or (0.0, 0.0)
    assert low == pytest.approx(-high) and high == pytest.approx(3.8 / 1000, rel=0.02)


def test_another_load_is_said_and_no_rate_is_judged() -> None:
    found = compare(("a", lively(1)), ("b", lively(2, rate=150)))
    assert any("100.0 and 150.0 requests/s" in note for note in found.notes)
    verdicts = {one.name: one.verdict for one in found.differences}
    assert verdicts["goodput"] == verdicts["answered right"] == OTHER_LOAD


def test_a_short_run_is_not_judged() -> None:
    found = figures(make_run(duration_s=9), make_run(duration_s=9, latency_s=1))
    assert {one.verdict for one in found.values()} == {FEW}
    assert found["latency p99"].difference == pytest.approx(0.98)


def test_notes_name_what_is_not_alike() -> None:
    a, b = lively(1), lively(2)
    b.table["lag_s"] = 1
    config = replace(b.config, slo_s=None, warm_up_s=3.0, devices=7)
    notes = " ".join(compare(("a", a), ("b", replace(b, config=config, model="other"))).notes)
    for word in ("b is not valid", "SLO", "warm-up", "devices", "workload"):
        assert word in notes


def test_the_commands_read_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        record(tmp_path / name, run)
        for name, run in (("before", lively(1)), ("after", lively(2, slow=4)))
    ]
    assert datamix("compare", *map(str, runs), "--json", str(tmp_path / "c.json")) == 0
    out = capsys.readouterr().out
    assert "worse" in out and "after against before" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["differences"][0]["verdict"] == WORSE

    page, figures_path = tmp_path / "page.html", tmp_path / "f.json"
    code = datamix("report", *map(str, runs), "--html", str(page), "--json", str(figures_path))
    out = capsys.readouterr().out
    assert code == 1  # some inferences failed
    assert "before" in out and "after" in out and "goodput" in out
    read: Any = json.loads(figures_path.read_text())["runs"]
    assert [one["run"] for one in read] == ["before", "after"]
    assert read[0]["series"]["offered"] == [100.0] * 20
    text = page.read_text()
    assert text.count("<svg") == 1 + 2 * 9 and "Percentiles by run" in text  # at the same load
    assert "Settings and machine" in text
    assert datamix("report", str(runs[0])) == 1
    capsys.readouterr()
    assert datamix("report", str(tmp_path)) == 2
    assert "no record of a run" in capsys.readouterr().err
    assert datamix("report", str(runs[0]), "--json", str(tmp_path / "no" / "f.json")) == 2


def test_names_tell_runs_apart() -> None:
    assert unique_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert unique_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]
    with pytest.raises(ConfigError, match="twice"):
        unique_names([Path("/x/a"), Path("/x/a")])
