"""`datamix up|down|status`: what is typed for Ray, what is asked, what is understood."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import launcher
from cluster.cli import app
from datamix.errors import ConfigError

ROOT = Path(__file__).parents[1]
AWS = ROOT / "cluster.yaml"
ON_PREMISES = ROOT / "cluster/launch/onprem.yaml"
STATUS = """\
2026-11-27 07:23:33,374\tINFO command_runner.py:234 -- Fetched IP: 10.77.0.11\r
======== Autoscaler status: 2026-11-27 07:37:39.803880 ========\r
Node status\r
Active:\r
 2 local.cluster.node\r
\x1b[0m\r
-- datamix: applications --\r
proxies:\r
  4ba9253560d73997fe55da97e38f6af051fe71c3a50db980c70e35a4: HEALTHY\r
\r
applications:\r
  datamix:\r
    status: RUNNING\r
    message: ''\r
    last_deployed_time_s: 1795764758.119207\r
    deployments:\r
      Backbone:\r
        status: HEALTHY\r
        status_trigger: CONFIG_UPDATE_COMPLETED\r
        replica_states:\r
          RUNNING: 2\r
        message: ''\r
\r
target_capacity: null\r
Shared connection to 10.77.0.11 closed.\r
"""


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every `ray` that would have run."""
    calls: list[list[str]] = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert words[:3] == [sys.executable, "-m", "ray.scripts.scripts"]
        calls.append(words[3:])
        return subprocess.CompletedProcess(words, 0, STATUS, "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_up_starts_delivers_and_deploys(typed: list[list[str]]) -> None:
    serve = ROOT / "deployments/serve-cpu.yaml"
    code, said = run("up", str(AWS), "--serve", str(serve), "--yes")
    assert code == 0 and "datamix status" in said
    assert typed == [
        ["up", str(AWS), "--yes", "--no-config-cache"],
        ["rsync-up", str(AWS), str(serve), "~/datamix/deployed.yaml"],
        ["exec", str(AWS), "serve deploy ~/datamix/deployed.yaml"],
    ]


def test_up_without_an_application_starts_only(typed: list[list[str]]) -> None:
    assert run("up", str(AWS), "--no-deploy", "-y")[0] == 0
    assert [words[0] for words in typed] == ["up"]


def test_down_of_bought_machines_is_rays(typed: list[list[str]]) -> None:
    assert run("down", str(AWS), "--yes")[0] == 0
    assert typed == [["down", str(AWS), "--yes"]]


def test_down_on_premises_stops_the_workers_first(typed: list[list[str]]) -> None:
    assert run("down", str(ON_PREMISES), "--yes")[0] == 0
    first, last = typed
    assert first[0] == "exec" and last == ["down", str(ON_PREMISES), "--yes"]
    for address in ("192.0.2.11", "192.0.2.12"):
        assert f"ubuntu@{address} " in first[2]
    assert "192.0.2.10" not in first[2]  # the head: Ray's own business


def test_the_workers_shells_get_what_was_meant(tmp_path: Path) -> None:
    """Through three shells: the head's, ssh's and the worker's own."""
    log = tmp_path / "log"
    for name, script in {
        "ssh": 'for last; do :; done; printf "%s\\n" "$*" >>"$LOG"; exec sh -c "$last"',
        "bash": 'printf "%s\\n" "$2" >>"$LOG"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    command = launcher.stop_workers(("me@10.0.0.1",))
    subprocess.run(["/bin/sh", "-c", command], env=environment, check=True)
    called, inner = log.read_text().splitlines()
    assert "me@10.0.0.1" in called and inner == launcher.STOP


def test_status_shows_nodes_and_applications(typed: list[list[str]]) -> None:
    code, said = run("status", str(AWS))
    assert code == 0
    assert said.startswith("======== Autoscaler status")
    assert "application datamix: RUNNING\n  Backbone: HEALTHY, replicas: 2 RUNNING" in said
    assert "\r" not in said and "\x1b" not in said and "Shared connection" not in said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("status: RUNNING", "status: DEPLOYING"),
        (STATUS[STATUS.index("  datamix:") : STATUS.index("\r\ntarget")], ""),
    ],
)
def test_status_fails_while_something_does_not_run(old: str, new: str) -> None:
    assert launcher.parse_status(STATUS).serves
    assert not launcher.parse_status(STATUS.replace(old, new)).serves


def test_a_head_without_ray_is_an_error() -> None:
    with pytest.raises(launcher.LaunchError, match="expected its status"):
        launcher.parse_status("ConnectionError: Could not find any running Ray instance.\r\n")


def test_what_ray_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 3, "", "")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(launcher.LaunchError, match="ray down .* ended with 3"):
        launcher.down(launcher.read_cluster(AWS))


@pytest.mark.parametrize("command", ["up", "down"])
def test_nothing_happens_unconfirmed(typed: list[list[str]], command: str) -> None:
    with pytest.raises(ConfigError, match="expected --yes"):
        run(command, str(AWS))
    assert typed == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a file for ray up"),
        ("[1, 2]", "is no file for ray up"),
        ("cluster_name: x", "is no file for ray up"),
        ("{", "is no file for ray up"),
        ("{cluster_name: x, provider: {type: aws}, max_workers: many}", "is no file for ray up"),
        (
            "{cluster_name: x, provider: {type: local, worker_ips: [a]}, max_workers: 1}",
            "is no file for ray up",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        launcher.read_cluster(path)


def test_an_application_that_is_not_there_starts_nothing(typed: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match="expected one for serve deploy"):
        run("up", str(AWS), "--serve", "no-such.yaml", "--yes")
    assert typed == []
