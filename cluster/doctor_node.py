"""What one node says of itself to the doctor: looked up there, judged elsewhere.

A node of the cloud has no `cluster/`: what stands here is sent to it by value, so it imports
nothing of ours, only the standard library and what every node has. It reads; it changes nothing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

# Of a node's environment only what Ray's behaviour hangs on: the rest is nobody's business.
_SHOWN = ("RAY_SERVE_*", "RAY_AUTH_MODE", "RAY_TMPDIR", "PYTHONPATH")
_DEVICE_FILES = ("device.safetensors", "*.onnx")
_ACTORS = {
    "ServeController": "controller",
    "ProxyActor": "proxy",
    "HAProxyManager": "HAProxy's manager",
    "ServeReplica": "replica",
}
# In a process of its own, so that the search path is a replica's and not that of the doctor's job.
_FIND_CODE = """
import importlib.util, json
def place(name):
    spec = importlib.util.find_spec(name)
    return spec and (spec.origin or next(iter(spec.submodule_search_locations), None))
print(json.dumps({name: place(name) for name in ("datamix", "deployments", "edge")}))
"""


class Wanted(TypedDict):
    """What a node is asked."""

    packages: list[str]
    bundles: list[str]
    ports: list[int]
    front_door: str


class Room(TypedDict):
    """Bytes of the file system that holds ``folder``."""

    folder: str
    total: int
    free: int


class BundleSeen(TypedDict):
    """A bundle as a node sees it: the digest of its manifest, or why it cannot be used."""

    digest: str
    error: str
    device_files: list[str]


class Actor(TypedDict):
    """A process of Serve's, with the variables it was started with."""

    kind: str
    environment: dict[str, str]


class HAProxy(TypedDict):
    """The running HAProxy: its own settings, and how many files it may open."""

    maxconn: int
    threads: int
    descriptors: int


class Answered(TypedDict):
    """How the front door answered on the node itself: status (0: not at all), Server, or why."""

    status: int
    server: str
    reason: str


class NodeFacts(TypedDict):
    """All that a node says of itself; sizes in bytes."""

    hostname: str
    python: str
    packages: dict[str, str]
    code: dict[str, str]
    edge: str
    environment: dict[str, str]
    actors: list[Actor]
    haproxy: HAProxy | None
    descriptors: int
    cpus: int
    gpu_driver: str
    local_ports: int
    listeners: dict[str, str]
    front_door: Answered
    token_file: bool
    disk: Room
    shared_memory: Room
    bundles: dict[str, BundleSeen]


def clock() -> float:
    """This node's time, in seconds."""
    return time.time()


def examine(wanted: Wanted) -> NodeFacts:
    """Look at this node; to be run by a worker of Ray's on it."""
    import psutil

    raylet = psutil.Process().parent()
    environment, folder, session = dict(os.environ), os.getcwd(), None
    siblings: list[Any] = []
    if raylet is not None and raylet.name() == "raylet":
        environment, folder, siblings = raylet.environ(), raylet.cwd(), raylet.children()
        session = session_folder(raylet.cmdline())
    actors, haproxy = serve_processes(siblings)
    places = find_code(environment)
    return {
        "hostname": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: installed(name) for name in wanted["packages"]},
        "code": {name: digest_code(places[name]) for name in ("datamix", "deployments")},
        "edge": places["edge"],
        "environment": shown(environment),
        "actors": actors,
        "haproxy": haproxy,
        "descriptors": hard_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "cpus": os.cpu_count() or 1,
        "gpu_driver": gpu_driver(Path("/")),
        "local_ports": local_ports(Path("/")),
        "listeners": listeners(wanted["ports"], psutil),
        "front_door": ask(wanted["front_door"]),
        "token_file": token_file(environment),
        "disk": room(Path(session or environment.get("RAY_TMPDIR") or "/tmp")),
        "shared_memory": room(Path("/dev/shm")),
        "bundles": {bundle: see_bundle(bundle, folder) for bundle in wanted["bundles"]},
    }


def shown(environment: dict[str, str]) -> dict[str, str]:
    """The variables that matter here, and no other: they may be secrets."""
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SHOWN)
    }


def session_folder(arguments: list[str]) -> str | None:
    """Ray's session folder from the arguments of its raylet."""
    found = [re.match(r"--session_dir=(.+)", argument) for argument in arguments]
    return next((match[1] for match in found if match), None)


def serve_processes(processes: list[Any]) -> tuple[list[Actor], HAProxy | None]:
    """Serve's actors among a raylet's children, and the HAProxy that one of them has started."""
    actors: list[Actor] = []
    haproxy: HAProxy | None = None
    for process in processes:
        try:
            title = " ".join(process.cmdline())
            kind = next((kind for name, kind in _ACTORS.items() if f"ray::{name}" in title), None)
            if kind is None:
                continue
            actors.append({"kind": kind, "environment": shown(process.environ())})
            # After a reload the old one drains beside the new: the youngest counts.
            own = [child for child in process.children() if child.name() == "haproxy"]
            if own:
                haproxy = describe_haproxy(max(own, key=lambda child: child.create_time()))
        except Exception as error:
            # It ended while we looked.
            if type(error).__module__.partition(".")[0] != "psutil":
                raise
    return actors, haproxy


