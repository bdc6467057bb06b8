"""Clusters for benchmarks, each in a process of its own: ours, and the same work on default Serve.

``start(name, ...)`` runs this file as a script; it prints one JSON line with the URL when ready and
lives until its standard input closes. Its processes carry a mark in their environment, so that
their CPU time can be told from everybody else's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import accounting


@contextlib.contextmanager
def start(name: str, **options: Any) -> Iterator[str]:
    """Start cluster ``ours`` or ``default``; yields its base URL; its mark is ``name``."""
    with start_saying(name, **options) as said:
        yield str(said["url"])


@contextlib.contextmanager
def start_saying(name: str, **options: Any) -> Iterator[dict[str, Any]]:
    """Start a cluster, also ``bare``, ``operators`` or ``transports``; yields what it says.

    Its mark is ``name``.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.clusters", name, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=accounting.environment(name),
        # Ctrl-C reaches the whole group; the cluster is told by its closing input instead.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
                return
        raise RuntimeError(f"cluster {name!r} did not start")
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _serve_until_told(url: str, **more: Any) -> None:
    print(json.dumps({"url": url, **more}), flush=True)
    sys.stdin.read()


def _ours(options: dict[str, Any]) -> None:
    from cluster.local import local_cluster
    from deployments.config import Config

    replicas = options.pop("replicas", 1)
    with local_cluster(Config(**options), replicas=replicas) as running:
        _serve_until_told(running.url)


def _operators(options: dict[str, Any]) -> None:
    """An application for each of two operators, behind one front door."""
    from cluster.local import local_operators
    from deployments.config import Config

    with local_operators(Config(**options), ("operator-a", "operator-b")) as urls:
        _serve_until_told(urls[0], second=urls[1])


def _bare(options: dict[str, Any]) -> None:
    """Ray with its dashboard and no application: whoever started it deploys."""
    from cluster.local import free_port, local_ray

    # Serve imports the application in processes that know nothing of this one's path. And Ray gives
    # them this one's folder before all others, where other code is deployed or not.
    os.environ["PYTHONPATH"] = os.getcwd()
    os.chdir("/")
    os.environ.update(options.get("environment", {}))
    port = free_port()
    with local_ray(options["replicas"], dashboard_port=port) as address:
        url = f"http://127.0.0.1:{free_port()}"
        _serve_until_told(url, address=address, dashboard=f"http://127.0.0.1:{port}")


def _default(options: dict[str, Any]) -> None:
    """The same echo on Serve as its tutorial writes it: Python proxy and ``@serve.batch``."""
    os.environ.update(
        RAY_SERVE_ENABLE_HA_PROXY="0",
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        # Only so that it stops quickly; it changes nothing while it serves.
        RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S="0.5",
    )
    import tempfile

    import ray
    from ray import serve

    from benchmarks.default_app import Echo
    from cluster.local import free_port, wait_ready

    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dmx-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            deployment = serve.deployment(max_ongoing_requests=10_000)(Echo)
            serve.run(deployment.bind(**options), route_prefix="/")
            wait_ready(f"http://127.0.0.1:{port}", 60)
            _serve_until_told(f"http://127.0.0.1:{port}")
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _transports(options: dict[str, Any]) -> None:
    """The product's replica behind every transport, in HAProxy mode."""
    from benchmarks import transports_app
    from cluster.local import free_port, free_ports, local_ray, wait_ready
    from deployments.config import Config

    port, grpc_port, applications = free_port(), free_port(), options["applications"]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(free_ports(100))
        os.environ.update(transports_app.grpc_ports(first, 100))
        stack.enter_context(local_ray(len(applications)))
        transports_app.deploy(Config(**options["config"]), applications, port, grpc_port)
        for name in applications:
            wait_ready(f"http://127.0.0.1:{port}/{name}", 60)
        _serve_until_told(f"http://127.0.0.1:{port}", grpc_port=grpc_port)


def _metered(options: dict[str, Any]) -> None:
    """Replicas that know what their metrics cost them; also says where their node is scraped."""
    # Before Ray reads it: how often the agent hears of metrics.
    interval_ms = options.get("report_interval_ms", 10_000)
    os.environ.update({"RAY_metrics_report_interval_ms": str(interval_ms)})
    from benchmarks import telemetry_app
    from cluster.local import free_port, local_ray, wait_ready
    from deployments.config import Config

    port = free_port()
    configs = {name: Config(**config) for name, config in options["configs"].items()}
    replicas = options.get("replicas", 1)
    with local_ray(replicas * len(configs)):
        import ray

        telemetry_app.deploy(configs, port, replicas)
        for name in configs:
            wait_ready(f"http://127.0.0.1:{port}/{name}", 120)
        (node,) = ray.nodes()  # type: ignore[no-untyped-call]
        metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        _serve_until_told(f"http://127.0.0.1:{port}", metrics=metrics)


if __name__ == "__main__":
    kinds = {
        "metered": _metered,
        "ours": _ours,
        "operators": _operators,
        "bare": _bare,
        "default": _default,
        "transports": _transports,
    }
    kinds[sys.argv[1]](json.loads(sys.argv[2]))
