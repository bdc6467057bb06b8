"""What ``datamix doctor --address`` looks at; :mod:`cluster.doctor_cluster` lists all of it.

Each check is a pure function of the facts that :mod:`cluster.doctor_facts` has gathered, so that a
test can make each of them fire.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cluster.doctor import (
    FREE_DISK_BYTES,
    FULL_DISK_RATIO,
    MODE_VARIABLES,
    PACKAGES,
    SHARED_MEMORY_BYTES,
    Status,
)
from cluster.local import max_streams

if TYPE_CHECKING:
    from cluster.doctor_facts import Deployment, Facts, Node
    from cluster.doctor_node import NodeFacts

# Beyond one of these, clocks make logs and metrics of several nodes hard to lay side by side;
# beyond the other, requests to an object store are refused, where a bundle may lie.
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 300.0
RAY_ONGOING_REQUESTS = 5
RAY_HEALTH_PERIOD_S = 10.0
_DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
_LOOPBACK = ("127.", "localhost", "::1")
# Whoever of Serve's must be in HAProxy mode for the cluster to be.
_CONTROL = ("controller", "proxy", "HAProxy's manager")

Finding = tuple[Status, str]


# ------------------------------------------------------------------ what checks have in common


def answering(facts: Facts) -> dict[str, NodeFacts]:
    """What the nodes that answered say, by the node's name."""
    return {node["name"]: node["facts"] for node in facts["nodes"] if node["facts"] is not None}


def deployments(facts: Facts) -> list[tuple[str, Deployment]]:
    """All deployments, each with a name that says of which application."""
    return [
        (f"{application['name']}/{deployment['name']}", deployment)
        for application in facts["serve"]["applications"]
        for deployment in application["deployments"]
    ]


def holds_replicas(node: Node, facts: Facts) -> bool:
    """Whether some deployment's replica would fit on this node."""
    wanted = [deployment["resources"] for _, deployment in deployments(facts)] or [{"CPU": 1.0}]
    return any(
        all(node["resources"].get(name, 0.0) >= needs.get(name, 0.0) for name in ("CPU", "GPU"))
        for needs in wanted
    )


def with_replicas(facts: Facts) -> dict[str, NodeFacts]:
    """What the nodes say where a replica may run, by the node's name."""
    return {
        node["name"]: node["facts"]
        for node in facts["nodes"]
        if node["facts"] is not None and holds_replicas(node, facts)
    }


def doors(facts: Facts) -> dict[str, NodeFacts]:
    """What the nodes say that have a front door, by the node's name."""
    return {
        node["name"]: node["facts"]
        for node in facts["nodes"]
        if node["facts"] is not None and node["front_door"]
    }


def devices_per_door(facts: Facts) -> int:
    """How many devices each front door has to carry."""
    return math.ceil(facts["devices"] / max(1, len(doors(facts))))


