"""The one table of metrics: names, help, labels and buckets; and the two places they can go.

In a replica they go through Ray's metrics agent, which adds the prefix ``ray_`` and labels for
application, deployment and replica. Without Ray they go to a prometheus-client registry.
Names end in the base unit; labels come from small fixed sets, never from a client.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from deployments.dispatch import Statistics
    from deployments.waiting import Timing

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_MODEL = ("model", "version")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


TABLE: tuple[Metric, ...] = (
    Metric(
        "datamix_requests_total",
        "counter",
        "Requests answered, by outcome: ok or the HTTP status.",
        (*_MODEL, "outcome"),
    ),
    Metric("datamix_rows_total", "counter", "Rows computed by the engine.", _MODEL),
    Metric(
        "datamix_batches_total",
        "counter",
        "Batches computed, by why they closed.",
        (*_MODEL, "close_reason"),
    ),
    Metric(
        "datamix_engine_busy_seconds_total",
        "counter",
        "Time the engine spent computing; its rate is the engine's utilisation.",
        _MODEL,
    ),
    Metric("datamix_received_bytes_total", "counter", "Bytes of requests received."),
    Metric("datamix_sent_bytes_total", "counter", "Bytes of responses sent."),
    Metric(
        "datamix_copied_bytes_total",
        "counter",
        "Bytes copied, by step: receive (out of the socket, once per message), batch (into "
        "the engine's batch, and on to its device) or send (behind the answer's frame).",
        (*_MODEL, "step"),
    ),
    Metric("datamix_queue_rows", "gauge", "Rows waiting for the engine.", _MODEL),
    Metric("datamix_open_streams", "gauge", "WebSocket streams open."),
    Metric(
        "datamix_streams_closed_total",
        "counter",
        "WebSocket streams that ended, by why; deployments/streams.py lists the reasons.",
        ("reason",),
    ),
    Metric("datamix_batch_rows", "histogram", "Rows per batch.", _MODEL, _ROWS),
    Metric(
        "datamix_batch_compute_seconds",
        "histogram",
        "Engine time per batch.",
        _MODEL,
        _SECONDS,
    ),
    Metric(
        "datamix_batch_queue_seconds",
        "histogram",
        "Wait of a batch's oldest request, from arrival to the start of the computation.",
        _MODEL,
        _SECONDS,
    ),
)


class Backend(Protocol):
    """Where recorded values go."""

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Add to a counter, set a gauge or observe in a histogram."""
        ...


class RayBackend:
    """Ray's metrics agent; only inside a Serve replica."""

    def __init__(self, table: Sequence[Metric] = TABLE) -> None:
        """Register the table with Ray."""
        from ray.serve import metrics

        kinds: dict[str, Any] = {
            "counter": metrics.Counter,
            "gauge": metrics.Gauge,
            "histogram": metrics.Histogram,
        }
        self._series: dict[str, Any] = {
            m.name: kinds[m.kind](
                m.name,
                description=m.help,
                tag_keys=m.labels,
                **({"boundaries": list(m.buckets)} if m.kind == "histogram" else {}),
            )
            for m in table
        }
        self._verbs = {"counter": "inc", "gauge": "set", "histogram": "observe"}

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """See :class:`Backend`."""
        getattr(self._series[metric.name], self._verbs[metric.kind])(value, tags=labels)


class PrometheusBackend:
    """A prometheus-client registry, for tests and for an application outside Ray."""

    def __init__(self, registry: CollectorRegistry, table: Sequence[Metric] = TABLE) -> None:
        """Register the table with ``registry``."""
        import prometheus_client as prometheus

        def make(m: Metric) -> Any:
            if m.kind == "histogram":
                return prometheus.Histogram(
                    m.name, m.help, m.labels, buckets=m.buckets, registry=registry
                )
            kind = prometheus.Counter if m.kind == "counter" else prometheus.Gauge
            return kind(m.name, m.help, m.labels, registry=registry)

        self._series = {m.name: make(m) for m in table}
        self._verbs = {"counter": "inc", "gauge": "set", "histogram": "observe"}

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """See :class:`Backend`."""
        series = self._series[metric.name]
        if labels:
            series = series.labels(**labels)
        getattr(series, self._verbs[metric.kind])(value)


