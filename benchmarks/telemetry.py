"""What do metrics and traces cost a message, a scrape a node, and is a shown utilisation true?

- A replica of an idle backbone that in turns records nothing, records its metrics, and traces one
  message in 100 besides, in one process under one load: its CPU time per message, each turn against
  its neighbours. What metrics cost while nothing comes is measured beside that, on two replicas.
- A node with eight emulated replicas: how long its agent takes to answer a scrape, and how many
  series come, all of them and those that the shipped configurations keep.
- An emulated engine at three loads: the rate of datamix_engine_busy_seconds_total between two
  scrapes of Ray's agent, beside a clock around the engine itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import clusters, load, report
from benchmarks.telemetry_app import SETTLING_S, TURN_S, TURNS
from datamix import wire
from edge.fleet.config import FleetConfig
from edge.fleet.run import simulate

SHAPE = (64, 8, 8)
SMALL = (4, 2, 2)
A_S, B_S = 0.02, 0.002
ENGINE = f"emulated:{A_S},{B_S}"
ROWS, MAX_BATCH_ROWS = 4, 32
CONFIGURATION = Path(__file__).parents[1] / "cluster/monitoring/prometheus.yml"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REPORT_S = 10.0  # between two reports of a process to its agent, as Ray has it
LAG_S = 3.0  # with a report each second: from a replica's totals to what its node's agent serves


def stats(url: str) -> dict[str, Any]:
    """Statistics of the replica behind ``url``."""
    with urllib.request.urlopen(f"{url}/v2/stats", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def scrape(url: str) -> str:
    """What a node's agent serves."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def names(text: str) -> list[str]:
    """The name of each series in a scrape."""
    return [re.split("[{ ]", line)[0] for line in text.splitlines() if line[:1].isalpha()]


def kept(all_names: list[str]) -> list[str]:
    """Those that the shipped configurations keep."""
    jobs = {
        job["job_name"]: job for job in yaml.safe_load(CONFIGURATION.read_text())["scrape_configs"]
    }
    dropped = [
        rule["regex"]
        for rule in jobs["ray"]["metric_relabel_configs"]
        if rule.get("action") == "drop"
    ]
    assert dropped
    return [name for name in all_names if not any(re.fullmatch(each, name) for each in dropped)]


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """A collector that takes traces and forgets them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def data_plane(streams: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """CPU time of a message, with metrics, without, and traced."""
    features = np.random.default_rng(1).standard_normal((ROWS, *SHAPE), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    traced = wire.encode_request(features, request_id="0" * 16, traceparent=TRACE)
    round_s = len(TURNS) * (SETTLING_S + TURN_S)
    config: dict[str, Any] = {"engine": "null", "echo_shape": SHAPE}
    # Spans leave within a turn's settling, so that they are paid for in the turn that made them;
    # by default they wait for 5 s, in batches more than twice as large.
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "2000"
    with sink() as collector:
        configs = {
            "off": config,
            "on": config,
            "turns": {**config, "trace_endpoint": collector, "traces_per_s": 1e6},
        }
        with clusters.start("metered", configs=configs) as url:
            begun = len(stats(f"{url}/turns")["turns"])
            run = load.run(
                "stream",
                f"ws{url.removeprefix('http')}/turns/v2/models/echo/stream",
                message,
                connections=streams,
                run_s=(rounds + 1) * round_s,
                hundredth=traced,
            )
            turns = stats(f"{url}/turns")["turns"][begun + 1 :]
            idle = _idle(url, 30.0)
    # Whole rounds from the first turn that was under load from its beginning on.
    each: dict[str, list[float]] = {arm: [] for arm in TURNS}
    for arm, cpu_s, answers in turns[: len(TURNS) * rounds]:
        each[arm].append(cpu_s / answers * 1e6)
    medians = {arm: statistics.median(values) for arm, values in each.items()}
    rows = [
        {
            "what": f"replica's CPU us a message, {words}",
            "value": medians[arm],
            "lowest": min(each[arm]),
            "highest": max(each[arm]),
        }
        for arm, words in (
            ("off", "no metrics"),
            ("on", "metrics"),
            ("traced", "metrics, 1 in 100 traced"),
        )
    ]
    rows += [
        {
            "what": f"idle replica's CPU ms a second, {words}",
            "value": idle[arm] * 1e3,
            "lowest": "",
            "highest": "",
        }
        for arm, words in (("off", "no metrics"), ("on", "metrics"))
    ]

    def over(arm: str, base: str) -> tuple[float, float]:
        """Between neighbours, so that the machine's moods cancel out; and the standard error."""
        ratios = [a / b - 1 for a, b in zip(each[arm], each[base], strict=True)]
        return statistics.median(ratios), 1.25 * statistics.stdev(ratios) / math.sqrt(len(ratios))

    metrics, metrics_error = over("on", "off")
    both, both_error = over("traced", "off")
    return rows, {
        "metrics_on_over_off": metrics,
        "metrics_on_over_off_standard_error": metrics_error,
        "metrics_and_traces_over_off": both,
        "metrics_and_traces_over_off_standard_error": both_error,
        "idle_metrics_ms_per_s": (idle["on"] - idle["off"]) * 1e3,
        "messages_per_s": run.rate,
    }


