"""From one machine to ten million devices: a plan on paper, from what was measured.

Measured figures come from docs/benchmarks, documented and assumed ones from scaling.yaml; the
largest load that a replica's engine sustains, from the queueing model of the autoscaler. Everything
a device takes of a node (a stream, cores, memory, rows, bytes) is worked out for the busiest hour;
the scarcest says how many devices a node holds. Costs go through the 24 hours of a day.

python -m benchmarks.scaling            prints the tables
python -m benchmarks.scaling --write    puts them into docs/scaling.md
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks import report
from deployments.capacity import Report, sustainable
from deployments.profile import Profile, read_profile

if TYPE_CHECKING:
    from datamix.models.costs import Costs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/benchmarks"
PAGE = ROOT / "docs/scaling.md"
SCALES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
HABITS_DEVICES, HABITS = 1_000_000, (2.0, 20.0, 200.0, 2_000.0, 20_000.0)
DAY_S, MONTH_DAYS = 86_400, 30
FRAMING_BYTES = 400  # of one message beside its rows


@dataclass(frozen=True, slots=True)
class Workload:
    """What one inference asks of the cloud: a group of inputs, in ``rounds`` messages each way.

    Attributes:
        name: of the network.
        rows: of a message: the group's size.
        rounds: messages from the device, and as many back.
        up_bytes: of a message to the cloud, mean over rounds.
        down_bytes: of an answer, likewise.
        flops_per_row: of a row in one round, mean over rounds.
    """

    name: str
    rows: int
    rounds: int
    up_bytes: float
    down_bytes: float
    flops_per_row: float


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What devices do, on the mean over a day, and how much more at the busiest hour."""

    per_day: float
    peak: float
    idle_timeout_s: float

    def rate(self, of_mean: float) -> float:
        """Inferences per second of one device when the load is so many times the mean."""
        return self.per_day / DAY_S * of_mean


@dataclass(frozen=True, slots=True)
class Stream:
    """What a stream and its messages cost a node.

    Attributes:
        door_s: HAProxy's core seconds per message.
        loop_s: the replica's event loop's, likewise.
        door_open_s: HAProxy's core seconds to open one.
        loop_open_s: the replica's, likewise.
        door_idle_s: HAProxy's core seconds per second of one that is open, pings for the most.
        loop_idle_s: the replica's, likewise.
        memory_bytes: of both, and of the kernel, for one that is open.
    """

    door_s: float
    loop_s: float
    door_open_s: float
    loop_open_s: float
    door_idle_s: float
    loop_idle_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Node:
    """What one worker has to give, with what is to stay free taken off already.

    Attributes:
        connections: streams of its front door.
        door_cores: for HAProxy.
        loop_cores: of its replica's event loop, which has one core at most.
        memory_bytes: for streams.
        rows_per_s: of its engine, within the wait that is promised.
        bytes_per_s: of its network, each way.
        gpus: that it has.
        usd_per_hour: its price.
    """

    connections: float
    door_cores: float
    loop_cores: float
    memory_bytes: float
    rows_per_s: float
    bytes_per_s: float
    gpus: int
    usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Fleetwide:
    """What holds for clusters: how they are parted, and what a head costs.

    ``ports`` is how many connections a door may have to one replica, ``report_s`` how often a
    replica reports to its controller.
    """

    nodes_per_cluster: int
    ports: float
    report_s: float
    devices_per_region: int
    head_usd_per_hour: float
    egress: tuple[tuple[float, float], ...]  # up to so many GB, USD per GB


