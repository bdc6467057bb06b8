"""How many threads should a forward have, and how should they wait, where cores are shared?

The default engine on the demo's first block, each arm in processes of its own: threads that spin at
the end of a layer (what OpenMP does by default), or sleep; alone, and beside processes that want a
core for themselves, as an event loop, a proxy or other replicas do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import report
from deployments.cores import usable_cores

SIZES = (4, 32, 128)


def worker(threads: int, seconds: float) -> None:
    """One process: rows per second at each batch size, as one line of JSON."""
    from benchmarks import engine
    from cluster.demo import default_bundle

    case = engine.cases(default_bundle())[0]
    arm = engine.make(case, {}, None, threads)
    found = {}
    for size in SIZES:
        arm.rows_per_s.clear()
        engine.measure(arm, engine.requests(case, size), size, seconds)
        found[str(size)] = arm.rows_per_s[0]
    print(json.dumps(found))


def _busy() -> None:
    while True:
        time.perf_counter()


def run(threads: int, policy: str, neighbours: int, seconds: float) -> dict[str, float]:
    """One arm once."""
    others = [multiprocessing.Process(target=_busy, daemon=True) for _ in range(neighbours)]
    for other in others:
        other.start()
    ours = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environ = {key: value for key, value in os.environ.items() if key not in ours}
    if policy == "sleep":
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.threads", "--worker", str(threads), str(seconds)],
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.join()
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per batch size and round")
    options = parser.parse_args()
    cores = usable_cores({})
    arms = [(1, "sleep")] + [(cores, policy) for policy in ("spin", "sleep") if cores > 1]
    found: dict[tuple[int, int, str], list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for neighbours in (0, 1, cores):
            for threads, policy in arms:
                found.setdefault((neighbours, threads, policy), []).append(
                    run(threads, policy, neighbours, options.seconds)
                )
        print(f"round {number + 1} of {options.rounds} done", flush=True)
    rows: list[dict[str, Any]] = [
        {"busy neighbours": neighbours, "threads": threads, "waiting threads": policy}
        | {
            f"rows/s at {size} rows": statistics.median(run[str(size)] for run in runs)
            for size in SIZES
        }
        for (neighbours, threads, policy), runs in found.items()
    ]
    medians = {
        key: statistics.geometric_mean([run[str(size)] for run in runs for size in SIZES])
        for key, runs in found.items()
    }
    figures: dict[str, Any] = {}
    if cores > 1:
        for neighbours in (0, 1, cores):
            sleeping = medians[neighbours, cores, "sleep"]
            figures[f"sleep_over_spin_{neighbours}_neighbours"] = (
                sleeping / medians[neighbours, cores, "spin"]
            )
            figures[f"all_cores_over_one_thread_{neighbours}_neighbours"] = (
                sleeping / medians[neighbours, 1, "sleep"]
            )
    report.show(
        f"the default engine on {cores} cores",
        rows,
        [f"medians of {options.rounds} rounds of {options.seconds:g} s, arms in turn"],
        options.json,
        **figures,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
