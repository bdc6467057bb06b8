"""The cases of docs/scaling.md: measured figures from docs/benchmarks, others from scaling.yaml.

The largest load that a replica's engine sustains is from the queueing model of the autoscaler.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.scaling_plan import Behaviour, Case, Fleetwide, Node, Stream, Workload
from deployments.capacity import Report, sustainable
from deployments.profile import Profile

if TYPE_CHECKING:
    from datamix.models.costs import Costs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/benchmarks"
FRAMING_BYTES = 400  # of one message beside its rows


def result(name: str) -> dict[str, Any]:
    """A result of docs/benchmarks."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Piecewise linear through the points, which are sorted; the last line goes on for ever."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1 or (x1, y1) == points[-1]:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def message_cpu(kilobytes: float) -> float:
    """Core seconds of all that serves one message of a size, with thousands of streams open."""
    rows = [row for row in result("field")["rows"] if row["path"] == "ours, stream"]

    def number(row: dict[str, Any], key: str) -> float:
        return float(str(row[key]).replace(",", ""))

    few = {
        number(row, "kB"): number(row, "server CPU us")
        for row in rows
        if number(row, "connections") == 64
    }
    (many,) = (number(row, "server CPU us") for row in rows if number(row, "connections") >= 4_000)
    return 1e-6 * interpolated(kilobytes, sorted(few.items())) * many / few[33.0]


def shares() -> tuple[float, float]:
    """Which part of a message's cost is HAProxy's, and which the replica's."""
    (ours,) = (r for r in result("transports")["rows"] if r["transport"].endswith("(ours)"))
    total = ours["server CPU us"]
    return ours["HAProxy"] / total, ours["replica"] / total


def stream_cost(workload: Workload, kernel_kb: float) -> Stream:
    """A stream's costs from docs/benchmarks."""
    per_message = message_cpu(max(workload.up_bytes, workload.down_bytes) / 1e3)
    door, loop = shares()
    rows = {row["part"]: row for row in result("streams")["rows"]}
    held = sum(rows[part]["kB per stream"] for part in ("replica", "HAProxy"))
    return Stream(
        door_s=per_message * door,
        loop_s=per_message * loop,
        door_open_s=1e-6 * rows["HAProxy"]["CPU us to open"],
        loop_open_s=1e-6 * rows["replica"]["CPU us to open"],
        door_idle_s=1e-6 * rows["HAProxy"]["CPU us per idle second"],
        loop_idle_s=1e-6 * rows["replica"]["CPU us per idle second"],
        memory_bytes=1e3 * (held + kernel_kb),
    )


def core_rows_per_s(measured_as: str) -> float:
    """Rows per second of one core, bare, in block 0: the median of the runs with one thread."""
    rows = [
        row
        for row in result("saturation")["rows"]
        if row["model"] == measured_as and row["engine threads"] == 1
    ]
    return float(statistics.median(row["bare rows/s before"] for row in rows))


def read_settings() -> dict[str, Any]:
    """scaling.yaml."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("scaling.yaml").read_text())
    return found


@functools.cache
def _costs(architecture: str, options: str) -> Costs:
    """What a network costs, by its name and its options as JSON."""
    from datamix.models import Architecture, build
    from datamix.models.costs import costs

    return costs(build(Architecture(architecture, json.loads(options))))


def build_workload(name: str, entry: Mapping[str, Any]) -> tuple[Workload, float]:
    """A network's demands, and the FLOPs of a row in block 0, for which its speed was measured."""
    found = _costs(entry["architecture"], json.dumps(entry["options"]))
    blocks = [part.flops for part in found.parts if part.side == "cloud"]
    rows, rounds = entry["group_size"], len(found.rounds)
    return (
        Workload(
            name,
            rows,
            rounds,
            found.bytes_up * rows / rounds + FRAMING_BYTES,
            found.bytes_down * rows / rounds + FRAMING_BYTES,
            sum(blocks) / rounds,
        ),
        float(blocks[0]),
    )


def engine_rows(
    batch_s: float, row_s: float, most: int, rows: int, policy: dict[str, Any]
) -> float:
    """Rows per second that an engine sustains within the promised wait: the autoscaler's rule."""
    full = Report(0.0, 0.0, float(rows), 1.0, batch_s, row_s, float(most))
    return sustainable(full, policy["wait_target_s"]) * (1 - float(policy["headroom"]))


