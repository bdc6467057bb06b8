"""`datamix monitor`: a real Prometheus, wired to a running cluster, gone at Ctrl-C.

It starts from `prometheus.yml` beside this file, with the same rules and alerts; the targets are
the cluster's nodes as Ray knows them, asked for anew every few seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.monitoring.live import Live, Prometheus, serving
from datamix.errors import ConfigError, Unavailable

FOLDER = Path(__file__).parent
_REFRESH_S = 5.0  # between two looks at which nodes there are
_START_S, _STOP_S = 60.0, 20.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # loaded before there are threads that could hold the loader's lock

logger = logging.getLogger(__name__)

Targets = Callable[[], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Options:
    """How to watch.

    Attributes:
        port: of Prometheus on this machine; 0 for a free one.
        binary: Prometheus; None for the one on the PATH.
        data: folder for what it records, kept; None for one that goes with it.
        gpu_exporters: ``host:port`` of each `datamix gpu-exporter`.
        fleets: ``host:port`` of the metrics of each fleet of simulated devices.
        interval_s: between two scrapes, and two evaluations of the rules.
        page_port: of the live page, with the run-books; 0 for a free one, None for no page.
    """

    port: int = 9090
    binary: str | None = None
    data: Path | None = None
    gpu_exporters: tuple[str, ...] = ()
    fleets: tuple[str, ...] = ()
    interval_s: int = 10
    page_port: int | None = 9400


def monitor(
    address: str,
    options: Options,
    *,
    wait: Callable[[Callable[[], bool]], None],
    say: Callable[[str], None],
) -> None:
    """Watch the cluster at ``address`` until ``wait`` returns.

    Args:
        address: a running Ray cluster, ``auto`` or ``host:port``.
        options: how.
        wait: is given what says that Prometheus has ended by itself.
        say: called with one line of progress at a time.

    Raises:
        ConfigError: there is no Prometheus here, or its port is taken.
        Unavailable: the cluster cannot be reached, or Prometheus does not start or ended by itself.
    """
    binary = find_prometheus(options.binary)
    with contextlib.ExitStack() as stack:
        targets = stack.enter_context(nodes_of(address))
        url, process = stack.enter_context(prometheus(binary, targets, options))
        say(f"watching {len(targets())} node(s); alerts: {url}/alerts")
        if options.page_port is not None:
            page = stack.enter_context(_page(url, options.page_port))
            print(f"page at {page}", flush=True)
        print(f"Prometheus at {url}, Ctrl-C ends it", flush=True)
        wait(lambda: process.poll() is not None)
        if process.poll() is not None:
            raise Unavailable(f"Prometheus ended by itself with code {process.returncode}")


@contextlib.contextmanager
def _page(url: str, port: int) -> Iterator[str]:
    with (
        contextlib.closing(Prometheus(url)) as source,
        contextlib.closing(Live(source)) as live,
        serving(live, port=port) as page,
    ):
        yield page


def find_prometheus(binary: str | None = None) -> str:
    """The program.

    Raises:
        ConfigError: it is not there; says how to get it.
    """
    found = shutil.which(binary or "prometheus")
    if found is None:
        where = f"at {binary!r}" if binary else "on the PATH"
        raise ConfigError(
            f"no Prometheus {where}: apt install prometheus (Debian, Ubuntu), or unpack it from "
            "prometheus.io/download and name it with --prometheus"
        )
    return found


@contextlib.contextmanager
def nodes_of(address: str) -> Iterator[Targets]:
    """Connect to a Ray cluster; what is given says ``host:port`` of each living node's metrics.

    Raises:
        Unavailable: there is none.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield lambda: [
            f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
    finally:
        ray.shutdown()


@contextlib.contextmanager
def prometheus(
    binary: str, targets: Targets, options: Options
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run Prometheus on 127.0.0.1; give its URL once it is ready, and its process.

    Raises:
        ConfigError: the port is taken.
        Unavailable: it ended, or was not ready in time; says why.
    """
    from cluster.local import check_port, free_port

    port = options.port or free_port()
    check_port(port)
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dmx-monitor-")))
        stack.enter_context(_following(targets, folder / "nodes.json"))
        config = folder / "prometheus.json"  # JSON is YAML
        config.write_text(json.dumps(configuration(folder / "nodes.json", options), indent=1))
        data = options.data or folder / "data"
        log = stack.enter_context(open(folder / "log", "wb"))
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={data}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            # The terminal's Ctrl-C is ours to pass on, in order; and it does not outlive us.
            start_new_session=True,
            preexec_fn=partial(_end_with, os.getpid()),
        )
        try:
            _wait_ready(url, process, folder / "log")
            yield url, process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def configuration(nodes: Path, options: Options) -> dict[str, Any]:
    """`prometheus.yml` with these targets, and rules found from anywhere."""
    import yaml

    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    every = f"{options.interval_s}s"
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["ray"]["file_sd_configs"] = [{"files": [str(nodes)], "refresh_interval": "5s"}]
    jobs["datamix-gpu"]["static_configs"] = [{"targets": list(options.gpu_exporters)}]
    jobs["datamix-fleet"]["static_configs"] = [{"targets": list(options.fleets)}]
    return config


@contextlib.contextmanager
def _following(targets: Targets, path: Path) -> Iterator[None]:
    """Keep a file of targets up to date."""
    ended = threading.Event()

    def write() -> None:
        found = list(targets())
        if not found and path.exists():
            raise Unavailable("Ray names none")  # it was asked while it was busy: one answers us
        new = path.with_suffix(".new")
        new.write_text(json.dumps([{"targets": found}]))
        new.replace(path)

    def follow() -> None:
        while not ended.wait(_REFRESH_S):
            try:
                write()
            except Exception as error:  # what was known last stays, and its nodes show as down
                logger.warning("the cluster's nodes are not known: %s", error)

    write()
    thread = threading.Thread(target=follow, name="targets", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_REFRESH_S)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.1)
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise Unavailable(f"Prometheus did not start: {last}")


def _end_with(parent: int) -> None:
    """In the child: end when the parent does, however that comes."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it is gone already
        os._exit(1)
