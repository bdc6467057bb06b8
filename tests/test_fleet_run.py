"""Whole runs: spawned shards, the command, Ctrl-C; against a cloud in a thread of this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.cli import main
from datamix import wire
from datamix.bundle import load_backbone
from datamix.errors import ConfigError, NotFound, Unavailable
from edge.fleet import process
from edge.fleet.config import FleetConfig
from edge.fleet.run import FleetProgress, simulate
from tests.fake_cloud import Connection, FakeCloud, echo, running

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    with running(FakeCloud()) as served:
        yield served


def make_config(url: str, **settings: Any) -> FleetConfig:
    options: dict[str, Any] = {"devices": 40, "rate": 200, "duration_s": 1.2, "processes": 2}
    return FleetConfig(url=url, workload="echo", **(options | settings))


def test_two_processes_verify_every_answer_and_leave_nothing(cloud: FakeCloud) -> None:
    seen: list[FleetProgress] = []
    summary = simulate(make_config(cloud.url), seen.append)
    # 3 where this machine was too busy to send on time: the answers are right all the same.
    assert summary.exit_code == (0 if summary.valid else 3), summary
    assert summary.ok == summary.inferences == cloud.requests > 150
    assert cloud.streams == 40 and summary.processes == 2
    assert summary.engine_busy_ratio == pytest.approx(0.25, abs=0.01)  # the fake cloud's claim
    assert summary.batch_rows_mean == pytest.approx(4)
    assert summary.generator_cpu_s_per_request is not None
    assert "running" in [progress.phase for progress in seen]
    assert not [p for p in psutil.Process().children(True) if "spawn_main" in " ".join(p.cmdline())]


def test_a_stock_is_shared_by_all_shards_and_freed_by_ctrl_c() -> None:
    import torch

    folder = ROOT / "bundles/fashion-mnist-mix"
    manifest, blocks = load_backbone(folder)

    def compute(connection: Connection, request: wire.Request) -> None:
        with torch.inference_mode():
            rows = torch.from_numpy(request.features.astype(np.float32))
            connection.send(echo(request, features=blocks[request.block](rows).numpy()))

    shapes = tuple(tuple(block.input_shape) for block in manifest.blocks)
    before = set(os.listdir("/dev/shm"))
    maps: list[str] = []

    def interrupt(progress: FleetProgress) -> None:
        if not maps and progress.phase == "running" and progress.counters["ok"] > 10:
            for child in psutil.Process().children():
                maps.append(Path(f"/proc/{child.pid}/maps").read_text())
            raise KeyboardInterrupt

    with running(FakeCloud(compute, "torch:cpu:float32", shapes)) as cloud:
        config = FleetConfig(
            cloud.url, bundle=str(folder), model="echo", precompute=8, devices=10, rate=40,
            duration_s=600, processes=2,
        )  # fmt: skip
        summary = simulate(config, interrupt)
    assert summary.interrupted and summary.duration_s < 60
    assert summary.ok > 10 and summary.wrong == 0 and not summary.failed
    assert summary.stem == "precomputed" and summary.rounds == 2
    assert summary.accuracy_cloud is None and summary.accuracy_local is None
    assert sum("memfd:datamix-fleet" in text for text in maps) >= 2
    assert "memfd:datamix-fleet" not in Path("/proc/self/maps").read_text()
    left = set(os.listdir("/dev/shm")) - before
    assert not [name for name in left if "datamix" in name or "psm_" in name]


def test_several_front_doors_share_the_devices(cloud: FakeCloud) -> None:
    with running(FakeCloud()) as other:
        summary = simulate(make_config(cloud.url, doors=(other.url,), duration_s=0.6))
        assert summary.ok == summary.inferences == cloud.requests + other.requests
        assert cloud.streams == other.streams == 20
        assert min(cloud.requests, other.requests) > 20


def test_a_generator_that_cannot_keep_up_says_so_and_loses_no_row(cloud: FakeCloud) -> None:
    summary = simulate(make_config(cloud.url, rate=200_000, duration_s=0.5, timeout_s=0.3))
    assert summary.exit_code == 3 and "generator" in str(summary.invalid_reason)
    ended = summary.ok + sum(summary.failed.values()) + summary.unsent + summary.wrong
    assert ended == summary.inferences == pytest.approx(100_000, rel=0.05)


def command(cloud: FakeCloud, folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start ``datamix simulate`` in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "simulate", "--url", cloud.url, "--workload", "echo"]
        + ["--devices", "20", "--rate", "100", "--processes", "2"]
        + ["--json", str(folder / "report.json"), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Any, patience_s: float = 20) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def group(leader: int) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter()
        if process.status() != psutil.STATUS_ZOMBIE and _session(process.pid) == leader
    ]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_the_command_reports_in_every_form(cloud: FakeCloud, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    process = command(cloud, tmp_path, "--duration", "1", "--html", str(page))
    out, err = process.communicate(timeout=60)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert process.returncode == (0 if figures["valid"] else 3), err
    assert "throughput" in out and "running" in err
    assert figures["ok"] == cloud.requests > 50
    assert page.read_text().startswith("<!doctype html>")


def test_a_closed_loop_of_all_kinds_of_devices_is_labelled_in_every_report(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    process = command(
        cloud, tmp_path, "--duration", "1.5", "--arrivals", "closed:think_s=0.1",
        "--profiles", "phone/wifi:1,here:1", "--churn", "on_s=0.5,off_s=0.2",
        "--storm", "at_s=0.2,share=0.5", "--storm", "at_s=0.4", "--cancel", "share=0.2,after_s=1",
        "--slow-readers", "share=0.2,pause_s=0.05",
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert process.returncode in (0, 1, 3), err
    assert figures["loop"] == "closed" and figures["arrivals"] == "closed:think_s=0.1"
    assert "CLOSED LOOP" in out and "50% phone/wifi" in out.replace("\n", " ")
    assert figures["stem"] == figures["encode"] == "partly charged"
    assert [kind["name"] for kind in figures["profiles"]] == ["phone/wifi", "here"]
    assert figures["left"] > 5 and figures["dropped"] > 5 and figures["reconnects"] > 5
    ended = figures["ok"] + sum(figures["failed"].values()) + figures["wrong"]
    ended += figures["unsent"] + figures["stopped"] + figures["cancelled"]
    assert ended == figures["inferences"] > 50 and figures["wrong"] == 0


def test_ctrl_c_reports_what_was_done_and_leaves_no_process(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    process = command(cloud, tmp_path, "--duration", "600")
    wait_for(lambda: cloud.requests > 30)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process gets it
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["interrupted"] and figures["ok"] > 20 and figures["duration_s"] < 60
    assert "Traceback" not in err and "throughput" in out
    wait_for(lambda: not group(process.pid), 5)


def test_shards_whose_parent_was_killed_leave(cloud: FakeCloud, tmp_path: Path) -> None:
    process = command(cloud, tmp_path, "--duration", "600")
    wait_for(lambda: cloud.requests > 10)
    process.kill()
    process.communicate()
    wait_for(lambda: not group(process.pid), 5)


def test_a_killed_shard_ends_the_run_with_what_the_others_did(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    process = command(cloud, tmp_path, "--duration", "600")
    wait_for(lambda: cloud.requests > 40)
    shards = [
        child.pid
        for child in psutil.Process(process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(shards) == 2
    os.kill(shards[1], signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    figures = json.loads((tmp_path / "report.json").read_text())
    assert "shard 1 of 2 was lost (exit code -9)" in figures["invalid_reason"]
    assert figures["ok"] > 10 and figures["duration_s"] < 60
    assert "was lost" in out
    wait_for(lambda: not group(process.pid), 5)


def test_wrong_answers_fail_the_command(tmp_path: Path) -> None:
    def negate(connection: Connection, request: wire.Request) -> None:
        connection.send(echo(request, features=-request.features))

    with running(FakeCloud(negate)) as cloud:
        process = command(cloud, tmp_path, "--duration", "0.5")
        process.communicate(timeout=60)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert process.returncode == (1 if figures["valid"] else 3)
    assert figures["wrong"] == figures["inferences"] > 0 and figures["ok"] == 0


def test_what_cannot_work_is_said_before_anything_starts(
    cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable, match="gives no answer"):
        simulate(make_config("http://127.0.0.1:9"))
    with pytest.raises(NotFound):
        simulate(make_config(cloud.url, model="other"))
    cloud.engine = "torch:cpu:float32"
    with pytest.raises(ConfigError, match="expected 'bundle'"):
        simulate(make_config(cloud.url))
    cloud.engine = "null"
    monkeypatch.setattr(process, "raise_descriptor_limit", lambda: 100)
    with pytest.raises(ConfigError, match="at least 56 processes"):
        simulate(make_config(cloud.url, devices=2000))
    assert cloud.streams == 0


@pytest.mark.parametrize("arrivals", ["trace:/none.csv", "steps:30=5", "gamma:shape=0"])
def test_arrivals_that_make_no_schedule_are_a_wrong_setting(
    cloud: FakeCloud, capsys: pytest.CaptureFixture[str], arrivals: str
) -> None:
    settings = ["--url", cloud.url, "--workload", "echo", "--arrivals", arrivals]
    with pytest.raises(SystemExit) as left:
        main(["simulate", *settings])
    assert left.value.code == 2 and cloud.streams == 0
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "cloud:80"},
        {"doors": ("cloud:80",)},
        {"doors": ("https://cloud",)},
        {"devices": 0},
        {"rate": 0.0},
        {"timeout_s": float("nan")},
        {"workload": "dance"},
        {"workload": "bundle"},
        {"max_retries": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    options: dict[str, Any] = {"url": "http://cloud", "workload": "echo"}
    with pytest.raises(ConfigError):
        FleetConfig(**(options | settings))


def test_an_echo_worker_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, edge.fleet.process, edge.fleet.run; "
        "print(sorted({'torch', 'ray', 'matplotlib', 'httpx', 'psutil'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
