"""Shards elsewhere than in child processes: an outpost by itself, and actors of a real cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ray_fleet import compare_clocks, parse_resources
from datamix.errors import ConfigError
from edge.fleet.config import FleetConfig
from edge.fleet.outpost import Outpost
from edge.fleet.process import Failure, Ready, Target, Task
from edge.fleet.shard import Progress, ShardResult
from tests.fake_cloud import SHAPE, FakeCloud, running
from tests.served import ROOT, Served, marked

delays = st.floats(0, 10)


@given(st.floats(-1e6, 1e6), st.lists(st.tuples(delays, delays), min_size=1, max_size=20))
def test_a_clock_is_never_further_off_than_it_says(
    offset_s: float, trips: list[tuple[float, float]]
) -> None:
    pings, now = [], 100.0
    for there_s, back_s in trips:
        pings.append((now, now + there_s + offset_s, now + there_s + back_s))
        now += there_s + back_s + 1
    clock = compare_clocks(pings)
    assert abs(clock.offset_s - offset_s) <= clock.error_s + 1e-6
    assert clock.error_s <= min(sum(trip) for trip in trips) / 2 + 1e-6


def test_resources_are_read_or_refused() -> None:
    assert parse_resources("CPU=1") == {"CPU": 1.0}
    assert parse_resources("CPU=0.5, generator=1") == {"CPU": 0.5, "generator": 1.0}
    for text in ("", "CPU", "CPU=x", "CPU=0", "CPU=-1", "CPU=nan", "=1", "generator=1", "CPU=inf"):
        with pytest.raises(ConfigError, match="resources are"):
            parse_resources(text)


def hear(outpost: Outpost, until: type, patience_s: float = 20) -> list[Any]:
    """Words up to the first of one kind."""
    words: list[Any] = []
    deadline_s = time.monotonic() + patience_s
    while not any(isinstance(word, until) for word in words):
        assert time.monotonic() < deadline_s, words
        words += outpost.words(0.2)
    return words


def test_an_outpost_says_what_a_process_does() -> None:
    with running(FakeCloud()) as cloud:
        config = FleetConfig(cloud.url, workload="echo", devices=6, rate=100, duration_s=0.3)
        target = Target("echo", "null", (SHAPE,))
        outpost = Outpost()
        assert outpost.words(0.01) == [] and outpost.where()
        assert outpost.clock() == pytest.approx(time.monotonic(), abs=1)
        outpost.work(Task(config, target, 0, 1))
        assert isinstance(hear(outpost, Ready)[0], Progress)
        outpost.tell(outpost.clock() + 0.05)
        (flown,) = [w for w in hear(outpost, ShardResult) if isinstance(w, ShardResult)]
        assert flown.counters.ok == len(flown.table) == cloud.requests > 10

        stopped = Outpost()
        long = FleetConfig(cloud.url, workload="echo", devices=6, rate=100, duration_s=600)
        stopped.work(Task(long, target, 0, 1))
        hear(stopped, Ready)
        stopped.tell(stopped.clock())
        stopped.tell(None)
        assert hear(stopped, ShardResult)
    refused = Outpost()
    refused.work(Task(FleetConfig("http://127.0.0.1:9", workload="echo", connect_timeout_s=0.1),
                      target, 0, 1))  # fmt: skip
    (failure,) = [w for w in hear(refused, Failure) if isinstance(w, Failure)]
    assert "got no stream" in failure.sentence and failure.status == 503


# --- a real cluster -----------------------------------------------------------------------------


def command(cluster: Served, folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "simulate", "--url", cluster.url]
        + ["--bundle", cluster.bundle, "--devices", "40", "--rate", "40", "--precompute", "16"]
        + ["--on-ray", "--ray-address", cluster.address, "--processes", "2"]
        + ["--json", str(folder / "report.json"), *more],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def shards(cluster: Served) -> list[psutil.Process]:
    return [p for p in marked(cluster.mark) if "Outpost" in " ".join(p.cmdline())]


def wait_for(condition: Callable[[], Any], patience_s: float = 60) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def wait_for_answers(process: subprocess.Popen[str]) -> None:
    """Wait for a line of progress that says that many were answered."""
    assert process.stderr is not None
    for said in process.stderr:
        if re.match(r"running .* ok \d\d", said):
            return
    pytest.fail("the command ended before it was answered")


@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_a_fleet_of_actors_reports_leaves_nothing_and_tells_of_a_lost_one(
    cluster: Served, tmp_path: Path
) -> None:
    process = command(cluster, tmp_path, "--duration", "2")
    _, err = process.communicate(timeout=90)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert process.returncode == (0 if figures["valid"] else 3), err
    assert figures["ok"] == figures["inferences"] > 40 and figures["processes"] == 2
    assert figures["stem"] == "precomputed" and figures["accuracy_cloud"] is None
    assert 0 < figures["start_error_s"] < 0.5
    wait_for(lambda: not shards(cluster), 20)

    process = command(cluster, tmp_path, "--duration", "600")
    wait_for_answers(process)
    shards(cluster)[0].kill()
    _, err = process.communicate(timeout=60)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert process.returncode == 3, err
    assert "of 2 was lost (on " in figures["invalid_reason"], figures["invalid_reason"]
    assert figures["ok"] > 0 and figures["duration_s"] < 120

    process = command(cluster, tmp_path, "--duration", "600")
    wait_for_answers(process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "throughput" in out
    assert json.loads((tmp_path / "report.json").read_text())["interrupted"]
    wait_for(lambda: not shards(cluster), 20)


@pytest.mark.cluster
@pytest.mark.timeout(120)
def test_the_device_s_code_is_on_no_workers_but_this_job_s(cluster: Served) -> None:
    """As seen by workers on which the project is not installed, which it is on this machine.

    In a process of its own: Ray connects once in one, and gives workers the driver's folder.
    """
    code = f"""
import ray
from cluster.ray_fleet import on_ray

def found():
    import importlib.util, os, sys
    here = lambda path: "py_modules_files" not in path and os.path.isdir(path + "/edge")
    sys.path[:] = [path for path in sys.path if path and not here(path)]
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
    spec = importlib.util.find_spec("edge")
    return spec and spec.origin

with on_ray({cluster.address!r}, {{"CPU": 1}}) as fleet:
    assert fleet.room() >= 1
    print("ours", ray.get(ray.remote(found).remote()))
ray.init({cluster.address!r}, log_to_driver=False)
print("theirs", ray.get(ray.remote(found).remote()))
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"ours \S+py_modules_files\S+edge/__init__.py", done.stdout), done.stdout
    assert "theirs None" in done.stdout
