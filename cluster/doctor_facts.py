"""Facts about a running cluster, for the doctor: one small task on each node, and Serve's own word.

A Ray address (``auto`` or ``host:port``) is asked directly. The address of a dashboard
(``http://host:8265``, which `ray attach --port-forward 8265` brings to this machine) gets the same
two files as a job, whose last line is the answer. That is why nothing of ours is imported here but
:mod:`cluster.doctor_node`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

from cluster import doctor_node
from cluster.doctor_node import NodeFacts, Wanted

MARK = "DATAMIX-FACTS "
_HEAD = "node:__internal_head__"
_FILES = ("__init__.py", "doctor_node.py", "doctor_facts.py")
_CLOCK_ROUNDS = 3
_JOB_S = 120.0


class Request(TypedDict):
    """What the doctor was asked, as it travels to a job."""

    bundles: list[str]
    packages: list[str]
    devices: int
    timeout_s: float


class Node(TypedDict):
    """A node as the cluster knows it, and what it says of itself.

    Attributes:
        name: its address, with the beginning of its id where several share one.
        alive: whether Ray counts it as a member.
        head: whether it is the head.
        resources: logical ones, by name.
        front_door: whether Serve runs a proxy on it.
        facts: None where it did not say anything; then ``error`` says why.
        error: empty where there are facts.
        clock_s: how far its clock is ahead of the one of whoever asked.
        clock_error_s: by how much that may be wrong.
    """

    name: str
    alive: bool
    head: bool
    resources: dict[str, float]
    front_door: bool
    facts: NodeFacts | None
    error: str
    clock_s: float
    clock_error_s: float


class Deployment(TypedDict):
    """A deployment's settings, as Serve applies them."""

    name: str
    status: str
    message: str
    max_ongoing_requests: int
    health_check_period_s: float
    health_check_timeout_s: float
    policy: str
    delays_s: list[float]
    replicas: int
    resources: dict[str, float]


class Application(TypedDict):
    """An application and what it serves."""

    name: str
    status: str
    message: str
    bundles: list[str]
    deployments: list[Deployment]


class Serve(TypedDict):
    """What Serve's controller says; ``error`` where there is none that answers."""

    error: str
    host: str
    port: int
    proxies: dict[str, str]
    applications: list[Application]


class Facts(TypedDict):
    """All that the checks look at."""

    devices: int
    shell: dict[str, str]
    nodes: list[Node]
    serve: Serve


class Unreachable(Exception):
    """Nobody answers at the address, or not as a Ray cluster would."""


def facts(address: str, request: Request) -> Facts:
    """Ask a cluster.

    Args:
        address: ``auto`` or ``host:port`` of Ray itself, or ``http://host:port`` of its dashboard.
        request: what to ask.

    Raises:
        Unreachable: no cluster answers there.
    """
    gathered = by_job(address, request) if "://" in address else by_ray(address, request)
    gathered["shell"] = doctor_node.shown(dict(os.environ))
    return gathered


