"""Does a cloud of n replicas carry n times what one carries, and what is the limit if not?

    python -m benchmarks.scale_out [--json FILE]

Engines are emulated: they sleep as long as a GPU would compute, so that this machine's cores are
left to what scales out or does not, the front door, the event loops and Ray. A closed loop keeps
every replica saturated. Two engines take turns: a slow one, with which all replicas together need
less than this machine has, and a fast one, with which they soon need more.

*Share of linear* is the throughput over n times that of one replica with the same engine. The
processor time of HAProxy per message tells what one of its threads can carry, on any machine.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks import accounting, clusters, report
from edge.fleet.config import FleetConfig
from edge.fleet.run import simulate

SHAPE, ROWS = (64, 8, 8), 4
BATCH_ROWS = 64
# A batch in the engine, one behind it, and one more for streams that do not spread evenly.
DEVICES_EACH = 3 * BATCH_ROWS // ROWS
SATURATED = 0.95


@dataclass(frozen=True, slots=True)
class Engine:
    """Sleeps ``a_s + b_s * rows`` per batch."""

    name: str
    a_s: float
    b_s: float

    @property
    def most(self) -> float:
        """Requests per second of one, with full batches."""
        return BATCH_ROWS / ROWS / (self.a_s + self.b_s * BATCH_ROWS)


ENGINES = (Engine("slow", 0.04, 0.002), Engine("fast", 0.004, 0.0001))


def measure(engine: Engine, replicas: int, seconds: float, warm_s: float) -> dict[str, Any]:
    """Saturate so many replicas.

    Raises:
        RuntimeError: an answer was wrong.
    """
    with clusters.start(
        "ours",
        engine=f"emulated:{engine.a_s},{engine.b_s}",
        echo_shape=SHAPE,
        max_batch_rows=BATCH_ROWS,
        max_request_rows=ROWS,
        replicas=replicas,
        # Streams are spread when they open; replicas that came later would have them spread anew.
        rotate_streams_within_s=None,
    ) as url:
        time.sleep(warm_s)  # HAProxy hears of the last replicas
        config = FleetConfig(
            url,
            workload="echo",
            rows=ROWS,
            devices=replicas * DEVICES_EACH,
            duration_s=seconds + warm_s,
            warm_up_s=warm_s,
            pacer="closed:think_s=0",
            connect_timeout_s=120,
        )
        before, start = accounting.snapshot("ours"), time.monotonic()
        mine = psutil.Process().cpu_times()
        idle = psutil.cpu_times().idle
        summary = simulate(config)
        took_s = time.monotonic() - start
        idle_s = psutil.cpu_times().idle - idle
        spent = accounting.spent_s(before, accounting.snapshot("ours"))
        own = psutil.Process().cpu_times()
    if summary.wrong or summary.misrouted or summary.duplicates:
        raise RuntimeError(f"{summary.wrong} wrong answers, expected none")
    generator_s = (
        own.user + own.system + own.children_user + own.children_system
        - mine.user - mine.system - mine.children_user - mine.children_system
    )  # fmt: skip
    messages = max(1, summary.requests)
    haproxy_s = sum(s for kind, s in spent.items() if "haproxy" in kind)
    return {
        "engine": engine.name,
        "replicas": replicas,
        "requests/s": summary.throughput,
        "of engines' most": summary.throughput / (replicas * engine.most),
        "share of linear": math.nan,
        "HAProxy us": 1e6 * haproxy_s / messages,
        "rest of the cloud us": 1e6 * (sum(spent.values()) - haproxy_s) / messages,
        "generator us": 1e6 * generator_s / messages,
        "machine busy": 1 - idle_s / (took_s * (os.cpu_count() or 1)),
        "failed": sum(summary.failed.values()),
    }


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--warm", type=float, default=4)
    parser.add_argument("--engines", nargs="+", choices=[e.name for e in ENGINES])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for engine in ENGINES:
        if options.engines and engine.name not in options.engines:
            continue
        of_one = None
        for replicas in options.replicas:
            row = measure(engine, replicas, options.seconds, options.warm)
            of_one = of_one or row["requests/s"] / replicas
            row["share of linear"] = row["requests/s"] / (replicas * of_one)
            rows.append(row)
            print(row, flush=True)
            if row["machine busy"] > SATURATED and len(rows) > 1:
                break  # more replicas only share the same cores
        mine = [row for row in rows if row["engine"] == engine.name]
        free = [row for row in mine if row["machine busy"] <= SATURATED]
        if free:
            figures[f"{engine.name}_least_share_of_linear"] = min(
                row["share of linear"] for row in free
            )
            figures[f"{engine.name}_most_replicas_with_cores_left"] = free[-1]["replicas"]
        figures[f"{engine.name}_most_requests_per_s"] = max(row["requests/s"] for row in mine)
    door_us = min(row["HAProxy us"] for row in rows)
    figures["front_door_messages_per_s_and_thread"] = 1e6 / door_us
    report.show(
        f"Replicas side by side, {ROWS} rows of 33 kB in all per request, batches of {BATCH_ROWS}",
        rows,
        [
            "one machine carries generator, front door, replicas and Ray; a share of linear below "
            f"one means something only where the machine is busy below {SATURATED:.0%}",
            f"{DEVICES_EACH} devices per replica in a closed loop, every answer compared",
            "messages per second and thread of a front door: one over HAProxy's processor time",
        ],
        options.json,
        **figures,
    )


if __name__ == "__main__":
    main()