@dataclass(frozen=True, slots=True)
class Case:
    """One network on one kind of machine."""

    title: str
    workload: Workload
    behaviour: Behaviour
    stream: Stream
    node: Node
    fleetwide: Fleetwide


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``devices`` devices need.

    Attributes:
        streams: open at once in the busiest hour.
        inferences_per_s: likewise.
        rows_per_s: likewise.
        door_cores: busy in all HAProxies then.
        limit: which of a node's limits decides how many there are.
        full: how much of the decisive limit is in use, spare nodes not counted.
        nodes: workers in the busiest hour, one spare per cluster included.
        clusters: Ray clusters.
        regions: places.
        usd_per_day: nodes that follow the load, and heads.
        egress_usd_per_day: for the answers.
        peak_usd_per_day: what it would cost if nodes stood for the busiest hour all day.
        inferences_per_day: all devices'.
        storm_s: until the streams of a lost node are open again elsewhere in its cluster, if the
            event loops there do it with what the load leaves free.
        gpus: of the workers.
        reports_per_s: that a controller gets from its replicas.
    """

    devices: int
    streams: float
    inferences_per_s: float
    rows_per_s: float
    door_cores: float
    limit: str
    full: float
    nodes: int
    clusters: int
    regions: int
    usd_per_day: float
    egress_usd_per_day: float
    peak_usd_per_day: float
    inferences_per_day: float
    storm_s: float
    gpus: int
    reports_per_s: float


# ------------------------------------------------------------------ arithmetic


def connected_share(rate: float, timeout_s: float) -> float:
    """Of devices that ask at random ``rate`` times a second: how many hold a stream.

    A stream stays for ``timeout_s`` after its last message: one is there as long as the last
    arrival is not longer ago.
    """
    return -math.expm1(-rate * timeout_s)


def opening_rate(rate: float, timeout_s: float) -> float:
    """Streams a device opens per second: for requests that come after the last was closed."""
    return rate * math.exp(-rate * timeout_s)


def takes(case: Case, of_mean: float) -> dict[str, float]:
    """What one device takes of each of a node's limits when the load is so many times the mean."""
    work, stream = case.workload, case.stream
    rate = case.behaviour.rate(of_mean)
    messages = rate * work.rounds
    openings = opening_rate(rate, case.behaviour.idle_timeout_s)
    share = connected_share(rate, case.behaviour.idle_timeout_s)
    return {
        "connections": share,
        "HAProxy's cores": messages * stream.door_s
        + openings * stream.door_open_s
        + share * stream.door_idle_s,
        "event loop": messages * stream.loop_s
        + openings * stream.loop_open_s
        + share * stream.loop_idle_s,
        "memory": share * stream.memory_bytes,
        "engine": messages * work.rows,
        "network": messages * max(work.up_bytes, work.down_bytes),
    }


def gives(node: Node) -> dict[str, float]:
    """What a node has of each limit."""
    return {
        "connections": node.connections,
        "HAProxy's cores": node.door_cores,
        "event loop": node.loop_cores,
        "memory": node.memory_bytes,
        "engine": node.rows_per_s,
        "network": node.bytes_per_s,
    }


def devices_per_node(case: Case, of_mean: float) -> dict[str, float]:
    """How many devices one node holds by each of its limits."""
    has = gives(case.node)
    return {
        limit: has[limit] / use if use > 0 else math.inf
        for limit, use in takes(case, of_mean).items()
    }


def nodes_for(case: Case, devices: float, of_mean: float) -> int:
    """Nodes that hold so many devices, without a spare one; at least 1.

    A door has no more connections to one replica than there are ports: a single node holds no more
    streams, however large it is.
    """
    found = max(1, math.ceil(devices / min(devices_per_node(case, of_mean).values())))
    streams = devices * takes(case, of_mean)["connections"]
    return max(found, 2) if streams > case.fleetwide.ports else found


def regions_and_clusters(fleetwide: Fleetwide, devices: int, nodes: int) -> tuple[int, int]:
    """How many places, and how many clusters in all: at least one in each place."""
    regions = max(1, math.ceil(devices / fleetwide.devices_per_region))
    # One node of each cluster is its spare.
    per_cluster = fleetwide.nodes_per_cluster - 1
    return regions, regions * max(1, math.ceil(nodes / regions / per_cluster))


def day(peak: float) -> list[float]:
    """The load of each hour as a multiple of the mean: a sine wave, the busiest hour ``peak``."""
    hours = [1 + (peak - 1) * math.cos(2 * math.pi * hour / 24) for hour in range(24)]
    return [max(0.0, hour) for hour in hours]


def egress_usd(gigabytes: float, tiers: Sequence[tuple[float, float]]) -> float:
    """The price of a month's bytes out of one region."""
    total = below = 0.0
    for up_to, price in tiers:
        total += max(0.0, min(gigabytes, up_to) - below) * price
        below = up_to
    return total


