"""A cluster on isolated hosts, started by the real `ray up` from the shipped on-premises file.

Host 0 is the head, 1 and 2 are workers, and 3 is the user's own machine: the commands run there, in
the checkout, and devices too. The tests' fixture ``launched`` has it up and serving, with replicas
on one or both of the workers; what each method does is what a user would type.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import yaml

from tests.hosts import HOME, ROOT, Hosts

HEAD, WORKERS, USER = 0, (1, 2), 3
BUNDLE = "bundles/fashion-mnist-mix"
# Logical: the hosts share this machine's cores.
WORKER_CPUS = 2
IDLE_S = 10
STREAMS = 1000  # an ordinary limit of open files allows no more than some thousands


def filled_in(hosts: Hosts) -> dict[str, Any]:
    """The shipped file with what docs/launching.md tells a user to change."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster/launch/onprem.yaml").read_text())
    config["provider"]["head_ip"] = hosts.ip(HEAD)
    config["provider"]["worker_ips"] = [hosts.ip(worker) for worker in WORKERS]
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    machine = config["available_node_types"]["local.cluster.node"]
    machine["resources"] = {"CPU": WORKER_CPUS}
    config["idle_timeout_minutes"] = IDLE_S / 60
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[key][-1] = config[key][-1].replace("NBTHREAD=8", "NBTHREAD=1")
        config[key][-1] = config[key][-1].replace("MAXCONN=65536", f"MAXCONN={STREAMS}")
    config["worker_start_ray_commands"][-1] += f" --num-cpus={WORKER_CPUS}"
    return config


def application() -> dict[str, Any]:
    """deployments/serve-cpu.yaml for two workers, impatient in both directions."""
    served: dict[str, Any] = yaml.safe_load((ROOT / "deployments/serve-cpu.yaml").read_text())
    (backbone,) = served["applications"][0]["deployments"]
    served["applications"][0]["args"]["rotate_streams_within_s"] = 2
    backbone["ray_actor_options"]["num_cpus"] = WORKER_CPUS  # so that each worker has room for one
    scaling = backbone["autoscaling_config"]
    scaling["max_replicas"] = len(WORKERS)
    # A replica is trusted with a hundredth of what it can do: a demand that two cores stand.
    scaling["policy"]["policy_kwargs"] |= {
        "headroom": 0.99,
        "lead_s": 5,
        "down_window_s": 5,
        "settle_s": 3,
        "burst_share": 0,
    }
    return served


class Launched:
    """The cluster; see the module.

    Attributes:
        hosts: what it runs on.
        file: the cluster's file, where every host sees it.
        serve: the application's file.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.file = hosts.shared / "onprem.yaml"
        self.serve = hosts.shared / "serve.yaml"
        self.file.write_text(yaml.safe_dump(filled_in(hosts), sort_keys=False))
        self.serve.write_text(yaml.safe_dump(application(), sort_keys=False))

    def prepare(self, *numbers: int) -> None:
        """Put the packages on hosts: a virtual environment where the file looks for one."""
        for number in numbers:
            self.hosts.run(number, f"ln -sfn {sys.prefix} {HOME}/datamix-env")

    def up(self) -> None:
        """`datamix up`: ray up, serve deploy."""
        self.datamix(f"up {self.file} --serve {self.serve} --yes", timeout_s=240)

    def down(self) -> None:
        """`datamix down`: ray down."""
        self.datamix(f"down {self.file} --yes", timeout_s=120)

    def url(self, number: int) -> str:
        """A node's front door."""
        return f"http://{self.hosts.ip(number)}:8000"

    def datamix(self, words: str, timeout_s: float = 120) -> str:
        """Run a `datamix` command on the user's machine, in the checkout."""
        return self.hosts.run(USER, self._line(words), timeout_s)

    def start_datamix(self, words: str) -> subprocess.Popen[str]:
        """Start one, as :meth:`tests.hosts.Hosts.start` does."""
        return self.hosts.start(USER, self._line(words))

    def answers(self, number: int) -> bool:
        """Whether a node's front door has a replica behind it that is ready."""
        probe = f"curl -sf -m 2 {self.url(number)}/v2/health/ready >/dev/null && echo yes || true"
        return self.hosts.run(USER, probe).strip() == "yes"

    def nodes(self) -> list[int]:
        """The hosts whose Ray has joined and is alive, by the head's own account."""
        said = self.hosts.run(HEAD, "curl -sf -m 10 'http://127.0.0.1:8265/nodes?view=summary'")
        alive = {
            node["raylet"]["nodeManagerAddress"]
            for node in json.loads(said)["data"]["summary"]
            if node["raylet"]["state"] == "ALIVE"
        }
        return [number for number in (HEAD, *WORKERS) if self.hosts.ip(number) in alive]

    def fleet(self, name: str, doors: list[int], rate: float, seconds: float) -> Fleet:
        """Let verified devices loose on front doors, for so many inferences per second."""
        return Fleet(self, name, doors, rate, seconds)

    def _line(self, words: str) -> str:
        # PYTHONPATH: what is tried is this checkout, whichever one is installed.
        return f"cd {ROOT} && PYTHONPATH={ROOT} {sys.executable} -m cluster {words}"


class Fleet:
    """`datamix simulate --verify` on the user's machine, under way."""

    def __init__(
        self, cluster: Launched, name: str, doors: list[int], rate: float, seconds: float
    ) -> None:
        self._report = cluster.hosts.shared / f"{name}.json"
        urls = " ".join(f"--url {cluster.url(door)}" for door in doors)
        self._hosts = cluster.hosts
        self._seconds = seconds
        self._process = cluster.start_datamix(
            f"simulate {urls} --bundle {BUNDLE} --verify --devices 30 --rate {rate} "
            f"--duration {seconds} --json {self._report}"
        )

    def ended(self, now: bool = False) -> dict[str, Any]:
        """The report, once it is done, or ``now``, as after Ctrl-C."""
        if now:
            os.killpg(self._process.pid, signal.SIGINT)
        try:
            out, err = self._process.communicate(timeout=self._seconds + 60)
        finally:
            self._hosts.stop(self._process)
        if not self._report.exists():
            raise AssertionError(f"the fleet wrote no report: {out[-2000:]}{err[-2000:]}")
        report: dict[str, Any] = json.loads(self._report.read_text())
        return report


def until(look: Callable[[], object], what: str, timeout_s: float) -> float:
    """Wait until ``look`` finds something; how long that took, in seconds."""
    started_s = time.monotonic()
    while not look():
        if time.monotonic() - started_s > timeout_s:
            raise AssertionError(f"waited {timeout_s} s for {what} in vain")
        time.sleep(0.5)
    return time.monotonic() - started_s


__all__ = ["BUNDLE", "HEAD", "USER", "WORKERS", "Fleet", "Launched", "until"]