def named(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def differing(values: Mapping[str, str]) -> str:
    """``2.60.0 on a, b; 2.59.0 on c`` where nodes differ; empty where all are the same."""
    kinds = sorted(set(values.values()))
    if len(kinds) < 2:
        return ""
    return "; ".join(
        f"{kind or 'none'} on {named(name for name in values if values[name] == kind)}"
        for kind in kinds
    )


def verdict(bad: list[str], good: str, status: Status = "fail") -> Finding:
    """``status`` with all that is bad, or ok."""
    return (status, "; ".join(bad)) if bad else ("ok", good)


# ------------------------------------------------------------------ the checks


def nodes_answer(facts: Facts) -> Finding:
    """Every living node has answered."""
    alive = [node for node in facts["nodes"] if node["alive"]]
    bad = [f"{node['name']}: {node['error']}" for node in alive if node["facts"] is None]
    left = len(facts["nodes"]) - len(alive)
    return verdict(bad, f"{len(alive)} answer" + (f", {left} have left" if left else ""))


def serve_runs(facts: Facts) -> Finding:
    """Serve, its applications, deployments and proxies are as they should be."""
    serve = facts["serve"]
    if serve["error"]:
        return "fail", serve["error"]
    bad = []
    for application in serve["applications"]:
        if application["status"] != "RUNNING":
            message = application["message"]
            bad.append(f"{application['name']} is {application['status']}: {message}".rstrip(": "))
    for name, deployment in deployments(facts):
        if deployment["status"] == "UNHEALTHY":
            bad.append(f"{name} is UNHEALTHY: {deployment['message']}".rstrip(": "))
    sick = [status for status in serve["proxies"].values() if status != "HEALTHY"]
    if sick:
        bad.append(f"{len(sick)} of {len(serve['proxies'])} front doors are {sick[0]}")
    if not serve["applications"]:
        bad.append("no application is deployed")
    return verdict(bad, f"runs {named(a['name'] for a in serve['applications'])}")


def mode_variables(facts: Facts) -> Finding:
    """HAProxy mode is set where Ray was started, on every node."""
    bad = []
    for variable in MODE_VARIABLES:
        # "1" and nothing else: Ray takes "true" for false.
        without = [
            name
            for name, node in answering(facts).items()
            if node["environment"].get(variable) != "1"
        ]
        if without:
            late = ", though it is 1 in this shell" if facts["shell"].get(variable) == "1" else ""
            bad.append(f"{variable} was not 1 when Ray was started on {named(without)}{late}")
    return verdict(bad, "both were 1 when Ray was started, on every node")


def variables_in_time(facts: Facts) -> Finding:
    """Serve's own processes have the variables that their node's Ray was started with."""
    bad = []
    for name, node in answering(facts).items():
        own = {
            variable: node["environment"].get(variable)
            for variable in {*node["environment"], *MODE_VARIABLES}
            if variable.startswith("RAY_SERVE_")
        }
        for actor in node["actors"]:
            watched = own if actor["kind"] in _CONTROL else dict.fromkeys(MODE_VARIABLES, "1")
            wrong = [v for v in watched if actor["environment"].get(v) != own.get(v)]
            if wrong:
                bad.append(f"the {actor['kind']} on {name} differs in {named(sorted(wrong))}")
    return verdict(bad, "Serve's processes have what their nodes were started with")


def same_variables(facts: Facts) -> Finding:
    """Ray Serve's settings are the same on all nodes."""
    nodes = answering(facts)
    names = {v for node in nodes.values() for v in node["environment"] if v.startswith("RAY_SERVE")}
    bad = []
    for variable in sorted(names - set(MODE_VARIABLES)):
        values = {name: node["environment"].get(variable, "") for name, node in nodes.items()}
        if found := differing(values):
            bad.append(f"{variable}: {found}")
    return verdict(bad, "the same on every node", "warn")


def haproxy_in_front(facts: Facts) -> Finding:
    """On every node with a front door, HAProxy is it."""
    bad = []
    for name, node in doors(facts).items():
        answer = node["front_door"]
        # HAProxy answers this path itself and signs nothing; the Python proxy says it is uvicorn.
        if "uvicorn" in answer["server"].lower():
            bad.append(f"Serve's Python proxy answers on {name}")
        elif not answer["status"]:
            bad.append(f"nobody answers on {name} ({answer['reason']})")
        elif node["haproxy"] is None:
            bad.append(f"no HAProxy runs on {name}, and something answers")
    if facts["serve"]["error"]:
        return "ok", "Serve does not run"  # which another check says
    if not doors(facts):
        bad.append("no node that answered has a front door")
    return verdict(bad, f"HAProxy answers on {len(doors(facts))} of {len(answering(facts))} nodes")


def connections(facts: Facts) -> Finding:
    """HAProxy lets all devices in."""
    allowed = {n: node["haproxy"]["maxconn"] for n, node in doors(facts).items() if node["haproxy"]}
    if not allowed:
        return "ok", "no HAProxy runs"  # which another check says
    total, devices = sum(allowed.values()), facts["devices"]
    found = f"{len(allowed)} front doors let {total} devices in, of {devices}"
    if total < devices:
        return "fail", found
    small = [name for name, most in allowed.items() if most < devices_per_door(facts)]
    if small:
        return "warn", f"{found}, but not their share ({devices_per_door(facts)}) on {named(small)}"
    return "ok", found


def descriptors(facts: Facts) -> Finding:
    """HAProxy may open enough files for its share of the devices."""
    share, bad = devices_per_door(facts), []
    for name, node in (doors(facts) or with_replicas(facts)).items():
        limit = node["haproxy"]["descriptors"] if node["haproxy"] else node["descriptors"]
        if max_streams(limit) < share:
            bad.append(f"{limit} on {name} are enough for {max_streams(limit)} devices of {share}")
    return verdict(bad, f"enough for {share} devices per front door")


def ports_to_replicas(facts: Facts) -> Finding:
    """HAProxy has a port for each stream that it passes to one replica."""
    replicas = sum(deployment["replicas"] for _, deployment in deployments(facts))
    # Streams go where there are fewest, so evenly.
    streams = math.ceil(devices_per_door(facts) / max(1, replicas))
    bad = [
        f"{node['local_ports']} ports on {name} for {streams} streams to each replica"
        for name, node in doors(facts).items()
        if 0 < node["local_ports"] < streams
    ]
    return verdict(bad, f"enough for {streams} streams from each door to each replica")


def threads(facts: Facts) -> Finding:
    """HAProxy has no more threads than its node has processors."""
    bad = [
        f"{node['haproxy']['threads']} threads on {node['cpus']} processors of {name}"
        for name, node in doors(facts).items()
        if node["haproxy"] and node["haproxy"]["threads"] > node["cpus"]
    ]
    return verdict(bad, "no more than there are processors", "warn")


def versions(facts: Facts) -> Finding:
    """The same Python and packages on all nodes, and all of them where replicas run."""
    nodes = answering(facts)
    bad = []
    if found := differing({name: node["python"] for name, node in nodes.items()}):
        bad.append(f"Python {found}")
    for package in PACKAGES:
        having = {n: node["packages"].get(package, "") for n, node in nodes.items()}
        lacking = [name for name in with_replicas(facts) if not having[name]]
        if lacking:
            bad.append(f"{package} is not installed on {named(lacking)}")
        if found := differing({name: value for name, value in having.items() if value}):
            bad.append(f"{package} {found}")
    first = next(iter(nodes.values()), None)
    release = "" if first is None else f": Python {first['python']}, Ray {first['packages']['ray']}"
    return verdict(bad, f"the same on every node{release}")


def code(facts: Facts) -> Finding:
    """The same `datamix` and `deployments` wherever replicas and the controller run."""
    nodes = answering(facts)
    needing = set(with_replicas(facts)) | {
        name
        for name, node in nodes.items()
        if any(actor["kind"] == "controller" for actor in node["actors"])
    }
    bad = []
    for package in ("datamix", "deployments"):
        having = {name: node["code"][package] for name, node in nodes.items()}
        lacking = [name for name in having if name in needing and not having[name]]
        if lacking:
            bad.append(f"{package} cannot be imported on {named(lacking)}")
        if found := differing({name: value for name, value in having.items() if value}):
            bad.append(f"{package} is {found}")
    return verdict(bad, "the same datamix and deployments everywhere")


def bundles(facts: Facts) -> Finding:
    """Every bundle is there and whole and the same wherever a replica may run."""
    nodes = with_replicas(facts)
    known = list(dict.fromkeys(bundle for node in nodes.values() for bundle in node["bundles"]))
    bad = []
    for bundle in known:
        seen = {name: node["bundles"][bundle] for name, node in nodes.items()}
        for name in seen:
            if seen[name]["error"]:
                bad.append(f"{bundle} on {name}: {seen[name]['error']}")
        whole = {name: found["digest"] for name, found in seen.items() if found["digest"]}
        if found := differing(whole):
            bad.append(f"{bundle} is {found}")
    return verdict(bad, f"{named(known)}: the same everywhere" if known else "none is served")


def clocks(facts: Facts) -> Finding:
    """The nodes' clocks agree."""
    off = {
        node["name"]: abs(node["clock_s"]) - node["clock_error_s"]
        for node in facts["nodes"]
        if node["facts"] is not None
    }
    bad = [
        f"{name} is off by {seconds:.1f} s"
        for name, seconds in off.items()
        if seconds > CLOCK_WARN_S
    ]
    worst = max(off.values(), default=0.0)
    status: Status = "fail" if worst > CLOCK_FAIL_S else "warn"
    return verdict(bad, f"within {max(0.1, worst):.1f} s of this machine's", status)


def gpu_drivers(facts: Facts) -> Finding:
    """Where Ray counts a GPU, there is a driver for it."""
    declared = {
        node["name"]: node["facts"]["gpu_driver"]
        for node in facts["nodes"]
        if node["facts"] is not None and node["resources"].get("GPU", 0) > 0
    }
    without = [name for name, driver in declared.items() if not driver]
    if without:
        return "fail", f"Ray counts GPUs on {named(without)}, and there is no NVIDIA driver"
    if not declared:
        return "ok", "no node counts a GPU"
    return "ok", f"on {len(declared)} nodes: {named(sorted(set(declared.values())))}"


def ports(facts: Facts) -> Finding:
    """Nobody but Serve listens at its port."""
    port = str(facts["serve"]["port"] or 8000)
    bad = []
    for name, node in answering(facts).items():
        listener = node["listeners"].get(port, "haproxy")
        if listener != "haproxy" and not listener.startswith("ray::"):
            bad.append(f"{listener} listens at {port} on {name}")
    return verdict(bad, f"{port} is Serve's or free")


def token_mode(facts: Facts) -> Finding:
    """It is said whether Ray asks for tokens, and the same on all nodes."""
    nodes = answering(facts)
    said = {name: node["environment"].get("RAY_AUTH_MODE", "") for name, node in nodes.items()}
    meant = {
        name: said[name].lower() or ("token" if node["token_file"] else "disabled")
        for name, node in nodes.items()
    }
    if found := differing(meant):
        return "fail", f"Ray's authentication is {found}"
    unset = [name for name, node in nodes.items() if not said[name] and node["token_file"]]
    bad = [f"RAY_AUTH_MODE is not set on {named(unset)}, where a token file turns it on"]
    return verdict(bad if unset else [], f"{next(iter(meant.values()), 'unknown')}", "warn")


def disks(facts: Facts) -> Finding:
    """Ray's session folders have room."""
    full, tight = [], []
    for name, node in answering(facts).items():
        disk = node["disk"]
        text = f"{disk['free'] / (1 << 30):.1f} GiB free under {disk['folder']} on {name}"
        if disk["free"] < FREE_DISK_BYTES:
            full.append(text)
        elif disk["free"] < (1 - FULL_DISK_RATIO) * disk["total"]:
            tight.append(text)
    if full:
        return "fail", "; ".join(full)
    return verdict(tight, f"at least {FREE_DISK_BYTES >> 30} GiB and 5% free everywhere", "warn")


def shared_memory(facts: Facts) -> Finding:
    """Ray's object store fits into shared memory."""
    bad = [
        f"{node['shared_memory']['total'] >> 20} MiB on {name}"
        for name, node in answering(facts).items()
        if node["shared_memory"]["total"] < SHARED_MEMORY_BYTES
    ]
    return verdict(bad, f"at least {SHARED_MEMORY_BYTES >> 20} MiB everywhere", "warn")


def ongoing_requests(facts: Facts) -> Finding:
    """A replica lets all its streams in: each is one ongoing request for as long as it is open."""
    few, tight = [], []
    for name, deployment in deployments(facts):
        most, replicas = deployment["max_ongoing_requests"], max(1, deployment["replicas"])
        if most <= RAY_ONGOING_REQUESTS:
            few.append(f"{name} lets {most} streams in per replica, Ray's default")
        elif most * replicas < facts["devices"]:
            tight.append(f"{name} lets {most * replicas} streams in, of {facts['devices']} devices")
    if few:
        return "fail", "; ".join(few)
    return verdict(tight, "replicas let all devices in", "warn")


def health_checks(facts: Facts) -> Finding:
    """A dead replica is noticed within seconds."""
    bad = [
        f"{name} is looked at every {deployment['health_check_period_s']:g} s"
        for name, deployment in deployments(facts)
        if deployment["health_check_period_s"] >= RAY_HEALTH_PERIOD_S
    ]
    return verdict(bad, "a dead replica is noticed within seconds", "warn")


def autoscaling(facts: Facts) -> Finding:
    """Replicas follow the load, not the number of streams, and at once."""
    bad = []
    for name, deployment in deployments(facts):
        if not deployment["policy"]:
            continue
        if "PredictedWait" not in deployment["policy"]:
            bad.append(f"{name} scales by {deployment['policy']}, to which a stream is a request")
        elif any(deployment["delays_s"]):
            delays = " and ".join(f"{delay:g} s" for delay in deployment["delays_s"])
            bad.append(f"{name}: Serve delays what the policy decides by {delays}")
    return verdict(bad, "by predicted wait and without delay, or fixed", "warn")


def http_host(facts: Facts) -> Finding:
    """Where there are several nodes, front doors listen on all addresses."""
    host = facts["serve"]["host"]
    several = sum(node["alive"] for node in facts["nodes"]) > 1
    if several and host.startswith(_LOOPBACK):
        return "fail", f"Serve listens on {host}, and there are several nodes"
    return "ok", f"Serve listens on {host or 'all addresses'}"


def draining(facts: Facts) -> Finding:
    """Tests' settings have not come along: replicas leave slowly enough for load balancers."""
    several = sum(node["alive"] for node in facts["nodes"]) > 1
    bad = [
        f"{_DRAINING} is {node['environment'][_DRAINING]} on {name}"
        for name, node in answering(facts).items()
        if several and float(node["environment"].get(_DRAINING, "30")) < 5
    ]
    return verdict(bad, "replicas drain before they go, or it is one node", "warn")


def device_code(facts: Facts) -> Finding:
    """What handles the secrets is not where the cloud runs."""
    places = {name: node["edge"] for name, node in answering(facts).items() if node["edge"]}
    bad = [
        f"{place} can be imported on {named(name for name in places if places[name] == place)}"
        for place in sorted(set(places.values()))
    ]
    return verdict(bad, "no node can import edge", "warn")


def device_weights(facts: Facts) -> Finding:
    """The device's half of a bundle is not where the cloud runs."""
    bad = []
    for name, node in answering(facts).items():
        kept = {file for seen in node["bundles"].values() for file in seen["device_files"]}
        if kept:
            bad.append(f"{named(sorted(kept))} on {name}")
    return verdict(bad, "no node has the device's half of a bundle", "warn")