def _idle(url: str, seconds: float) -> dict[str, float]:
    """CPU seconds per second of the replicas with and without metrics, while nothing comes."""
    arms = ("off", "on")
    before = {arm: stats(f"{url}/{arm}")["cpu_s"] for arm in arms}
    time.sleep(seconds)
    return {arm: (stats(f"{url}/{arm}")["cpu_s"] - before[arm]) / seconds for arm in arms}


def node(replicas: int, scrapes: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A scrape of a node with many replicas."""
    config = {
        "engine": ENGINE,
        "echo_shape": SMALL,
        "max_batch_rows": MAX_BATCH_ROWS,
        "max_request_rows": ROWS,
    }
    with clusters.start_saying("metered", configs={"on": config}, replicas=replicas) as said:
        fleet(f"{said['url']}/on", 40.0, 10.0)
        time.sleep(2 * REPORT_S)
        times_s, texts = [], []
        for _ in range(scrapes):
            began = time.perf_counter()
            texts.append(scrape(said["metrics"]))
            times_s.append(time.perf_counter() - began)
            time.sleep(0.5)
    found = names(texts[-1])
    ours = [name for name in found if name.startswith("ray_datamix_")]
    seen = {
        match[1]
        for match in re.finditer(r'ray_datamix_rows_total\{[^}]*replica="([^"]+)"', texts[-1])
    }
    assert len(seen) == replicas, f"{len(seen)} replicas are in the scrape, expected {replicas}"
    rows = [
        {"what": words, "value": value, "lowest": low, "highest": high}
        for words, value, low, high in (
            (
                f"scrape of a node with {replicas} replicas, ms",
                statistics.median(times_s) * 1e3,
                min(times_s) * 1e3,
                max(times_s) * 1e3,
            ),
            ("series in it", float(len(found)), "", ""),
            ("series that Prometheus keeps", float(len(kept(found))), "", ""),
            ("series of ours", float(len(ours)), "", ""),
        )
    ]
    return rows, {
        "scrape_ms": statistics.median(times_s) * 1e3,
        "series_kept": float(len(kept(found))),
        "series_of_ours": float(len(ours)),
        "series_all": float(len(found)),
    }


def fleet(url: str, rate: float, duration_s: float) -> None:
    """An open loop of small messages."""
    simulate(
        FleetConfig(
            url=url, devices=40, rate=rate, duration_s=duration_s, workload="echo", rows=ROWS,
            timeout_s=30, seed=1,
        )
    )  # fmt: skip


def busy_total(text: str) -> float:
    """Engine seconds of the node, as scraped."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "ray_datamix_engine_busy_seconds_total"
    )


def utilisation(seconds: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A shown utilisation beside the engine's own clock."""
    config = {
        "engine": ENGINE,
        "echo_shape": SMALL,
        "max_batch_rows": ROWS,
        "max_request_rows": ROWS,
    }
    rows, worst = [], 0.0
    with clusters.start_saying("metered", configs={"on": config}, report_interval_ms=1000) as said:
        url = f"{said['url']}/on"
        # Batches of one message, so that the rate says how busy the engine is.
        for share in (0.10, 0.50, 0.95):
            rate = share / (A_S + B_S * ROWS)
            thread = threading.Thread(target=fleet, args=(url, rate, seconds + 4 * LAG_S))
            thread.start()
            time.sleep(3 * LAG_S)  # until devices are connected and the agent has heard of them
            first, began = stats(url), time.monotonic()
            time.sleep(LAG_S)
            shown_s, shown_began = busy_total(scrape(said["metrics"])), time.monotonic()
            time.sleep(max(0.0, seconds - LAG_S))
            last, ended = stats(url), time.monotonic()
            time.sleep(LAG_S)
            shown_s, shown_ended = busy_total(scrape(said["metrics"])) - shown_s, time.monotonic()
            thread.join()
            worked = (last["engine_worked_s"] - first["engine_worked_s"]) / (ended - began)
            shown = shown_s / (shown_ended - shown_began)
            worst = max(worst, abs(shown - worked) * 100)
            rows.append(
                {
                    "what": f"utilisation shown at {share:.0%}, beside the engine's own clock",
                    "value": shown,
                    "lowest": worked,
                    "highest": worked,
                }
            )
    return rows, {"utilisation_off_points": worst}


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="of turns, half a minute each")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--scrapes", type=int, default=21)
    parser.add_argument("--window", type=float, default=100.0, help="of a utilisation, in seconds")
    options = parser.parse_args()
    parts = [
        data_plane(options.streams, options.rounds),
        node(options.replicas, options.scrapes),
        utilisation(options.window),
    ]
    report.show(
        f"{options.streams} streams to a null engine; {options.replicas} emulated "
        "replicas; one emulated engine",
        [row for rows, _ in parts for row in rows],
        [
            "over off: medians of neighbours in time within one process, which leaves out what "
            "Ray's threads send by the clock: that is the difference of the idle rows",
            "series kept: without those that the shipped configurations of Prometheus drop",
            "utilisation: lowest and highest are the engine's own clock over the same window",
        ],
        options.json,
        **dict[str, Any]({name: value for _, each in parts for name, value in each.items()}),
    )


if __name__ == "__main__":
    main()
