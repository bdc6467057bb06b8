"""What does a request cost whoever generates it, with this fleet and with other load generators?

All send 33 kB messages to one server, an idle backbone of ours, at one rate over as many
connections, in turn, medians over rounds. What counts is the processor time of a generator's whole
tree of processes, and the requests that the server has counted meanwhile.

The fleet holds a stream per device, spells a number into each message and compares each answer bit
by bit. The others post one file and look at no answer; aiohttp also by WebSocket. With a bundle,
the fleet also sends precomputed mixtures of it to a second server, which computes them.

wrk is Debian's; the Python peers live in an environment of their own, see
benchmarks/peers/generators-requirements.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import accounting, clusters, report
from datamix import wire
from datamix.bundle import read_manifest

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks/peers"
ROWS, SHAPE = 4, (64, 8, 8)
LEAST_REQUESTS = 200
FLEET, STOCK = "fleet, stream, every answer compared", "fleet, stream, precomputed mixtures"
# Name on the command line -> title in the table.
ARMS = {
    "fleet": FLEET,
    "wrk": "wrk, POST",
    "aiohttp-stream": "aiohttp script, WebSocket",
    "aiohttp-post": "aiohttp script, POST",
    "locust-fast": "Locust, FastHttpUser, POST",
    "locust": "Locust, HttpUser, POST",
    "stock": STOCK,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms have in common.

    Attributes:
        url: base URL of the server.
        model: its model.
        body: file with the message.
        rate: requests per second.
        connections: open at once.
        peers: the interpreter of the Python peers.
        bundle: of the arm ``stock``.
    """

    url: str
    model: str
    body: Path
    rate: float
    connections: int
    peers: Path
    bundle: str


@dataclass(frozen=True, slots=True)
class Run:
    """One arm's turn: processor seconds and requests in the same measured time."""

    cpu_s: float
    requests: int
    seconds: float

    @property
    def us(self) -> float:
        """Processor time per request, in microseconds."""
        return self.cpu_s / self.requests * 1e6


def command(arm: str, at: Setting, seconds: float) -> tuple[list[str], dict[str, str]]:
    """How to start an arm, and what its environment needs besides, for a run of ``seconds``."""
    path = f"/v2/models/{at.model}/infer"
    stream = f"ws{at.url.removeprefix('http')}/v2/models/{at.model}/stream"
    many, rate = str(at.connections), str(at.rate)
    body = {"DATAMIX_BODY": str(at.body)}
    match arm:
        case "fleet" | "stock":
            work = ["--workload", "echo"]
            if arm == "stock":
                inferences = at.rate / len(read_manifest(at.bundle).blocks)
                work, rate = ["--bundle", at.bundle, "--precompute", "32"], str(inferences)
            return [
                *(sys.executable, "-m", "cluster.cli", "simulate", "--url", at.url, *work),
                *("--devices", many, "--rate", rate, "--duration", str(seconds)),
            ], {"PYTHONPATH": str(ROOT)}
        case "wrk":
            pause = {"DATAMIX_PAUSE_MS": str(round(at.connections / at.rate * 1e3))}
            return [
                *("wrk", "-t1", f"-c{many}", f"-d{seconds:.0f}s", "--timeout", "10s"),
                *("-s", str(PEERS / "wrk_post.lua"), at.url + path),
            ], body | pause
        case "locust" | "locust-fast":
            each = {"DATAMIX_RATE_EACH": str(at.rate / at.connections), "DATAMIX_PATH": path}
            return [
                *(str(at.peers), "-m", "locust", "-f", str(PEERS / "locust_post.py"), "--headless"),
                *("-u", many, "-r", many, "-H", at.url, "-t", f"{seconds:.0f}s", "--only-summary"),
                "Fast" if arm == "locust-fast" else "Plain",
            ], body | each
        case _:
            kind = arm.removeprefix("aiohttp-")
            where = stream if kind == "stream" else at.url + path
            return [
                *(str(at.peers), str(PEERS / "aiohttp_load.py"), kind, where, str(at.body)),
                *(rate, many, str(seconds)),
            ], {}


def served_rows(url: str) -> int:
    """Rows that the only replica has computed so far."""
    with urllib.request.urlopen(f"{url}/v2/stats", timeout=10) as answer:
        return int(json.load(answer)["rows"])


def measure(arm: str, at: Setting, rows_each: int, warm_s: float, run_s: float) -> Run:
    """Give an arm its turn.

    Raises:
        RuntimeError: it sent next to nothing, or ended early.
    """
    started, more = command(arm, at, warm_s + run_s + 5)
    mark = f"generator-{arm}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            started,
            env=accounting.environment(mark) | more,
            cwd=PEERS,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for_load(at.url, process, rows_each)
            time.sleep(warm_s)
            first, before, start = served_rows(at.url), accounting.snapshot(mark), time.monotonic()
            time.sleep(run_s)
            last, after, end = served_rows(at.url), accounting.snapshot(mark), time.monotonic()
            requests = (last - first) // rows_each
            if process.poll() is not None or requests < LEAST_REQUESTS:
                log.seek(0)
                said = log.read()[-1000:].decode(errors="replace")
                raise RuntimeError(f"{arm} sent {requests} requests; it said: {said}")
        finally:
            left = accounting.processes(mark)
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=5)
            process.wait(5)
    return Run(sum(accounting.spent_s(before, after).values()), requests, end - start)


