"""How long from `ray up` to the first answered request, where the packages are on the machines?

On isolated hosts of this machine (tests/hosts.py): a head, two workers, and the user's own, from
which the shipped on-premises file is started as the tests do it (tests/launched.py). All share this
machine's cores, so what real machines do side by side takes turns here. Then a verified fleet asks
through both front doors, and the cluster is taken down.

python -m benchmarks.ray_up --json docs/benchmarks/ray_up.json       # as root
"""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

from benchmarks import report
from tests.hosts import Hosts, why_not
from tests.launched import HEAD, USER, WORKERS, Launched, until

FLEET = {"rate": 10.0, "seconds": 10.0}


def measure(hosts: Hosts) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The steps with their seconds, and what the fleet saw."""
    rows: list[dict[str, Any]] = []
    begun_s = time.monotonic()

    def done(step: str) -> None:
        at_s = time.monotonic() - begun_s
        before_s = rows[-1]["after, s"] if rows else 0.0
        rows.append({"step": step, "seconds": at_s - before_s, "after, s": at_s})

    cluster = Launched(hosts)
    cluster.prepare(HEAD, *WORKERS)
    begun_s = time.monotonic()
    cluster.up()
    done("datamix up: the head runs, the application is deployed")
    until(lambda: len(cluster.nodes()) > 1, "a worker", 300)
    done("the autoscaler has started a worker")
    until(lambda: cluster.answers(HEAD), "the first answer", 300)
    done("a request is answered through the head's front door")
    seen = cluster.fleet("ray_up", [HEAD, WORKERS[0]], **FLEET).ended()
    begun_s = time.monotonic() - rows[-1]["after, s"]
    cluster.down()
    until(lambda: not any(map(hosts.processes, (HEAD, *WORKERS, USER))), "the end of all", 60)
    done("datamix down: no process is left (counted from its start)")
    return rows, seen


def main() -> None:
    arguments = report.parser(__doc__).parse_args()
    if reason := why_not():
        sys.exit(f"benchmarks.ray_up: {reason}")
    load = os.getloadavg()[0]
    with Hosts() as hosts:
        hosts.up(4)
        rows, seen = measure(hosts)
    # Of all that ran on the hosts: what processes used is handed on to who waits for them.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report.show(
        "from `ray up` to the first answered request, on isolated hosts",
        rows,
        [
            "four hosts on the cores of one machine, packages in place: pip checks them only",
            f"{load:.1f} processes wanted a processor when it began (the load average); this run's "
            f"had the nice value {os.nice(0)}",
            f"then {seen['ok']} inferences through two front doors, each answer verified",
        ],
        arguments.json,
        first_answer_s=rows[2]["after, s"],
        up_s=rows[0]["seconds"],
        down_s=rows[3]["seconds"],
        failed=float(sum(seen["failed"].values()) + seen["unsent"]),
        wrong=float(seen["wrong"]),
        cpu_s=used.ru_utime + used.ru_stime,
    )


if __name__ == "__main__":
    main()