def plan(case: Case, devices: int) -> Plan:
    """What so many devices need."""
    peak, work, node = case.behaviour.peak, case.workload, case.node
    held = devices_per_node(case, peak)
    limit = min(held, key=lambda name: held[name])
    working = nodes_for(case, devices, peak)
    regions, clusters = regions_and_clusters(case.fleetwide, devices, working)
    use = takes(case, peak)
    rate = case.behaviour.rate(peak)
    hours = [nodes_for(case, devices, of_mean) + clusters for of_mean in day(peak)]
    heads = 24 * clusters * case.fleetwide.head_usd_per_hour
    down_gb = devices * case.behaviour.per_day * work.rounds * work.down_bytes / 1e9
    monthly = egress_usd(down_gb * MONTH_DAYS / regions, case.fleetwide.egress) * regions
    streams_per_node = devices * use["connections"] / working
    left = working / clusters  # the spare takes the lost one's place
    return Plan(
        devices=devices,
        streams=devices * use["connections"],
        inferences_per_s=devices * rate,
        rows_per_s=devices * use["engine"],
        door_cores=devices * use["HAProxy's cores"],
        limit=limit,
        full=devices / working / held[limit],
        nodes=working + clusters,
        clusters=clusters,
        regions=regions,
        usd_per_day=sum(hours) * node.usd_per_hour + heads,
        egress_usd_per_day=monthly / MONTH_DAYS,
        peak_usd_per_day=24 * (working + clusters) * node.usd_per_hour + heads,
        inferences_per_day=devices * case.behaviour.per_day,
        storm_s=streams_per_node * case.stream.loop_open_s / (left * (1 - node.loop_cores)),
        gpus=(working + clusters) * node.gpus,
        reports_per_s=(working / clusters + 1) / case.fleetwide.report_s,
    )


# ------------------------------------------------------------------ what was measured


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


# ------------------------------------------------------------------ cases


