"""An embedded cluster on this machine: its own Ray session, free ports, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cluster.rollout import last_error
from datamix.errors import ConfigError, Unavailable
from datamix.limits import raise_descriptor_limit

if TYPE_CHECKING:
    from deployments.config import Config

APPLICATION = "datamix"
_PORTS = 100  # for replicas

# Read by Ray when it is imported, and by every process it starts: all of this must stand in the
# environment before. On a real cluster the first three stand in cluster.yaml.
_MODE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # HAProxy that dies is replaced after three of these, and every device of its node waits.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
}
# One machine, one session, one user: no telemetry, no tokens, and no waiting for load balancers
# that are not there when it stops. Never for production.
_EMBEDDED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    # A busy laptop may need more than Ray's 5 s to start HAProxy, which Ray would kill then.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ray would otherwise ship the whole working folder's environment to each worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running embedded cluster.

    Attributes:
        url: base URL of the front door, ``http://127.0.0.1:port``.
        address: Ray's own address, for other Ray programs.
        port: the front door's port.
    """

    url: str
    address: str
    port: int


def absolute(bundle: str) -> str:
    """A local folder as an absolute path, since replicas run in a folder of their own."""
    return str(Path(bundle).resolve()) if Path(bundle).exists() else bundle


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on right now.

    Below those that the kernel gives to connections: one of Ray's many could have it before whoever
    is to listen there, and below the replicas' (:func:`free_ports`).

    Raises:
        ConfigError: there is none.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(10_000, 20_000)
        try:
            check_port(port)
        except ConfigError:
            continue
        return port
    raise ConfigError("found no free port between 10000 and 20000")


def check_port(port: int) -> None:
    """Refuse a port that is taken.

    Raises:
        ConfigError: somebody listens there, or it may not be bound.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used ({error.strerror}), choose another with --port"
            ) from error


@contextlib.contextmanager
def free_ports(size: int) -> Iterator[int]:
    """Start of ``size`` ports in a row that are ours until the end, below the ephemeral range.

    A replica that dies leaves its port free for a moment. Another cluster on this machine that took
    it would be sent our devices' requests by our HAProxy, so each range is locked by its cluster.
    """
    starts = list(range(20000, 32000, size))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        with contextlib.ExitStack() as held:
            try:
                path = Path(tempfile.gettempdir()) / f"datamix-ports-{start}"
                lock = held.enter_context(open(path, "w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for port in range(start, start + size):
                    check_port(port)
            except (ConfigError, OSError):  # taken, or locked by another cluster or user
                continue
            yield start
            return
    raise ConfigError("found no free range of ports between 20000 and 32000 for the replicas")


def max_streams(descriptors: int) -> int:
    """How many connections HAProxy can be told to allow under a limit of ``descriptors``.

    It refuses to start where they do not suffice: two sockets per connection, and with Ray's
    ``option splice-*`` a pipe of two descriptors for every fourth.
    """
    return int((descriptors - 200) / 2.5)


def _set_environment(folder: Path, descriptors: int, replica_ports: int) -> None:
    if "ray" in sys.modules and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        raise ConfigError(
            "Ray was imported before RAY_SERVE_ENABLE_HA_PROXY=1 was set, so it would start "
            "without HAProxy; import it later or set the variable first"
        )
    own = {
        "RAY_SERVE_HAPROXY_MAXCONN": str(min(50_000, max_streams(descriptors))),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, (os.cpu_count() or 1) // 2)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        # Where HAProxy turns while no replica is up: another cluster's would answer for ours.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports + _PORTS - 1),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }
    os.environ.update(_MODE | _EMBEDDED | own)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done.

    An interrupt in the middle of ``ray.init`` crashes Ray's native code when it is shut down then,
    and one in the middle of a shutdown leaves processes behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def local_cluster(
    config: Config,
    *,
    port: int | None = None,
    replicas: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[LocalCluster]:
    """Start Ray on this machine, deploy ``config``, wait until it answers; take all of it down.

    Args:
        config: the application's settings.
        port: the front door's port on 127.0.0.1; None for a free one.
        replicas: how many replicas to run.
        say: called with one line of progress before each step.

    Raises:
        ConfigError: the port is taken, or Ray was imported too early.
        Unavailable: the application did not come up.
    """
    if port is None:
        port = free_port()
    else:
        check_port(port)
    with local_ray(replicas, say=say) as address:
        say("deploying the backbone")
        url = deploy(config, port=port, replicas=replicas)
        yield LocalCluster(url, address, port)


@contextlib.contextmanager
def local_ray(
    replicas: int = 1,
    *,
    dashboard_port: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Start Ray on this machine, ready for Serve in HAProxy mode; take both down in the end.

    Args:
        replicas: how many replicas will have to fit.
        dashboard_port: where Ray's dashboard listens, which `datamix deploy` needs; None for none.
        say: called with one line of progress before each step.

    Yields:
        Ray's own address.

    Raises:
        ConfigError: Ray was imported too early.
    """
    # Short, because unix socket paths end at 107 characters; Ray and HAProxy add long names.
    folder = Path(tempfile.mkdtemp(prefix="dmx-"))
    held = contextlib.ExitStack()
    try:
        _set_environment(folder, raise_descriptor_limit(), held.enter_context(free_ports(_PORTS)))
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        say("starting Ray")
        try:
            with _uninterrupted():
                ray.init(
                    address="local",
                    # Logical, not real: the replica and Serve's own actors must fit anywhere.
                    num_cpus=max(4, replicas + 3),
                    object_store_memory=100 << 20,
                    include_dashboard=dashboard_port is not None,
                    dashboard_port=dashboard_port,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                    _temp_dir=str(folder),
                )
            yield ray.get_runtime_context().gcs_address
        finally:
            say("taking the cluster down")
            if ray.is_initialized():
                # Ray prints "ServeController.graceful_shutdown failed" to stdout on the way out
                # (the controller dies while it answers); stdout belongs to reports and --json.
                with _uninterrupted(), contextlib.redirect_stdout(io.StringIO()):
                    try:
                        serve.shutdown()  # type: ignore[no-untyped-call]
                    finally:
                        ray.shutdown()
    finally:
        held.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def local_operators(
    config: Config,
    names: Sequence[str],
    *,
    port: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[str]]:
    """One Ray with an application for each operator, behind a route prefix of its own.

    They are told apart by name only: whoever runs this machine sees what all of them get.

    Args:
        config: settings of all applications, but for ``operator``.
        names: of the operators, each also its application's name and prefix.
        port: see :func:`local_cluster`.
        say: likewise.

    Yields:
        The base URL of each.

    Raises:
        ConfigError: the port is taken, or Ray was imported too early.
        Unavailable: an application did not come up.
    """
    if port is None:
        port = free_port()
    else:
        check_port(port)
    with local_ray(len(names), say=say):
        urls = []
        for name in names:
            say(f"deploying the backbone of {name}")
            own = config.model_copy(update={"operator": name})
            urls.append(deploy(own, port=port, name=name, prefix=f"/{name}"))
        yield urls