def _wait_for_load(url: str, process: subprocess.Popen[bytes], rows_each: int) -> None:
    """Wait until an arm has begun: a fleet reads a bundle first, Locust starts slowly."""
    idle, deadline = served_rows(url), time.monotonic() + 90
    while served_rows(url) < idle + 20 * rows_each:
        if process.poll() is not None or time.monotonic() > deadline:
            return  # told by who counts the requests
        time.sleep(0.2)


@contextlib.contextmanager
def setting(options: Any, stock: bool) -> Iterator[tuple[Setting, int]]:
    """A server for all arms, or the one that computes a bundle's mixtures; and rows per request."""
    features = np.random.default_rng(1).standard_normal((ROWS, *SHAPE), np.float32)
    # 16 streams and the rest of Ray on two cores: what is measured is the generator.
    served: dict[str, Any] = {"engine": "null", "echo_shape": SHAPE}
    model, rows = "echo", ROWS
    if stock:
        manifest = read_manifest(options.bundle)
        served, model, rows = {"bundle": options.bundle}, manifest.name, manifest.group_size
    with (
        tempfile.TemporaryDirectory(prefix="dmx-") as folder,
        clusters.start("ours", **served) as url,
    ):
        body = Path(folder) / "body"
        body.write_bytes(wire.encode_request(features, request_id="0" * 16))
        rate = options.stock_rate if stock else options.rate
        peers = options.peers / "bin" / "python"
        yield Setting(url, model, body, rate, options.connections, peers, options.bundle), rows


def row(arm: str, runs: list[Run]) -> dict[str, Any]:
    """An arm's row of the table: medians over its rounds."""

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, runs))

    each = [run.us for run in runs]
    return {
        "generator": ARMS[arm],
        "CPU us per request": statistics.median(each),
        "lowest": min(each),
        "highest": max(each),
        "requests/s": median(lambda run: run.requests / run.seconds),
        "cores": median(lambda run: run.cpu_s / run.seconds),
    }


def peers_versions(python: Path) -> dict[str, str]:
    """Releases of the Python peers, and of wrk."""
    code = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in ('aiohttp', 'locust')}))"
    )
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(output.stdout)
    said = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"wrk \S*?([0-9][^ ]*)", said)
    return found | {"wrk": release[1] if release else "unknown"}


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--rate", type=float, default=1000, help="requests per second")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time of a turn")
    parser.add_argument("--warm", type=float, default=2.0, help="time of a turn before that")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv.generators")
    parser.add_argument("--bundle", default=str(ROOT / "bundles/fashion-mnist-mix"))
    parser.add_argument(
        "--stock-rate", type=float, default=200, help="requests per second of precomputed mixtures"
    )
    options = parser.parse_args()
    options.bundle = os.path.abspath(options.bundle)
    options.peers = options.peers.absolute()
    python = options.peers / "bin" / "python"
    others = set(options.only) - {"fleet", "stock"}
    if others and not (python.exists() and shutil.which("wrk")):
        parser.error(
            f"{python} or wrk is not there, expected both as "
            "benchmarks/peers/generators-requirements.txt says (--only fleet stock runs without)"
        )
    runs: dict[str, list[Run]] = {arm: [] for arm in options.only}
    for stock in (False, True):
        arms = [arm for arm in options.only if (arm == "stock") == stock]
        if not arms:
            continue
        with setting(options, stock) as (at, rows_each):
            for number in range(options.rounds):
                first = number % len(arms)
                for arm in arms[first:] + arms[:first]:
                    run = measure(arm, at, rows_each, options.warm, options.seconds)
                    runs[arm].append(run)
                    print(f"round {number + 1}: {arm}: {run.us:,.0f} us", flush=True)
    rows = {arm: row(arm, each) for arm, each in runs.items()}
    us = {arm: each["CPU us per request"] for arm, each in rows.items()}
    figures: dict[str, float] = {f"{arm.replace('-', '_')}_us": value for arm, value in us.items()}
    if "fleet" in us:
        locusts = [us[arm] for arm in ("locust", "locust-fast") if arm in us]
        if locusts:
            figures["cheapest_locust_over_fleet"] = min(locusts) / us["fleet"]
        for arm in sorted(others - {"locust", "locust-fast"}):
            figures[f"{arm.replace('-', '_')}_over_fleet"] = us[arm] / us["fleet"]
    report.show(
        f"33 kB messages, {options.connections} connections, {options.rate:g} requests/s",
        list(rows.values()),
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s, in turn",
            "processor time of the whole tree of processes, in which the fleet has its parent, its "
            "live view and its questions about the server's statistics",
            "requests as the server counts them, in the same time",
            "wrk and Locust wait for each connection's answer before they send again, so they keep "
            "to the rate only where answers are quick; fleet and scripts send when it is time",
            "precomputed mixtures: "
            f"{Path(options.bundle).name}, {options.stock_rate:g} requests/s, on a server that "
            "computes them; each answer is compared value by value",
        ],
        options.json,
        packages=peers_versions(python) if others else None,
        **figures,
    )


if __name__ == "__main__":
    main()
