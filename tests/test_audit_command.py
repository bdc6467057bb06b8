from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from datamix.errors import ConfigError
from edge.audit.command import AuditConfig, run
from edge.audit.truth import truth_path

BUNDLE = str(Path(__file__).parents[1] / "bundles" / "fashion-mnist-mix")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_an_audit_leaves_rows_a_page_and_a_capture_to_go_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"a.{kind}" for kind in ("json", "html", "capture")}
    command = ["audit", "--bundle", BUNDLE, "--groups", "6", "--group-size", "8"]
    command += ["--attacks", "constant", "--budget-s", "30"]
    command += ["--json", str(files["json"]), "--html", str(files["html"])]
    for again in (False, True):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        said = capsys.readouterr().out
        assert exit_.value.code == 0
        assert "obfuscation, no bound" in said and "known break" in said
        assert ("recorded 6 of 6" in said) != again
        assert ("[1/1] constant" in said) != again
        rows = json.loads(files["json"].read_text())["rows"]
        assert {row["verdict"] for row in rows} == {"at the floor"}
        assert {row["k"] for row in rows} == {8}
    assert "data:image/png" in files["html"].read_text()
    assert truth_path(files["capture"]).exists()
    for other in (AuditConfig(BUNDLE, groups=7), AuditConfig(BUNDLE, groups=6, seed=1)):
        with pytest.raises(ConfigError, match="6 groups by seed 0"):
            run(replace(other, json_path=files["json"]), print)


def test_a_capture_alone_is_attacked_but_not_scored(tmp_path: Path) -> None:
    told: list[str] = []
    run(AuditConfig(BUNDLE, groups=3, json_path=tmp_path / "a.json"), told.append)
    capture = tmp_path / "a.capture"
    config = AuditConfig(BUNDLE, capture=capture, attacks=("constant",))
    assert run(config, told.append).report.scored
    truth_path(capture).unlink()
    outcome = run(config, told.append)
    assert [row.verdict for row in outcome.report.rows] == ["not scored"]
    assert any("not scored" in line for line in told)
    with pytest.raises(ConfigError, match="group size"):
        run(AuditConfig(BUNDLE, capture=capture, group_size=8), told.append)
    with pytest.raises(ConfigError, match="mode"):
        run(AuditConfig(BUNDLE, capture=capture, mode="split"), told.append)


def test_what_cannot_be_audited_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_bytes(b"nothing")
    for more in (
        ["--group-size", "0"],
        ["--attacks", "nothing"],
        ["--capture", str(tmp_path / "a")],
        ["--groups", "0"],
        ["--budget-s", "0"],
        ["--dataset", "nothing"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["audit", "--bundle", BUNDLE, "--groups", "1", *more])
        assert exit_.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("datamix: ") and said.count("\n") == 1
