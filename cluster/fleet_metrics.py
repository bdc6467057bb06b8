"""`datamix simulate --metrics HOST:PORT`: what simulated devices see, for Prometheus.

Under the names of the one table, without Ray's prefix, as `datamix gpu-exporter` does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from datamix.errors import ConfigError
from deployments.metrics import PrometheusBackend, Recorder, rows

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from edge.fleet.run import FleetProgress, OnProgress


class FleetRecorder:
    """Publishes a fleet's progress; call it with each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the fleet's part of the table."""
        self._recorder = Recorder(PrometheusBackend(registry, rows("fleet")))

    def __call__(self, progress: FleetProgress) -> None:
        """Publish what changed."""
        record, advance = self._recorder.record, self._recorder.advance
        record("datamix_fleet_devices", progress.devices)
        record("datamix_fleet_connected_devices", progress.connected)
        record("datamix_fleet_open_inferences", progress.in_flight)
        counters = progress.counters
        advance("datamix_fleet_begun_inferences_total", counters["begun"])
        for outcome in ("ok", "failed", "cancelled"):
            advance("datamix_fleet_inferences_total", counters[outcome], outcome=outcome)
        advance("datamix_fleet_retries_total", counters["retries"])
        advance("datamix_fleet_reconnects_total", counters["reconnects"])
        for latency_s in progress.latencies_s:
            record("datamix_fleet_latency_seconds", latency_s)


@contextlib.contextmanager
def serving_metrics(address: str) -> Iterator[OnProgress]:
    """Serve ``/metrics`` at ``host:port`` while the block runs; gives what takes progress.

    Raises:
        ConfigError: it is no address, or cannot be listened on.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"metrics are to go to {address!r}, expected HOST:PORT")
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(int(port), host, registry)
    except OSError as error:
        raise ConfigError(f"metrics cannot be served at {address} ({error.strerror})") from error
    try:
        yield FleetRecorder(registry)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