def build_case(
    settings: dict[str, Any],
    entry: Mapping[str, Any],
    *,
    per_day: float | None = None,
    peak: float | None = None,
    profile: Profile | None = None,
) -> Case:
    """A case of scaling.yaml.

    Args:
        settings: scaling.yaml.
        entry: of its cases.
        per_day: inferences per device and day; None: as assumed there.
        peak: the busiest hour over the mean, at most 2; None: as assumed there.
        profile: of `datamix profile-engine`, instead of what is measured or assumed there.
    """
    assumed = {name: found["value"] for name, found in settings["assumed"].items()}
    documented = {name: found["value"] for name, found in settings["documented"].items()}
    network = settings["workloads"][entry["workload"]]
    machine = settings["machines"][entry["machine"]]
    workload, block_flops = build_workload(entry["workload"], network)
    served = yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())["applications"][0]
    scaling = served["deployments"][0]["autoscaling_config"]
    policy = scaling["policy"]["policy_kwargs"]
    cores = assumed["use_of_cores"]
    # One core for the event loop, and one for the engine's thread or HAProxy's second.
    if profile is not None:
        batch_s = statistics.fmean(block.a_s for block in profile.blocks)
        row_s = statistics.fmean(block.b_s for block in profile.blocks)
        door_cores = machine["vcpus"] - 2
    elif entry["engine"] == "gpu":
        flops = 1e12 * documented["gpu_peak_tflops"] * assumed["gpu_share_of_peak"]
        batch_s, row_s = assumed["gpu_batch_s"], workload.flops_per_row / flops
        door_cores = machine["vcpus"] - 2
    else:
        # Half of the machine computes: the others are the event loop's and HAProxy's.
        threads = machine["vcpus"] // 2
        flops = core_rows_per_s(network["measured_as"]) * block_flops * threads
        batch_s, row_s = assumed["cpu_batch_s"], workload.flops_per_row / flops
        door_cores = machine["vcpus"] - threads - 1
    rows = engine_rows(batch_s, row_s, network["max_batch_rows"], workload.rows, policy)
    return Case(
        f"{entry['workload']} on {entry['machine']}",
        workload,
        Behaviour(
            assumed["inferences_per_device_per_day"] if per_day is None else per_day,
            assumed["peak_over_mean"] if peak is None else peak,
            served["args"]["stream_idle_timeout_s"],
        ),
        stream_cost(workload, assumed["kernel_kb_per_stream"]),
        Node(
            connections=maxconn() * assumed["use_of_connections"],
            door_cores=door_cores * cores,
            loop_cores=cores,
            memory_bytes=1e9 * (machine["memory_gb"] - assumed["base_memory_gb"]),
            rows_per_s=rows,
            bytes_per_s=1e9
            / 8
            * machine["network_gbps"]
            * assumed["use_of_network"]
            / assumed["hops"],
            gpus=machine["gpus"],
            usd_per_hour=settings["prices"]["hour"][entry["machine"]],
        ),
        Fleetwide(
            int(documented["nodes_per_cluster"] * assumed["use_of_cluster"]),
            documented["ports_to_one_replica"] * assumed["use_of_connections"],
            scaling["metrics_interval_s"],
            assumed["devices_per_region"],
            settings["prices"]["hour"][settings["head"]],
            tuple((t["up_to_gb"], t["usd_per_gb"]) for t in settings["prices"]["egress"]),
        ),
    )


def maxconn() -> int:
    """The connections that cluster.yaml allows each HAProxy."""
    (most,) = set(re.findall(r"HAPROXY_MAXCONN=(\d+)", (ROOT / "cluster.yaml").read_text()))
    return int(most)


def max_workers() -> int:
    """The most workers of cluster.yaml."""
    found = yaml.safe_load((ROOT / "cluster.yaml").read_text())["max_workers"]
    return int(found)


def standard() -> tuple[dict[str, Any], list[Case]]:
    """scaling.yaml and its cases, with nothing said on the command line."""
    settings = read_settings()
    return settings, [build_case(settings, entry) for entry in settings["cases"]]
