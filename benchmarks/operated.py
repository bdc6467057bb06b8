"""A cluster as an operator has it, and a fleet on it whose every answer is verified.

Ray with its dashboard in a process of its own; the application comes by `datamix deploy`, as
`deployments/serve.yaml` does. The fleet runs in a thread beside what is done to the cluster.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import accounting, clusters
from cluster.rollout import connect, deploy
from datamix.errors import DataMixError
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.report import Run, Summary
from edge.fleet.run import FleetProgress, record

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "fashion-mnist-mix"
MARK = "bare"
LATE_S = 1.0  # an answer that takes longer is one that a failure delayed
_QUIET_S = 3.0  # of load before something is done to the cluster


@dataclass(frozen=True)
class Operated:
    """A cluster on this machine.

    Attributes:
        url: base URL of the front door.
        address: Ray's own address.
        dashboard: of Ray's dashboard.
    """

    url: str
    address: str
    dashboard: str

    def deploy(
        self,
        args: dict[str, Any],
        *,
        replicas: int,
        import_path: str = "deployments.app:app",
        environment: dict[str, str] | None = None,
        within_s: float = 120,
    ) -> None:
        """Deploy these settings as `datamix deploy` does, and wait.

        Raises:
            Unavailable: it failed, and why.
        """
        application = {
            "name": "datamix",
            "import_path": import_path,
            "route_prefix": "/",
            "runtime_env": {"env_vars": environment or {}},
            "args": args,
            "deployments": [{"name": "Backbone", "num_replicas": replicas}],
        }
        host, port = "127.0.0.1", int(self.url.rpartition(":")[2])
        settings = {
            "proxy_location": "EveryNode",
            "http_options": {"host": host, "port": port},
            "applications": [application],
        }
        deploy(connect(self.dashboard), settings, within_s=within_s)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Its processes of a kind: ``ServeReplica``, ``haproxy``, ``ServeController``, ..."""
        found = []
        for process in accounting.processes(MARK):
            with contextlib.suppress(psutil.Error, OSError):
                zombie = process.status() == psutil.STATUS_ZOMBIE
                if not zombie and accounting.kind(process.cmdline()) == kind:
                    found.append(process)
        return found

    def running(self) -> set[str]:
        """Ids of the replicas that run, by Serve's own account; empty while it gives none."""
        try:
            details = connect(self.dashboard).get_serve_details()
            replicas = details["applications"]["datamix"]["deployments"]["Backbone"]["replicas"]
        except (DataMixError, RuntimeError, KeyError, OSError):
            return set()
        return {each["replica_id"] for each in replicas if each["state"] == "RUNNING"}


@contextlib.contextmanager
def operated(replicas: int, **environment: str) -> Iterator[Operated]:
    """Start a cluster with room for so many replicas, and as many again during an update."""
    with clusters.start_saying(MARK, replicas=2 * replicas, environment=environment) as said:
        yield Operated(said["url"], said["address"], said["dashboard"])


@dataclass(frozen=True)
class Seen:
    """What the devices saw.

    Attributes:
        run: every inference.
        summary: its figures.
    """

    run: Run
    summary: Summary

    @property
    def lost(self) -> int:
        """Inferences without an answer, within the fleet's retry budget."""
        return sum(self.summary.failed.values()) + self.summary.unsent

    @property
    def strays(self) -> int:
        """Answers that nobody should have got."""
        one = self.summary
        return one.duplicates + one.misrouted + one.unmatched + one.unreadable

    def recovery_s(self, fault_s: float) -> float:
        """Seconds from the fault until the last inference that it delayed was answered.

        fault_s: on the monotonic clock. 0 where none took more than ``LATE_S``.
        """
        table, at_s = self.run.table, fault_s - self.run.start_s
        took_s = table["done_s"] - table["scheduled_s"]
        late = (table["done_s"] > at_s) & ((took_s > LATE_S) | (table["status"] != result.OK))
        return float(np.max(table["done_s"][late]) - at_s) if late.any() else 0.0


class Fleet:
    """A verified fleet at work in another thread.

    Attributes:
        requests: answered so far.
    """

    def __init__(self, url: str, **settings: Any) -> None:
        """Start it; settings are those of the fleet."""
        self._running, self._enough = threading.Event(), threading.Event()
        self.requests = 0
        self._pool = ThreadPoolExecutor(1, "fleet")
        wanted: dict[str, Any] = {"bundle": str(BUNDLE), "timeout_s": 30.0, **settings}
        config = FleetConfig(url=url, **wanted)
        self._future: Future[tuple[Run, Summary]] = self._pool.submit(
            record, config, self._on_progress, watch=lambda news: self._enough.is_set()
        )

    def _on_progress(self, progress: FleetProgress) -> None:
        self.requests = progress.counters["requests_ok"]
        if progress.phase == "running" and progress.elapsed_s > _QUIET_S:
            self._running.set()

    def wait_running(self) -> None:
        """Wait until it has been at work for a few seconds."""
        while not self._running.wait(0.1):
            if self._future.done():
                self._future.result()
                raise RuntimeError("the fleet's run was over before anything happened to it")

    def stop(self) -> None:
        """Let it end before its time; what is under way then counts as stopped."""
        self._enough.set()

    def seen(self) -> Seen:
        """Wait for its end."""
        try:
            return Seen(*self._future.result())
        finally:
            self._pool.shutdown()


def until(condition: Callable[[], bool], within_s: float = 90.0) -> float:
    """Wait for something; return for how many seconds that took.

    Raises:
        TimeoutError: it did not come about.
    """
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > within_s:
            raise TimeoutError(f"nothing came about within {within_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - start_s


def kill(process: psutil.Process) -> float:
    """End a process without a word; return when."""
    os.kill(process.pid, signal.SIGKILL)
    return time.monotonic()
