"""What do devices see when a host of the cluster fails, or the network between its hosts?

A head that computes nothing and two workers with a replica each, on isolated hosts of one machine
(tests/hosts.py), under a fleet on a fourth whose every answer is verified. Needs root.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import report
from benchmarks.failures import CUT_S, Struck, row
from benchmarks.hosted import DEVICES, HEAD, WORKERS, Hosted, hosted
from benchmarks.operated import Seen, until
from tests.hosts import Hosts

REPLICAS = 2
_RAYLET, _GCS = r"/raylet$", r"/gcs_server$"
REDIS_PORT = 6399


def kill_raylet(cluster: Hosted) -> Struck:
    """kill -9 of the raylet of a worker: the node is lost, and what ran there."""
    number, before = cluster.worker_with_replica(), cluster.running()
    at_s = cluster.kill(number, _RAYLET)
    cluster.until_replaced(before)
    struck = Struck(at_s, time.monotonic() - at_s)
    cluster.run(number, "ray stop --force")
    cluster.start_worker(number)
    return struck


def power_off(cluster: Hosted) -> Struck:
    """A worker without power: nothing says goodbye."""
    number, before = cluster.worker_with_replica(), cluster.running()
    cluster.hosts.power_off(number)
    at_s = time.monotonic()
    cluster.until_replaced(before)
    struck = Struck(at_s, time.monotonic() - at_s)
    cluster.hosts.power_on(number)
    cluster.start_worker(number)
    return struck


def cut_worker(cluster: Hosted) -> Struck:
    """A worker without network for a while."""
    number = cluster.worker_with_replica()
    at_s = time.monotonic()
    cluster.hosts.cut(number)
    time.sleep(CUT_S)
    cluster.hosts.mend(number)
    until(lambda: len(cluster.running()) == REPLICAS)
    return Struck(at_s, time.monotonic() - at_s)


def cut_devices(cluster: Hosted) -> Struck:
    """The devices without network for a while."""
    at_s = time.monotonic()
    cluster.hosts.cut(DEVICES)
    time.sleep(CUT_S)
    cluster.hosts.mend(DEVICES)
    return Struck(at_s, time.monotonic() - at_s)


def fill_disk(cluster: Hosted) -> Struck:
    """A worker's disk is full, and then its replica is killed: another must start there or not."""
    number, before = cluster.worker_with_replica(), cluster.running()
    cluster.hosts.run(number, "dd if=/dev/zero of=/tmp/fill bs=1M", check=False)
    at_s = time.monotonic()
    time.sleep(5)
    killed_s = cluster.kill(number, r"^ray::ServeReplica")
    cluster.until_replaced(before)
    back_s = time.monotonic() - killed_s
    cluster.hosts.run(number, "rm /tmp/fill")
    return Struck(at_s, back_s)


def kill_head(cluster: Hosted) -> Struck:
    """kill -9 of all of Ray on the head, and the head is started again with the same Redis."""
    before = cluster.running()
    at_s = cluster.kill(HEAD, r"raylet$|gcs_server$|^ray::|dashboard|python")
    cluster.run(HEAD, "ray stop --force")
    time.sleep(5)  # without a head
    cluster.start_head()
    until(lambda: cluster.running() == before)
    return Struck(at_s, time.monotonic() - at_s)


Strike = Callable[[Hosted], Struck]

FAILURES: dict[str, Strike] = {
    "kill -9 of a worker's raylet": kill_raylet,
    "power-off of a worker": power_off,
    "10 s without network at a worker": cut_worker,
    "10 s without network at the devices": cut_devices,
    "full disk on a worker, and its replica killed": fill_disk,
}
HEAD_FAILURE = "kill -9 of the whole head, with Redis"


def strike(cluster: Hosted, work: Strike, **settings: Any) -> tuple[Seen, Struck]:
    """Let one failure happen under load."""
    with cluster.fleet(**settings) as fleet:
        fleet.wait_running()
        struck = work(cluster)
        return fleet.seen(), struck


@contextlib.contextmanager
def with_redis(hosts: Hosts) -> Iterator[Hosted]:
    """A cluster whose head keeps its state in a Redis on the devices' host."""
    address = f"{hosts.ip(DEVICES)}:{REDIS_PORT}"
    redis = hosts.start(
        DEVICES, f"redis-server --port {REDIS_PORT} --bind 0.0.0.0 --protected-mode no --save ''"
    )
    try:
        with hosted(
            hosts, RAY_REDIS_ADDRESS=address, RAY_external_storage_namespace="datamix"
        ) as cluster:
            yield cluster
    finally:
        hosts.stop(redis)


def strike_head(cluster: Hosted, **settings: Any) -> tuple[Seen, Struck]:
    """Kill the head under load at the workers' front doors, and start it again."""
    doors = [cluster.door(number) for number in WORKERS]
    return strike(cluster, kill_head, urls=doors, **settings)


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--rate", type=float, default=20.0, help="inferences per second")
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load for each failure")
    parser.add_argument("--only", action="append", choices=[*FAILURES, HEAD_FAILURE])
    options = parser.parse_args()
    chosen = options.only or [*FAILURES, HEAD_FAILURE]
    load = {"rate": options.rate, "devices": options.devices, "duration": options.seconds}
    rows = []

    def add(name: str, seen: Seen, struck: Struck) -> None:
        rows.append(row(name, seen, struck))
        print(rows[-1], seen.summary.failed, flush=True)

    if any(name in FAILURES for name in chosen):
        with Hosts() as hosts:
            hosts.up(4)
            with hosted(hosts) as cluster:
                for name, work in FAILURES.items():
                    if name in chosen:
                        cluster.spread()
                        add(name, *strike(cluster, work, **load))
    if HEAD_FAILURE in chosen:
        with Hosts() as hosts:
            hosts.up(4)
            with with_redis(hosts) as cluster:
                add(HEAD_FAILURE, *strike_head(cluster, **load))
    report.show(
        f"A head and two workers with a replica of fashion-mnist-mix each, on isolated hosts of "
        f"one machine, {options.devices} devices, {options.rate:g} inferences per second of 2 "
        "requests each",
        rows,
        [
            "devices know the head's front door; where the head is killed, the workers'",
            "wrong, lost, recovery_s as in failures; back_s: until two replicas ran again, or the "
            "network, or the controller with all replicas",
        ],
        options.json,
        requests=float(sum(each["requests"] for each in rows)),
        wrong=float(sum(each["wrong"] for each in rows)),
        lost=float(sum(each["lost"] for each in rows)),
    )


if __name__ == "__main__":
    main()
