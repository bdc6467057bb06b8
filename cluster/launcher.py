"""`datamix up|down|status`: `ray up`, `ray down` and `ray exec`, and no more than that.

Each is a command of Ray's own, run as a child so that one may just as well type it; what it says is
shown as it says it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamix.errors import ConfigError, DataMixError

# Where the files of a cluster's nodes are, by its file_mounts.
HOME = "~/datamix"
_MARK = "-- datamix: applications --"
# As before a start in the clusters' files, which say why.
STOP = "ray stop; pkill -f '[r]ay_haproxy/bin/haproxy' || true"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LaunchError(DataMixError):
    """A command of Ray's has failed; it has said why."""


@dataclass(frozen=True)
class Cluster:
    """A cluster's file, as far as it is of interest here.

    Attributes:
        path: the file.
        name: of the cluster.
        provider: where its machines come from: aws, gcp, local, or a module's name.
        max_workers: the most workers at once.
        machines: where to log in to the workers of provider local, as user@address.
    """

    path: Path
    name: str
    provider: str
    max_workers: int
    machines: tuple[str, ...] = ()


def read_cluster(path: Path) -> Cluster:
    """Read a cluster's file; Ray checks all of it, so this looks at what it shows only.

    Raises:
        ConfigError: it is no such file.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
        provider = content["provider"]
        return Cluster(
            path=path,
            name=str(content["cluster_name"]),
            provider=str(provider.get("module") or provider["type"]),
            max_workers=int(content["max_workers"]),
            machines=tuple(
                f"{content['auth']['ssh_user']}@{address}"
                for address in provider.get("worker_ips", ())
            ),
        )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, expected a file for ray up") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path} is no file for ray up, expected one with cluster_name, provider and "
            "max_workers, such as cluster.yaml"
        ) from None


def up(cluster: Cluster, application: Path | None) -> None:
    """Start or update the cluster, then have it serve what ``application`` says, unless None.

    Raises:
        ConfigError: ``application`` is no file.
        LaunchError: a step failed; those before it stay done.
    """
    if application is not None and not application.is_file():
        raise ConfigError(f"{application} is no file, expected one for serve deploy")
    _ray("up", cluster, "--yes", "--no-config-cache")
    if application is not None:
        remote = f"{HOME}/deployed.yaml"
        _ray("rsync-up", cluster, str(application), remote)
        _ray("exec", cluster, f"serve deploy {remote}")


def down(cluster: Cluster) -> None:
    """Stop the cluster and give its machines back.

    Raises:
        LaunchError: Ray could not.
    """
    if cluster.machines:
        # `ray down` leaves Ray running on workers that nobody terminates. The head has the key.
        _ray("exec", cluster, stop_workers(cluster.machines))
    _ray("down", cluster, "--yes")


def stop_workers(machines: tuple[str, ...]) -> str:
    """The head's command that stops Ray on each worker, all at once, as far as it is reached."""
    login = "ssh -n -i ~/ray_bootstrap_key.pem -o StrictHostKeyChecking=no -o ConnectTimeout=10"
    remote = shlex.quote(f"bash -lic {shlex.quote(STOP)}")
    return " ".join(f"{login} {shlex.quote(machine)} {remote} &" for machine in machines) + " wait"


@dataclass(frozen=True)
class Status:
    """What a cluster says of itself.

    Attributes:
        nodes: `ray status`, as it is.
        applications: by name, what `serve status` says of each.
    """

    nodes: str
    applications: dict[str, Any]

    @property
    def serves(self) -> bool:
        """Whether there are applications, and all of them run."""
        states = [application["status"] for application in self.applications.values()]
        return bool(states) and all(state == "RUNNING" for state in states)

    def __str__(self) -> str:
        """The nodes, then a line for each application and each of its deployments."""
        lines = [self.nodes, ""]
        for name, application in self.applications.items():
            lines.append(f"application {name}: {application['status']}")
            for deployment, found in application["deployments"].items():
                replicas = ", ".join(f"{n} {s}" for s, n in found["replica_states"].items())
                lines.append(f"  {deployment}: {found['status']}, replicas: {replicas or 'none'}")
            if message := application.get("message"):
                lines.append(f"  {message.strip()}")
        if not self.applications:
            lines.append("no application is deployed")
        return "\n".join(lines)


def status(cluster: Cluster) -> Status:
    """Ask the cluster's head.

    Raises:
        LaunchError: it cannot be reached, or Ray does not run there.
    """
    said = _ray("exec", cluster, f"ray status && echo '{_MARK}' && serve status", quiet=True)
    return parse_status(said)


def parse_status(said: str) -> Status:
    """Take apart what :func:`status` was told.

    Raises:
        LaunchError: it is something else.
    """
    import yaml

    said = _COLOURS.sub("", said).replace("\r", "")
    nodes, mark, served = said.partition(f"{_MARK}\n")
    start, rule, rest = nodes.partition("======== Autoscaler status")
    # `serve status` is YAML; what stands around it, such as ssh's goodbye, is not.
    _, key, applications = served.partition("\napplications:")
    lines = [line for line in applications.splitlines() if line.startswith(" ") or not line]
    if not (mark and rule and key):
        raise LaunchError(f"the head said {said[-500:]!r}, expected its status")
    found = yaml.safe_load("\n".join(lines)) or {}
    return Status(nodes=(rule + rest).strip(), applications=found)


def _ray(command: str, cluster: Cluster, *arguments: str, quiet: bool = False) -> str:
    """Run `ray COMMAND FILE ARGUMENTS`; its output if ``quiet``, else it is shown."""
    words = [sys.executable, "-m", "ray.scripts.scripts", command, str(cluster.path), *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE if quiet else None, text=True)
    if done.returncode:
        if quiet:
            print(done.stdout, file=sys.stderr)
        raise LaunchError(
            f"ray {command} {cluster.path} ended with {done.returncode}; it says why above"
        )
    return done.stdout or ""
