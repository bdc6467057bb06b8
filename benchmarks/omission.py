"""Does a stalled cloud show in the report? Open loop, and a closed loop as control.

A server answers at once, but stands still for 2 s in the middle of a run of 30 s. A report that
counts from the schedule has a 99th percentile near 2 s: 1 in 15 inferences fell due in the stall.
A closed loop asked nothing meanwhile, and its 99th percentile does not move.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import report
from datamix import wire
from edge.fleet.closed import closed_loop
from edge.fleet.config import FleetConfig
from edge.fleet.report import percentiles
from edge.fleet.run import simulate
from tests.fake_cloud import Connection, FakeCloud, polite


def _serve(url: Any, stall_s: float, after_s: float) -> None:
    import asyncio

    async def serve() -> None:
        first_s = 0.0
        stalled = False

        def stalling(connection: Connection, request: wire.Request) -> None:
            nonlocal first_s, stalled
            first_s = first_s or time.monotonic()
            if not stalled and time.monotonic() - first_s > after_s:
                stalled = True
                time.sleep(stall_s)
            polite(connection, request)

        cloud = FakeCloud(stalling)
        async with cloud.serve():
            url.send(cloud.url)
            await asyncio.Event().wait()

    asyncio.run(serve())


@contextlib.contextmanager
def stalling_cloud(stall_s: float, after_s: float) -> Iterator[str]:
    """A cloud in a process of its own that stalls once, ``after_s`` after its first request."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, stall_s, after_s), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def row(loop: str, count: int, figures: dict[str, float | None]) -> dict[str, Any]:
    """One loop's line of the table."""
    shown = {
        f"{name} ms": (value if value is not None else float("nan")) * 1e3
        for name, value in figures.items()
    }
    return {"loop": loop, "inferences": str(count), **shown}


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--stall", type=float, default=2.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="inferences/s of the open loop")
    parser.add_argument("--clients", type=int, default=10, help="of the closed loop")
    options = parser.parse_args()
    with stalling_cloud(options.stall, options.seconds / 2) as url:
        summary = simulate(
            FleetConfig(
                url=url, workload="echo", devices=100, rate=options.rate, duration_s=options.seconds
            )
        )
    with stalling_cloud(options.stall, options.seconds / 2) as url:
        run = closed_loop(
            FleetConfig(url=url, workload="echo"),
            lanes=options.clients,
            per_query=1,
            enough=lambda queries, elapsed_s: elapsed_s >= options.seconds,
        )
    closed = percentiles(run.latencies_s)
    report.show(
        f"A server that stands still for {options.stall:g} s in a run of {options.seconds:g} s",
        [
            row("open", summary.inferences, dict(summary.latency_s)),
            row("closed", len(run.queries), dict(closed)),
        ],
        [
            f"open: Poisson, {options.rate:g} inferences/s over 100 devices, counted from the "
            f"schedule; valid: {summary.valid}",
            f"closed: {options.clients} clients, the next question when the last is answered, "
            "counted from the send",
        ],
        options.json,
        open_p99_over_stall=(summary.latency_s["p99"] or 0.0) / options.stall,
        closed_p99_over_stall=(closed["p99"] or 0.0) / options.stall,
    )


if __name__ == "__main__":
    main()