def read_settings() -> dict[str, Any]:
    """scaling.yaml."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
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


# ------------------------------------------------------------------ tables


def figure(value: float) -> str:
    """Three significant digits, and thousands parted; nothing for less than a millionth."""
    if not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-6:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return f"{rounded:,.{max(0, digits)}f}"


def markdown(rows: Sequence[Mapping[str, str]], header: Iterable[str] | None = None) -> str:
    """Rows as a table, under their keys or another header."""
    lines = ["| " + " | ".join(header or rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def plan_table(case: Case, scales: Sequence[int]) -> str:
    """What each number of devices needs, a column for each."""
    columns = []
    for found in (plan(case, devices) for devices in scales):
        millions = found.inferences_per_day / 1e6
        columns.append(
            {
                "devices": f"{found.devices:,}",
                "streams at once": figure(found.streams),
                "inferences/s": figure(found.inferences_per_s),
                "rows/s of the engines": figure(found.rows_per_s),
                "busy cores of all front doors": figure(found.door_cores),
                "workers, one spare per cluster": f"{found.nodes:,}",
                "GPUs": f"{found.gpus:,}",
                "streams per front door": figure(found.streams / (found.nodes - found.clusters)),
                "decides the number of workers": f"{found.limit} ({found.full:.0%} in use)",
                "Ray clusters": f"{found.clusters:,}",
                "regions": f"{found.regions:,}",
                "reports/s to a controller": figure(found.reports_per_s),
                "streams of a lost worker are back after, s": figure(found.storm_s),
                "USD a day": figure(found.usd_per_day),
                "USD a day, if nothing scaled down": figure(found.peak_usd_per_day),
                "USD per million inferences": figure(found.usd_per_day / millions),
                "egress on top, USD per million": figure(found.egress_usd_per_day / millions),
            }
        )
    first, *others = list(columns[0])
    header = {first: first} | {column[first]: column[first] for column in columns}
    return markdown(
        [{first: name} | {column[first]: column[name] for column in columns} for name in others],
        header,
    )


def node_table(cases: Sequence[Case]) -> str:
    """How many devices one node holds in the busiest hour, by each of its limits."""
    rows = []
    for case in cases:
        held = devices_per_node(case, case.behaviour.peak)
        least = min(held.values())
        rows.append(
            {"case": case.title}
            | {
                limit: f"**{figure(devices)}**" if devices == least else figure(devices)
                for limit, devices in held.items()
            }
        )
    return markdown(rows)


def breaks_table(cases: Sequence[Case], health_check_s: float) -> str:
    """At how many devices which limit is met, the first one first, for each case."""
    rows = []
    for case in cases:
        held = min(devices_per_node(case, case.behaviour.peak).values())
        most = case.fleetwide.nodes_per_cluster - 1
        share = takes(case, case.behaviour.peak)["connections"]
        met = {
            "ports of a single machine's front door": case.fleetwide.ports / share,
            "one worker is full": held,
            f"max_workers of cluster.yaml ({max_workers()})": held * (max_workers() - 1),
            f"nodes of one Ray cluster ({most + 1})": held * most,
            "devices of one region": float(case.fleetwide.devices_per_region),
        }
        row = {"case": case.title}
        row |= {limit: figure(devices) for limit, devices in met.items()}
        row["health checks/s of a replica in a full cluster"] = figure((most + 1) / health_check_s)
        rows.append(row)
    return markdown(rows)


def habits_table(settings: dict[str, Any], devices: int, habits: Sequence[float]) -> str:
    """So many devices that ask more or less often: what decides then, and what it costs."""
    rows = []
    for entry in settings["cases"]:
        for per_day in habits:
            case = build_case(settings, entry, per_day=per_day)
            found = plan(case, devices)
            rows.append(
                {
                    "case": case.title,
                    "inferences per device and day": f"{per_day:,.0f}",
                    "streams at once": figure(found.streams),
                    "streams opened per s": figure(
                        devices
                        * opening_rate(
                            case.behaviour.rate(case.behaviour.peak), case.behaviour.idle_timeout_s
                        )
                    ),
                    "workers": f"{found.nodes:,}",
                    "decides": found.limit,
                    "USD per million inferences": figure(
                        found.usd_per_day / found.inferences_per_day * 1e6
                    ),
                }
            )
    return markdown(rows)


@dataclass(frozen=True, slots=True)
class Replay:
    """Core seconds of a run that was measured, and what the same figures predict for it."""

    predicted_s: dict[str, float]
    measured_s: float


def replay() -> Replay:
    """The run of benchmarks.fleet_scale, from what single messages and streams cost."""
    run = result("fleet_scale")
    (row,) = run["rows"]
    (seconds,) = re.findall(r"until the end, (\d+) s", " ".join(run["notes"]))
    (requests,) = re.findall(r"inferences (\d+)", run["notes"][1])
    parts = {part["part"]: part for part in result("streams")["rows"]}
    streams = int(re.findall(r"^(\d+) streams", result("streams")["title"])[0])
    both = [parts["replica"], parts["HAProxy"]]
    opening = sum(part["CPU us to open"] for part in both)
    idling = sum(part["CPU us per idle second"] for part in both)
    # Ray works by the clock: what it did beside so many streams, once for each cloud.
    rest = parts["rest of Ray"]["CPU us per idle second"] * streams
    return Replay(
        {
            "messages": int(requests) * message_cpu(33),
            "opening of streams": 1e-6 * row["devices"] * opening,
            "open streams": 1e-6 * row["devices"] * idling * int(seconds),
            "Ray itself": 1e-6 * rest * row["front doors"] * int(seconds),
        },
        1e-6 * row["server CPU us"] * int(requests),
    )


def replay_table() -> str:
    """Prediction and measurement side by side."""
    found = replay()
    rows = [
        {"core seconds": name, "value": figure(value)} for name, value in found.predicted_s.items()
    ]
    predicted = sum(found.predicted_s.values())
    rows.append({"core seconds": "predicted in all", "value": figure(predicted)})
    rows.append({"core seconds": "measured", "value": figure(found.measured_s)})
    return markdown(rows)


def input_table(settings: dict[str, Any], cases: Sequence[Case]) -> str:
    """Every figure that goes in, and what kind it is."""
    door, loop = shares()
    rows = [
        ("core us per message of 33 kB, 4,096 streams", 1e6 * message_cpu(33), "field.json"),
        ("of which HAProxy's", door, "transports.json"),
        ("of which the replica's", loop, "transports.json"),
        ("core us to open a stream, HAProxy", 1e6 * cases[0].stream.door_open_s, "streams.json"),
        ("core us to open a stream, replica", 1e6 * cases[0].stream.loop_open_s, "streams.json"),
        ("kB per open stream, both", result("streams")["figures"]["kb_per_stream"], "streams.json"),
        (
            "core us a second for an open stream, both",
            result("streams")["figures"]["cpu_us_per_idle_second"],
            "streams.json",
        ),
    ]
    rows += [
        (
            f"rows/s of a core, block 0 of {name}",
            core_rows_per_s(entry["measured_as"]),
            "saturation.json",
        )
        for name, entry in settings["workloads"].items()
    ]
    told = [
        {"figure": name, "value": figure(value), "kind": "measured", "source": source}
        for name, value, source in rows
    ]
    works = {case.workload.name: case.workload for case in cases}
    for work in works.values():
        told += [
            {
                "figure": f"{work.name}: {what}",
                "value": figure(value),
                "kind": "computed",
                "source": "`datamix costs`",
            }
            for what, value in (
                ("messages per inference", work.rounds),
                ("kB up per message", work.up_bytes / 1e3),
                ("kB down per message", work.down_bytes / 1e3),
                ("MFLOP per row and round", work.flops_per_row / 1e6),
            )
        ]
    told += [
        {
            "figure": f"{case.title}: rows/s of a worker's engine",
            "value": figure(case.node.rows_per_s),
            "kind": "from an assumption" if "g6." in case.title else "from what was measured",
            "source": "`deployments/capacity.py`",
        }
        for case in cases
    ]
    prices = settings["prices"]
    told += [
        {
            "figure": f"USD an hour, {name}",
            "value": f"{price:g}",
            "kind": "documented",
            "source": f"{prices['source']}, {prices['date']}",
        }
        for name, price in prices["hour"].items()
    ]
    told += [
        {
            "figure": name.replace("_", " "),
            "value": figure(entry["value"]),
            "kind": "documented",
            "source": entry["source"],
        }
        for name, entry in settings["documented"].items()
    ]
    told += [
        {
            "figure": name.replace("_", " "),
            "value": figure(entry["value"]),
            "kind": "assumed",
            "source": entry["why"],
        }
        for name, entry in settings["assumed"].items()
    ]
    return markdown(told)


def tables(
    settings: dict[str, Any], cases: Sequence[Case], scales: Sequence[int] = SCALES
) -> dict[str, str]:
    """All tables by name, as docs/scaling.md has them."""
    checks_s = settings["documented"]["health_check_every_s"]["value"]
    made = {
        "a replay": replay_table(),
        "a node": node_table(cases),
        "what breaks": breaks_table(cases, checks_s),
        "habits": habits_table(settings, HABITS_DEVICES, HABITS),
    }
    made |= {case.title: plan_table(case, scales) for case in cases}
    return made | {"what goes in": input_table(settings, cases)}


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each table between its marks replaced.

    Raises:
        ValueError: the page has no place for one, or a place for none of them.
    """
    places = set(re.findall(r"<!-- table: (.*) -->", page))
    if places != set(made):
        raise ValueError(f"the page has places for {sorted(places)}, expected {sorted(made)}")
    for name, table in made.items():
        mark = f"<!-- table: {name} -->"
        before, _, rest = page.partition(f"{mark}\n")
        page = f"{before}{mark}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def standard() -> tuple[dict[str, Any], list[Case]]:
    """scaling.yaml and its cases, with nothing said on the command line."""
    settings = read_settings()
    return settings, [build_case(settings, entry) for entry in settings["cases"]]


