"""Autoscaling on a real cluster: up with the load, streams spread, down again, nothing wrong."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge.fleet.config import FleetConfig
from edge.fleet.report import Summary
from edge.fleet.run import simulate
from tests.served import MARK, ROOT, gone, marked

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PATIENCE_S = 120


class Watched:
    """The cluster as it tells of itself: how many replicas are in which state."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        self.url, self.address = str(first["url"]), str(first["address"])
        self.states: dict[str, int] = {}
        self._output = process.stdout
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._output:
            self.states = {k: v for k, v in json.loads(line).items() if k.isupper()}

    def replicas(self) -> dict[str, Any]:
        """Statistics by replica; each call of a new connection may reach another one."""
        found = {}
        for _ in range(8):
            with contextlib.suppress(OSError, http.client.HTTPException):
                with urllib.request.urlopen(f"{self.url}/v2/stats", timeout=10) as answer:
                    stats = json.load(answer)
                found[stats["replica"]] = stats
        return found


@contextlib.contextmanager
def autoscaled(
    settings: dict[str, Any] | None = None, environment: dict[str, str] | None = None
) -> Iterator[Watched]:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.autoscaled", json.dumps(settings or {})],
        cwd=ROOT,
        env={**os.environ, **(environment or {}), MARK: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Watched(process)
        process.stdin.close()
        assert process.wait(60) == 0
        assert gone(mark, 5) == []
    finally:
        for left in marked(mark):  # of a run that went wrong: the next test is not to suffer
            left.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def load(cluster: Watched, rate: float, until: Callable[[], bool]) -> list[Summary]:
    """Verified fleets of 40 devices, one after the other, until something is so."""
    found: list[Summary] = []
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, cluster.states
        found.append(
            simulate(
                FleetConfig(
                    url=cluster.url, devices=40, rate=rate, duration_s=3, seed=len(found),
                    workload="echo", rows=4, timeout_s=30,
                )
            )
        )  # fmt: skip
    return found


def test_replicas_follow_the_load_up_and_down_and_every_answer_is_right() -> None:
    with autoscaled() as cluster:
        (first,) = cluster.replicas()
        # One replica can do 44 of these a second.
        runs = load(cluster, 70, lambda: cluster.states.get("RUNNING", 0) >= 2)
        assert runs, "it had two replicas before there was any load"
        shared: list[dict[str, Any]] = []

        def both_work() -> bool:
            shared.append(cluster.replicas())
            return sum(int(stats["rows"] > 0) for stats in shared[-1].values()) >= 2

        runs += load(cluster, 70, both_work)
        runs += load(cluster, 4, lambda: cluster.states == {"RUNNING": 1})
    for run in runs:
        assert run.wrong == run.unsent == 0
        assert not run.failed
        assert run.ok == run.inferences
    assert first in shared[-1], "the first replica did not live through it"
