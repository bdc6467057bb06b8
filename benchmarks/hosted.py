"""A cluster on isolated hosts: a head that computes nothing, two workers, and a host of devices.

The hosts are those of `tests/hosts.py`: own network, processes and disk, one machine. Ray is
started on each by hand, the application comes by `datamix deploy`, and devices know the head as the
cloud.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.operated import BUNDLE, ROOT, Seen, until
from edge.fleet.report import summarise
from edge.fleet.saved import load_run
from tests.hosts import Hosts

HEAD, WORKERS, DEVICES = 0, (1, 2), 3
_PYTHON = shlex.quote(sys.executable)
_BIN = Path(sys.executable).parent
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PATH": f"{_BIN}:$PATH",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


class Hosted:
    """The cluster.

    Attributes:
        url: the head's front door.
    """

    def __init__(self, hosts: Hosts, **environment: str) -> None:
        """Take four hosts that are on; nothing runs yet."""
        self.hosts = hosts
        self.url = f"http://{hosts.ip(HEAD)}:8000"
        exports = {**_ENVIRONMENT, **environment}
        self._prelude = f"cd {shlex.quote(str(ROOT))}; export " + " ".join(
            f"{name}={value}" for name, value in exports.items()
        )
        self._runs = 0

    def run(self, number: int, command: str, timeout_s: float = 120) -> str:
        """Run a command in the checkout of a host, with the cluster's environment."""
        return self.hosts.run(number, f"{self._prelude}; {command}", timeout_s)

    def start_head(self) -> None:
        """Start Ray on the head."""
        self.run(
            HEAD,
            "ray start --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 "
            f"--node-ip-address={self.hosts.ip(HEAD)} --object-store-memory=100000000",
        )

    def start_worker(self, number: int) -> None:
        """Start Ray on a worker, with room for two replicas."""
        self.run(
            number,
            f"ray start --address={self.hosts.ip(HEAD)}:6379 --num-cpus=2 "
            f"--node-ip-address={self.hosts.ip(number)} --object-store-memory=100000000",
        )

    def deploy(self, args: dict[str, Any], *, replicas: int) -> None:
        """Deploy these settings with `datamix deploy`."""
        backbone = {"name": "Backbone", "num_replicas": replicas, "max_replicas_per_node": replicas}
        settings = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": 8000},
            "applications": [
                {
                    "name": "datamix",
                    "import_path": "deployments.app:app",
                    "route_prefix": "/",
                    "args": args,
                    "deployments": [backbone],
                }
            ],
        }
        path = self.hosts.shared / "serve.yaml"
        path.write_text(yaml.safe_dump(settings))
        self.run(HEAD, f"{_PYTHON} -m cluster.cli deploy {path} --within 200", 300)

    def replicas(self) -> dict[str, str]:
        """Address of the node of each running replica, by Serve's own account."""
        get = "curl -s -m 2 http://127.0.0.1:8265/api/serve/applications/"
        found = self.hosts.run(HEAD, get, check=False)
        try:
            application = json.loads(found)["applications"]["datamix"]
            replicas = application["deployments"]["Backbone"]["replicas"]
        except (ValueError, KeyError):
            return {}
        return {
            each["replica_id"]: each["node_ip"] for each in replicas if each["state"] == "RUNNING"
        }

    def running(self) -> set[str]:
        """Ids of the replicas that run."""
        return set(self.replicas())

    def pids(self, number: int, word: str) -> list[str]:
        """Processes of a host, by its own count, whose command line begins or ends a word so."""
        lines = self.hosts.run(number, "ps -eo pid,args").splitlines()[1:]
        found = [line.split(maxsplit=1) for line in lines]
        return [pid for pid, command in found if re.search(word, command.split()[0])]

    def kill(self, number: int, word: str) -> float:
        """kill -9 of the processes of a host whose program matches; return when.

        Raises:
            RuntimeError: there is none.
        """
        pids = self.pids(number, word)
        if not pids:
            raise RuntimeError(f"nothing on host {number} matches {word!r}, expected a process")
        self.hosts.run(number, f"kill -9 {' '.join(pids)}")
        return time.monotonic()

    def door(self, number: int) -> str:
        """The front door of a host."""
        return f"http://{self.hosts.ip(number)}:8000"

    def worker_with_replica(self) -> int:
        """The number of a worker that runs a replica."""
        addresses = set(self.replicas().values())
        return next(number for number in WORKERS if self.hosts.ip(number) in addresses)

    def until_replaced(self, before: set[str], within_s: float = 180) -> None:
        """Wait until as many replicas run as ``before``, one of them new.

        Raises:
            TimeoutError: it did not come about.
        """

        def replaced() -> bool:
            now = self.running()
            return len(now) == len(before) and bool(now - before)

        until(replaced, within_s)

    def spread(self) -> None:
        """Kill one of two replicas on the same worker until each worker has one again.

        A deployment would not do: its new replicas come before the old ones go, and so all go
        where these are not.
        """
        for _ in range(8):
            if len(set(self.replicas().values())) == len(WORKERS):
                return
            number, before = self.worker_with_replica(), self.running()
            victim = self.pids(number, r"^ray::ServeReplica")[0]
            self.hosts.run(number, f"kill -9 {victim}")
            self.until_replaced(before)
        raise RuntimeError("the replicas would not spread over the workers")

    @contextlib.contextmanager
    def fleet(self, urls: Sequence[str] = (), **settings: Any) -> Iterator[HostedFleet]:
        """A verified fleet at work on the devices' host; ``urls`` are its front doors."""
        self._runs += 1
        folder = self.hosts.shared / f"run{self._runs}"
        options = {"bundle": BUNDLE, "timeout": 30, **settings, "out": folder}
        words = " ".join(f"--{name} {value}" for name, value in options.items())
        doors = " ".join(f"--url {url}" for url in urls or [self.url])
        command = f"{self._prelude}; {_PYTHON} -m cluster.cli simulate {doors} {words}"
        process = self.hosts.start(DEVICES, command)
        try:
            yield HostedFleet(process, folder)
        finally:
            self.hosts.stop(process)


class HostedFleet:
    """A fleet in a process on a host."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        """Watch a fleet that writes its record to ``folder``."""
        self._process = process
        self._folder = folder

    def wait_running(self, quiet_s: float = 3.0) -> None:
        """Wait until it has been at work for some seconds."""

        def at_work() -> bool:
            if self._process.poll() is not None:
                raise RuntimeError(f"the fleet has ended: {self._process.communicate()[1][-2000:]}")
            return (self._folder / "run.json").exists()

        until(at_work)
        time.sleep(quiet_s)

    def seen(self, within_s: float = 200) -> Seen:
        """Wait for its end."""
        _, said = self._process.communicate(timeout=within_s)
        if not (self._folder / "summary.json").exists():
            raise RuntimeError(f"the fleet was cut off: {said[-2000:]}")
        run = load_run(self._folder)
        return Seen(run, summarise(run))


@contextlib.contextmanager
def hosted(hosts: Hosts, replicas: int = 2, **environment: str) -> Iterator[Hosted]:
    """Start the cluster on hosts that are on, and deploy the shipped bundle; ended with them."""
    cluster = Hosted(hosts, **environment)
    cluster.start_head()
    for number in WORKERS:
        cluster.start_worker(number)
    cluster.deploy({"bundle": str(BUNDLE), "threads": 1}, replicas=replicas)
    yield cluster