def by_ray(address: str, request: Request) -> Facts:
    """Ask as a driver of the cluster.

    Raises:
        Unreachable: no cluster answers there.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unreachable(f"no Ray cluster answers at {address!r}: {_short(error)}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve = ask_serve(request["timeout_s"])
        return {
            "devices": request["devices"],
            "shell": {},
            "serve": serve,
            "nodes": ask_nodes(serve, request),
        }
    finally:
        ray.shutdown()


def by_job(url: str, request: Request) -> Facts:
    """Ask by a job that runs on the head, through the dashboard.

    Raises:
        Unreachable: there is no dashboard, or the job came to nothing.
    """
    from ray.dashboard.modules import dashboard_sdk
    from ray.job_submission import JobStatus, JobSubmissionClient

    dashboard_sdk.logger.setLevel(logging.ERROR)  # it tells of each upload
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(url)
    except (ConnectionError, RuntimeError) as error:
        raise Unreachable(f"no Ray dashboard answers at {url}: {_short(error)}") from error
    try:
        job = _submit(client, request)
        deadline = time.monotonic() + _JOB_S + request["timeout_s"]
        while not (status := client.get_job_status(job)).is_terminal():
            if time.monotonic() > deadline:
                client.stop_job(job)
                raise Unreachable(f"the doctor's job at {url} did not end in time")
            time.sleep(0.5)
        logs = client.get_job_logs(job)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise Unreachable(f"the dashboard at {url} ran no job: {_short(error)}") from error
    if status != JobStatus.SUCCEEDED:
        last = (logs.strip().splitlines() or ["it wrote nothing"])[-1][:300]
        raise Unreachable(f"the doctor's job at {url} ended as {status}: {last}")
    return read_answer(logs)


def _submit(client: Any, request: Request) -> str:
    """Submit the job; a cluster that has just started may have nobody yet to take it."""
    folder = Path(tempfile.mkdtemp(prefix="dmx-"))
    try:
        (folder / "cluster").mkdir()
        for file in _FILES:
            shutil.copy(Path(__file__).parent / file, folder / "cluster" / file)
        deadline = time.monotonic() + request["timeout_s"]
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint="python -m cluster.doctor_facts",
                        runtime_env={
                            "working_dir": str(folder),
                            "env_vars": {"DATAMIX_DOCTOR": json.dumps(request)},
                        },
                        entrypoint_num_cpus=0,
                    )
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())[:300]


def read_answer(logs: str) -> Facts:
    """The facts in what a job has written.

    Raises:
        Unreachable: they are not there.
    """
    lines = [line for line in logs.splitlines() if line.startswith(MARK)]
    if len(lines) != 1:
        raise Unreachable(f"the doctor's job wrote {len(lines)} answers, expected 1")
    answer: Facts = json.loads(lines[0].removeprefix(MARK))
    return answer


# ------------------------------------------------------------------ Serve


def ask_serve(timeout_s: float) -> Serve:
    """What Serve's controller says of itself, in at most ``timeout_s``."""
    import ray
    from ray.exceptions import RayError

    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return _no_serve("it does not run on this cluster")
    try:
        answer: Any = controller.get_serve_instance_details.remote()
        details: dict[str, Any] = ray.get(answer, timeout=timeout_s)
    except RayError as error:  # a time-out, too
        return _no_serve(f"its controller did not answer: {type(error).__name__}")
    served = read_serve(details)
    for application in served["applications"]:
        if not application["bundles"]:
            application["bundles"] = ask_bundles(application["name"], timeout_s)
    return served


def _no_serve(error: str) -> Serve:
    return {"error": error, "host": "", "port": 0, "proxies": {}, "applications": []}


def read_serve(details: dict[str, Any]) -> Serve:
    """The parts that the checks look at, of ``ServeInstanceDetails`` as a dictionary."""
    http = details.get("http_options") or {}
    return {
        "error": "",
        "host": http.get("host") or "",
        "port": http.get("port") or 8000,
        "proxies": {
            node: _text(proxy["status"]) for node, proxy in (details.get("proxies") or {}).items()
        },
        "applications": [_application(a) for a in (details.get("applications") or {}).values()],
    }


def _application(details: dict[str, Any]) -> Application:
    arguments = (details.get("deployed_app_config") or {}).get("args") or {}
    bundle = arguments.get("bundle") or []
    return {
        "name": details["name"],
        "status": _text(details["status"]),
        "message": " ".join(details.get("message", "").split())[-200:],
        "bundles": [bundle] if isinstance(bundle, str) else list(bundle),
        "deployments": [_deployment(d) for d in (details.get("deployments") or {}).values()],
    }


def _deployment(details: dict[str, Any]) -> Deployment:
    config = details["deployment_config"]
    scaling = config.get("autoscaling_config") or {}
    policy = scaling.get("policy") or {}
    delays = [scaling.get(f"{way}scale_delay_s") for way in ("up", "down")]
    return {
        "name": details["name"],
        "status": _text(details["status"]),
        "message": " ".join(details.get("message", "").split())[-200:],
        "max_ongoing_requests": config.get("max_ongoing_requests") or 5,
        "health_check_period_s": config.get("health_check_period_s") or 10,
        "health_check_timeout_s": config.get("health_check_timeout_s") or 30,
        "policy": str(policy.get("policy_function", "default")) if scaling else "",
        "delays_s": [float(delay) for delay in delays if delay is not None],
        "replicas": len(details.get("replicas") or []),
        "resources": {
            name: float(amount)
            for name, amount in (details.get("required_resources") or {}).items()
            if isinstance(amount, (int, float))
        },
    }


def _text(value: Any) -> str:
    """An enumeration's value, whether Serve gives it as such or as text."""
    return str(getattr(value, "value", value))


def ask_bundles(application: str, timeout_s: float) -> list[str]:
    """The bundles that an application's replicas serve; none where it is not one of ours."""
    from ray import serve

    try:
        handle = serve.get_app_handle(application)
        answers = handle.broadcast("models", False).results(timeout_s=timeout_s)
        found = [model["bundle"] for answer in answers for model in answer["models"]]
    except Exception:  # not ours, or not answering: another check says the latter
        return []
    return list(dict.fromkeys(bundle for bundle in found if bundle))


# ------------------------------------------------------------------ nodes