def main() -> None:
    """Print the tables, or write them."""
    parser = report.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/scaling.md")
    parser.add_argument(
        "--devices", type=int, action="append", help="instead of 1e3 to 1e7; repeat"
    )
    parser.add_argument("--per-day", type=float, help="inferences per device and day")
    parser.add_argument("--peak", type=float, help="the busiest hour over the mean, 1 to 2")
    parser.add_argument("--profile", type=Path, help="of datamix profile-engine, for all cases")
    options = parser.parse_args()
    changed = (options.devices, options.per_day, options.peak, options.profile)
    if options.write and any(value is not None for value in changed):
        parser.error("--write takes scaling.yaml as it is: change that instead")
    if options.peak is not None and not 1 <= options.peak <= 2:
        parser.error(f"peak is {options.peak:g}, expected 1 to 2")
    settings = read_settings()
    profile = None if options.profile is None else read_profile(options.profile)
    cases = [
        build_case(settings, entry, per_day=options.per_day, peak=options.peak, profile=profile)
        for entry in settings["cases"]
    ]
    scales = options.devices or SCALES
    made = tables(settings, cases, scales)
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(), made))
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")
    if options.json is not None:
        plans = {c.title: [dataclasses.asdict(plan(c, n)) for n in scales] for c in cases}
        options.json.write_text(json.dumps(plans, indent=1) + "\n")


if __name__ == "__main__":
    main()
