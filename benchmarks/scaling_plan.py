"""What so many devices need: the arithmetic of docs/scaling.md, for any figures.

Everything a device takes of a node (a stream, cores, memory, rows, bytes) is worked out for the
busiest hour; the scarcest says how many devices a node holds. Costs go through the 24 hours of a
day.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DAY_S, MONTH_DAYS = 86_400, 30


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