def deploy(
    config: Config,
    *,
    port: int,
    replicas: int = 1,
    host: str = "127.0.0.1",
    timeout_s: float = 90,
    name: str = APPLICATION,
    prefix: str = "/",
) -> str:
    """Deploy on the cluster that Ray is connected to and wait until it answers; return the URL.

    Args:
        config: the application's settings.
        port: the front door's port.
        replicas: how many replicas to run.
        host: what the front door listens on.
        timeout_s: how long it may take to answer.
        name: of the application; one of the same name is replaced.
        prefix: the path under which it is found.

    Raises:
        Unavailable: the application failed, or did not answer in ``timeout_s``.
    """
    from ray import serve

    from deployments.app import bind

    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(bind(config, num_replicas=replicas), name=name, route_prefix=prefix)
    except RuntimeError as error:
        raise Unavailable(f"the application did not start: {_reason(error, name)}") from error
    url = f"http://127.0.0.1:{port}{prefix.rstrip('/')}"
    wait_ready(url, timeout_s)
    return url


def _reason(error: RuntimeError, name: str) -> str:
    """The last line of the replica's traceback, which Serve keeps in the deployment's status."""
    from ray import serve

    texts = [str(error)]
    application = serve.status().applications.get(name)
    if application is not None:
        texts += [deployment.message for deployment in application.deployments.values()]
    return last_error(texts)


def wait_ready(url: str, timeout_s: float) -> None:
    """Wait until ``GET /v2/health/ready`` answers 200.

    Raises:
        Unavailable: it did not in ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
                if json.load(answer).get("ready"):
                    return
        except (OSError, ValueError) as error:
            last = str(error)
        time.sleep(0.1)
    raise Unavailable(f"{url} was not ready after {timeout_s:g} s: {last}")
