"""``datamix doctor --address``: the known traps of a running cluster, each with its fix.

:data:`TRAPS` is the one list of them; docs/doctor.md shows it: ``python -m cluster.doctor_cluster``
prints its table. What each looks at is in :mod:`cluster.doctor_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import doctor_checks as checks
from cluster.doctor import PACKAGES, Check
from cluster.doctor_checks import Finding
from datamix.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from cluster.doctor_facts import Facts


@dataclass(frozen=True, slots=True)
class Trap:
    """One check: what it is called, when it fires, what to do then, and the function."""

    name: str
    fires: str
    fix: str
    look: Callable[[Facts], Finding]

    def check(self, facts: Facts) -> Check:
        """Look at the facts."""
        status, found = self.look(facts)
        return Check(self.name, status, found, "" if status == "ok" else self.fix)


def diagnose(
    address: str, *, bundle: str | None = None, devices: int = 2000, timeout_s: float = 30.0
) -> list[Check]:
    """Ask a running cluster and judge what it says.

    Args:
        address: ``auto`` or ``host:port`` of Ray, or ``http://host:port`` of its dashboard.
        bundle: a bundle to look for on every node, beside those that are served; paths are the
            nodes' own.
        devices: how many devices shall be connected at once.
        timeout_s: how long a node may take to answer.

    Raises:
        ConfigError: ``devices`` or ``timeout_s`` makes no sense, or the address is none.
        Unavailable: no cluster answers there.
    """
    from cluster.doctor_facts import Unreachable, facts

    if devices < 1:
        raise ConfigError(f"devices is {devices}, expected at least 1")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ConfigError(f"timeout is {timeout_s:g} s, expected more than 0")
    if "://" in address and not address.startswith(("http://", "https://")):
        raise ConfigError(f"address is {address!r}, expected auto, host:port or http://host:port")
    try:
        gathered = facts(
            address,
            {
                "bundles": [] if bundle is None else [bundle],
                "packages": list(PACKAGES),
                "devices": devices,
                "timeout_s": timeout_s,
            },
        )
    except Unreachable as error:
        raise Unavailable(str(error)) from error
    return judge(gathered)


def judge(facts: Facts) -> list[Check]:
    """Every check, in the order of :data:`TRAPS`."""
    return [trap.check(facts) for trap in TRAPS]


TRAPS = (
    Trap(
        "nodes",
        "a node that Ray counts as alive does not answer in time, or cannot run the question",
        "look at that node (`ray status`, raylet.out); `ray stop` and `ray start` there, or let "
        "the autoscaler replace it",
        checks.nodes_answer,
    ),
    Trap(
        "Serve",
        "Serve, an application, a deployment or a front door is missing or unhealthy",
        "`serve status` says more; `serve deploy deployments/serve.yaml` deploys",
        checks.serve_runs,
    ),
    Trap(
        "HAProxy variables",
        "a mode variable was not `1` when Ray was started on a node: too late, or forgotten there",
        "export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 before `ray start`, "
        "on every node (cluster.yaml), and start Ray there anew: they are read once",
        checks.mode_variables,
    ),
    Trap(
        "Serve's environment",
        "a process of Serve's has other variables than its node's Ray was started with",
        "take them out of the runtime_env, and start Serve anew (`serve shutdown`, `serve deploy`)",
        checks.variables_in_time,
    ),
    Trap(
        "same settings",
        "nodes were started with different RAY_SERVE variables",
        "say the same in head_start_ray_commands and worker_start_ray_commands, and restart",
        checks.same_variables,
    ),
    Trap(
        "HAProxy in front",
        "Serve's Python proxy answers at a front door, or nobody, or something without HAProxy",
        "set both mode variables before `ray start`; `datamix doctor` on that node looks at the "
        "HAProxy binary; HAProxy's output lies beside RAY_SERVE_HAPROXY_SOCKET_PATH",
        checks.haproxy_in_front,
    ),
    Trap(
        "HAProxy's connections",
        "all front doors' maxconn together is below the devices, or one's below its share",
        "export RAY_SERVE_HAPROXY_MAXCONN (Ray's default is 4096) before `ray start`: at least the "
        "devices over the front doors, with room for one that fails",
        checks.connections,
    ),
    Trap(
        "file descriptors",
        "HAProxy may not open the files (2.5 per device) for its share of the devices",
        "raise the hard limit where Ray is started (docker --ulimit nofile, limits.conf)",
        checks.descriptors,
    ),
    Trap(
        "ports to replicas",
        "a front door has fewer local ports than streams to one replica (28,232 by default), as a "
        "single machine soon has",
        "more replicas; or sysctl net.ipv4.ip_local_port_range='32768 65535', a sixth more (below "
        "that are the ports of Ray and its replicas)",
        checks.ports_to_replicas,
    ),
    Trap(
        "HAProxy's threads",
        "HAProxy has more threads than its node has processors",
        "export RAY_SERVE_HAPROXY_NBTHREAD before `ray start`: no more than processors",
        checks.threads,
    ),
    Trap(
        "versions",
        "nodes differ in Python or a package that matters, or one where replicas run lacks it",
        "one image for all nodes, and pip with constraints.txt",
        checks.versions,
    ),
    Trap(
        "code",
        "nodes have different `datamix` or `deployments`, or lack them where they are needed",
        "sync the folders again (`ray up` does) and set PYTHONPATH before `ray start`",
        checks.code,
    ),
    Trap(
        "bundles",
        "a bundle is missing, damaged or another one on a node where replicas may run",
        "copy the bundle anew to every node, or serve it from one URI (s3://, gs://)",
        checks.bundles,
    ),
    Trap(
        "clocks",
        "a node's clock is off by more than 1 s (5 min: fails)",
        "run an NTP client (chrony) on every node",
        checks.clocks,
    ),
    Trap(
        "GPU drivers",
        "Ray counts a GPU on a node that has no NVIDIA driver",
        "take an image with the driver, run the container with GPUs, or correct the resources",
        checks.gpu_drivers,
    ),
    Trap(
        "ports",
        "somebody else listens at Serve's port on a node",
        "end who listens there, or choose another port in serve.yaml",
        checks.ports,
    ),
    Trap(
        "token mode",
        "RAY_AUTH_MODE is not set where a token file turns authentication on, or nodes differ",
        "export RAY_AUTH_MODE=disabled or =token before `ray start`, the same on every node",
        checks.token_mode,
    ),
    Trap(
        "disk",
        "less than 1 GiB free under Ray's session folder (fails), or less than 5%",
        "free some, give nodes a larger volume, or point RAY_TMPDIR elsewhere",
        checks.disks,
    ),
    Trap(
        "shared memory",
        "/dev/shm is smaller than 100 MiB, as in a container that was not told otherwise",
        "docker --shm-size, or an emptyDir of medium Memory on Kubernetes",
        checks.shared_memory,
    ),
    Trap(
        "streams per replica",
        "max_ongoing_requests is Ray's default of 5 (fails), or all replicas' is below the devices",
        "max_ongoing_requests: 100000 in serve.yaml; a stream is one for as long as it is open",
        checks.ongoing_requests,
    ),
    Trap(
        "health checks",
        "a deployment is looked at every 10 s or less often, Ray's default",
        "health_check_period_s: 1 and health_check_timeout_s: 10 in serve.yaml",
        checks.health_checks,
    ),
    Trap(
        "autoscaling",
        "Serve's own policy, which counts streams; or delays on top of PredictedWait",
        "policy_function: deployments.policy:PredictedWait, both delays 0 (docs/autoscaling.md)",
        checks.autoscaling,
    ),
    Trap(
        "HTTP host",
        "Serve listens on a loopback address, and there are several nodes",
        "http_options: {host: 0.0.0.0} in serve.yaml, and `serve shutdown` before the next deploy",
        checks.http_host,
    ),
    Trap(
        "draining",
        "a draining period of less than 5 s, which is for tests, on several nodes",
        "do not export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
        checks.draining,
    ),
    Trap(
        "device's code",
        "`edge` can be imported on a node: it handles the secrets, and the cloud needs none of it",
        "keep edge/ away from the nodes (file_mounts of cluster.yaml, .rayignore)",
        checks.device_code,
    ),
    Trap(
        "device's weights",
        "device.safetensors or an ONNX file lies in a bundle on a node",
        "leave them out where bundles are copied (rsync_exclude of cluster.yaml, .rayignore)",
        checks.device_weights,
    ),
)


def table() -> str:
    """The checks as the table of docs/doctor.md."""
    rows = [f"| {trap.name} | {trap.fires} | {trap.fix} |" for trap in TRAPS]
    return "\n".join(["| check | fires when | fix |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