def ask_nodes(serve: Serve, request: Request) -> list[Node]:
    """Send one task to each node, and wait for all of them together."""
    import ray
    from ray import cloudpickle

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    table = sorted(known, key=lambda entry: (not entry["Alive"], entry["NodeID"]))
    nodes = {entry["NodeID"]: read_node(entry, table, serve) for entry in table}
    wanted = what_to_ask(serve, request)
    # The nodes have no `cluster`: the functions travel with the tasks.
    cloudpickle.register_pickle_by_value(doctor_node)  # type: ignore[no-untyped-call]
    try:
        answers = _on_nodes(doctor_node.examine, nodes, request["timeout_s"], wanted)
        for identity, answer in answers.items():
            if isinstance(answer, str):
                nodes[identity]["error"] = answer
            else:
                nodes[identity]["facts"] = answer
        answering = {key: node for key, node in nodes.items() if node["facts"] is not None}
        for identity, (ahead, error) in read_clocks(answering, request["timeout_s"]).items():
            nodes[identity]["clock_s"], nodes[identity]["clock_error_s"] = ahead, error
    finally:
        cloudpickle.unregister_pickle_by_value(doctor_node)  # type: ignore[no-untyped-call]
    return list(nodes.values())


def what_to_ask(serve: Serve, request: Request) -> Wanted:
    """What every node is asked: the bundles that are served or named, and Serve's front door."""
    served = [bundle for app in serve["applications"] for bundle in app["bundles"]]
    host = serve["host"] if serve["host"] not in ("", "0.0.0.0", "::") else "127.0.0.1"
    return {
        "packages": request["packages"],
        "bundles": list(dict.fromkeys([*request["bundles"], *served])),
        "ports": [serve["port"]] if serve["port"] else [8000],
        "front_door": f"http://{host}:{serve['port']}/-/healthz" if serve["port"] else "",
    }


def read_node(entry: dict[str, Any], table: list[dict[str, Any]], serve: Serve) -> Node:
    """A node of Ray's table, before it was asked."""
    address = entry["NodeManagerAddress"]
    shared = sum(other["NodeManagerAddress"] == address for other in table) > 1
    resources = entry.get("Resources") or {}
    return {
        "name": f"{address} ({entry['NodeID'][:6]})" if shared else address,
        "alive": entry["Alive"],
        "head": _HEAD in resources,
        "resources": {name: resources[name] for name in ("CPU", "GPU") if name in resources},
        "front_door": entry["NodeID"] in serve["proxies"],
        "facts": None,
        "error": "" if entry["Alive"] else "Ray counts it as dead",
        "clock_s": 0.0,
        "clock_error_s": 0.0,
    }


def _on_nodes(
    function: Any, nodes: dict[str, Node], timeout_s: float, *arguments: Any
) -> dict[str, Any]:
    """What ``function`` returns on each living node, or a text that says why it does not."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    pending = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(identity, soft=False)
        ).remote(*arguments): identity
        for identity, node in nodes.items()
        if node["alive"]
    }
    ready, late = ray.wait(list(pending), num_returns=max(1, len(pending)), timeout=timeout_s)
    found: dict[str, Any] = {}
    for reference in ready:
        try:
            found[pending[reference]] = ray.get(reference)
        except RayError as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            found[pending[reference]] = f"it could not be asked: {last.strip()[:200]}"
    for reference in late:
        ray.cancel(reference, force=True)
        found[pending[reference]] = f"no answer in {timeout_s:g} s"
    return found


def read_clocks(nodes: dict[str, Node], timeout_s: float) -> dict[str, tuple[float, float]]:
    """How far each node's clock is ahead of ours, and by how much that may be wrong, in seconds.

    The node's time lies between our sending and our receiving; of several rounds the quickest
    counts. The first finds the worker warm that :func:`doctor_node.examine` has left.
    """
    found: dict[str, tuple[float, float]] = {}
    for identity, node in nodes.items():
        for _ in range(_CLOCK_ROUNDS):
            sent = time.time()
            there = _on_nodes(doctor_node.clock, {identity: node}, timeout_s)[identity]
            received = time.time()
            if isinstance(there, str):
                break
            reading = clock_offset(sent, there, received)
            if identity not in found or reading[1] < found[identity][1]:
                found[identity] = reading
    return found


def clock_offset(sent: float, there: float, received: float) -> tuple[float, float]:
    """Offset and its largest error of a clock that was read between two moments of ours."""
    return there - (sent + received) / 2, max(0.0, received - sent) / 2


def main() -> None:
    """Answer as a job: one line on stdout."""
    request: Request = json.loads(os.environ["DATAMIX_DOCTOR"])
    print(MARK + json.dumps(by_ray("auto", request)), flush=True)


if __name__ == "__main__":
    main()