@dataclass(slots=True)
class Traffic:
    """Plain running totals of a replica that belong to no model; see :class:`Recorder`.

    Attributes:
        received_bytes: bytes of requests, as messages; each is copied once from the socket's
            buffer (a HTTP body that comes in pieces is joined besides, which nobody counts).
        sent_bytes: bytes of responses, as messages.
        open_streams: WebSockets open now.
        streams_closed: WebSockets that ended, by why.
        astray: requests refused before a model was found for them, by HTTP status.
    """

    received_bytes: int = 0
    sent_bytes: int = 0
    open_streams: int = 0
    streams_closed: Counter[str] = field(default_factory=Counter)
    astray: Counter[str] = field(default_factory=Counter)


class Recorder:
    """Publishes running totals: counters as what they grew by, gauges as they stand.

    Recording through Ray costs microseconds, so it is kept off the path of a single message.
    """

    def __init__(self, backend: Backend, **labels: str) -> None:
        """Record to ``backend`` under these labels."""
        self._backend = backend
        self._labels = labels
        self._metrics = {m.name: m for m in TABLE}
        self._last: dict[tuple[str, ...], float] = {}

    def record(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or observe in a histogram."""
        self._backend.record(self._metrics[name], value, {**self._labels, **labels})

    def advance(self, name: str, total: float, **labels: str) -> None:
        """Add what a running total grew by; Ray refuses to add nothing."""
        key = (name, *labels.values())
        if (growth := total - self._last.get(key, 0.0)) > 0:
            self.record(name, growth, **labels)
            self._last[key] = total


class ModelRecorder:
    """Metrics of one model version: histograms per batch, everything else when published."""

    def __init__(self, backend: Backend, model: str, version: str) -> None:
        """Record to ``backend`` under the labels ``model`` and ``version``."""
        self._recorder = Recorder(backend, model=model, version=version)

    def batch(self, timing: Timing) -> None:
        """Observe one batch, by the timing of its oldest request."""
        record = self._recorder.record
        record("datamix_batch_rows", timing.batch_rows)
        record("datamix_batch_compute_seconds", timing.compute_s)
        record("datamix_batch_queue_seconds", timing.queue_s)

    def publish(self, statistics: Statistics, outcomes: Counter[str], queue_rows: int) -> None:
        """Publish what changed since the last call."""
        advance = self._recorder.advance
        for outcome, count in list(outcomes.items()):
            advance("datamix_requests_total", count, outcome=outcome)
        for reason, count in list(statistics.close_reasons.items()):
            advance("datamix_batches_total", count, close_reason=reason)
        advance("datamix_rows_total", statistics.rows)
        advance("datamix_engine_busy_seconds_total", statistics.busy_s)
        advance("datamix_copied_bytes_total", statistics.copied_bytes, step="batch")
        self._recorder.record("datamix_queue_rows", queue_rows)


class TrafficRecorder:
    """Metrics of a replica that belong to no model."""

    def __init__(self, backend: Backend) -> None:
        """Record to ``backend``."""
        self._recorder = Recorder(backend)

    def publish(self, traffic: Traffic) -> None:
        """Publish what changed since the last call."""
        advance = self._recorder.advance
        for outcome, count in list(traffic.astray.items()):
            advance("datamix_requests_total", count, model="", version="", outcome=outcome)
        for reason, count in list(traffic.streams_closed.items()):
            advance("datamix_streams_closed_total", count, reason=reason)
        advance("datamix_received_bytes_total", traffic.received_bytes)
        advance("datamix_sent_bytes_total", traffic.sent_bytes)
        for step, count in (("receive", traffic.received_bytes), ("send", traffic.sent_bytes)):
            advance("datamix_copied_bytes_total", count, model="", version="", step=step)
        self._recorder.record("datamix_open_streams", traffic.open_streams)
