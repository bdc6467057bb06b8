"""The head's control store dies under load, and comes back with what a Redis kept of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.operated import BUNDLE, Fleet, kill, operated, until
from cluster.local import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

OUTAGE_S = 5.0


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A real Redis on a free port; its address."""
    if shutil.which("redis-server") is None:
        pytest.skip("the head's fault tolerance needs redis-server (apt install redis-server)")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def test_a_dead_control_store_stops_no_answer_and_comes_back(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(redis(tmp_path))
        names = {"RAY_REDIS_ADDRESS": address, "RAY_external_storage_namespace": "test"}
        cluster = stack.enter_context(operated(2, **names))
        cluster.deploy({"bundle": str(BUNDLE), "threads": 1}, replicas=2)
        before = cluster.running()
        fleet = Fleet(cluster.url, rate=8.0, devices=24, duration_s=20.0)
        fleet.wait_running()
        (store,) = cluster.processes("gcs_server")
        command, environment = store.cmdline(), store.environ()
        at_s = kill(store)
        answered = fleet.requests
        time.sleep(OUTAGE_S)
        assert not cluster.processes("gcs_server")
        assert fleet.requests > answered, "nothing was answered without the store"
        again = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        stack.callback(again.wait)
        stack.callback(again.kill)
        until(lambda: cluster.running() == before)
        seen = fleet.seen()
        assert seen.lost == seen.summary.wrong == seen.strays == 0, seen.summary.failed
        assert seen.recovery_s(at_s) < OUTAGE_S, "devices waited for the store"
        # And it is in charge again: what dies is replaced.
        kill(cluster.processes("ServeReplica")[0])
        until(lambda: len(cluster.running()) == 2 and cluster.running() != before)
