"""`datamix gpu-exporter`: this machine's GPUs for Prometheus, without Ray.

For nodes whose GPUs nobody publishes (deployments/node.py does where a replica runs), under the
names of the one table, without Ray's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.metrics import Sample, rows

if TYPE_CHECKING:
    from deployments.nvml import Nvml


class GpuCollector(Collector):
    """Reads at each scrape: what nobody asks for costs nothing."""

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        """Collect from ``samples``, such as :meth:`deployments.nvml.Watch.samples`."""
        self._samples = samples

    def describe(self) -> Iterable[Metric]:
        """The families, without a reading."""
        return self._families().values()

    def collect(self) -> Iterable[Metric]:
        """One reading."""
        families = self._families()
        for name, labels, value in self._samples():
            families[name].add_metric(list(labels.values()), value)
        return families.values()

    def _families(self) -> dict[str, CounterMetricFamily | GaugeMetricFamily]:
        return {
            row.name: (CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily)(
                row.name, row.help, labels=row.labels
            )
            for row in rows("node")
        }


def export_gpus(port: int, host: str, nvml: Nvml, wait: Callable[[], None]) -> None:
    """Serve ``/metrics`` until ``wait`` returns.

    Raises:
        ConfigError: the port cannot be used.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    from datamix.errors import ConfigError
    from deployments.nvml import Watch

    registry = CollectorRegistry()
    watch = Watch(nvml)
    registry.register(GpuCollector(watch.samples))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}), choose another with --port"
        ) from error
    try:
        watch.samples()
        if watch.problem:
            print(f"no GPU is read yet: {watch.problem}", flush=True)
        print(f"GPUs at http://{host}:{server.server_port}/metrics, Ctrl-C ends it", flush=True)
        wait()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