def describe_haproxy(process: Any) -> HAProxy:
    """The settings that a running HAProxy was started with."""
    arguments = process.cmdline()
    text = Path(arguments[arguments.index("-f") + 1]).read_text()
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    hard = re.search(r"^Max open files\s+\S+\s+(\S+)", limits, re.MULTILINE)
    number = hard[1] if hard else "0"
    return {
        "maxconn": setting("maxconn", text),
        "threads": setting("nbthread", text),
        "descriptors": hard_limit(-1 if number == "unlimited" else int(number)),
    }


def setting(name: str, text: str) -> int:
    """A number of HAProxy's configuration, the first of that name; 0 where it is not there."""
    found = re.search(rf"^\s*{name}\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def hard_limit(value: int) -> int:
    """A limit as a number that can be compared."""
    return sys.maxsize if value in (-1, resource.RLIM_INFINITY) else value


def installed(package: str) -> str:
    """The installed release without its build tag (``+cpu``); empty where there is none."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def find_code(environment: dict[str, str]) -> dict[str, str]:
    """Where a process with this environment finds our packages; empty where it does not."""
    found = subprocess.run(
        # Without the working folder, which replicas do not search.
        [sys.executable, "-P", "-c", _FIND_CODE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return {name: place or "" for name, place in json.loads(found.stdout).items()}


def digest_code(place: str) -> str:
    """One digest of all Python files of the package that lies at ``place``."""
    if not place:
        return ""
    path = Path(place)
    folder = path if path.is_dir() else path.parent
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:12]


def gpu_driver(root: Path) -> str:
    """The release of NVIDIA's driver under ``root``; empty where there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found[1] if found else "unknown"


def local_ports(root: Path) -> int:
    """How many connections this node may open to one address and port; 0 where nothing says so."""
    try:
        low, high = (root / "proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return 0
    return int(high) - int(low) + 1


def listeners(ports: list[int], psutil: Any) -> dict[str, str]:
    """Who listens on each of these ports: a process's name, or ``another user``."""
    wanted, found = set(ports), {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in wanted:
            found[str(connection.laddr.port)] = owner(connection.pid, psutil)
    return found


def owner(pid: int | None, psutil: Any) -> str:
    """What a listening process calls itself."""
    if pid is None:
        return "another user"
    try:
        process = psutil.Process(pid)
        title = " ".join(process.cmdline())
        return str(title.split()[0] if title.startswith("ray::") else process.name())
    except psutil.Error:
        return "another user"


def ask(url: str) -> Answered:
    """Status and ``Server`` header of a GET, past any proxy of this machine's environment."""
    if not url:
        return {"status": 0, "server": "", "reason": "not asked"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=3) as answer:
            return {
                "status": answer.status,
                "server": answer.headers.get("server", ""),
                "reason": "",
            }
    except urllib.error.HTTPError as error:
        with error:
            return {
                "status": error.code,
                "server": error.headers.get("server", ""),
                "reason": "",
            }
    except (OSError, ValueError) as error:
        return {"status": 0, "server": "", "reason": str(getattr(error, "reason", error))}


def token_file(environment: dict[str, str]) -> bool:
    """Whether Ray would find a token, which turns its authentication on where nothing is said."""
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    home = Path(environment.get("HOME") or "/root")
    return (Path(named) if named else home / ".ray" / "auth_token").is_file()


def room(folder: Path) -> Room:
    """The file system of a folder; nothing free where it does not exist."""
    if not folder.is_dir():
        return {"folder": str(folder), "total": 0, "free": 0}
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "total": usage.total, "free": usage.free}


def see_bundle(bundle: str, folder: str) -> BundleSeen:
    """A bundle as replicas on this node find it, who start in ``folder``."""
    try:
        manifest = read(bundle, folder, "manifest.json")
        weights = read(bundle, folder, "backbone.safetensors")
        expected = json.loads(manifest)["hashes"]["backbone.safetensors"]
        kept = device_files(Path(folder, bundle))
    except Exception as error:  # whatever it is, it is what the doctor reports
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return {"digest": "", "error": " ".join(reason.split())[:200], "device_files": []}
    wrong = hashlib.sha256(weights).hexdigest() != expected
    return {
        "digest": hashlib.sha256(manifest).hexdigest()[:12],
        "error": "backbone.safetensors differs from the manifest's hash" if wrong else "",
        "device_files": kept,
    }


def read(bundle: str, folder: str, file: str) -> bytes:
    """A file of a bundle, by path or by ``pyarrow.fs`` URI."""
    if "://" not in bundle:
        return Path(folder, bundle, file).read_bytes()
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(bundle)
    with system.open_input_stream(f"{path}/{file}") as stream:
        return bytes(stream.read())


def device_files(folder: Path) -> list[str]:
    """The files of a bundle's folder that are the device's."""
    if not folder.is_dir():
        return []
    return sorted(
        file.name
        for file in folder.iterdir()
        if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _DEVICE_FILES)
    )
