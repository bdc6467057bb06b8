"""The one table of metrics: names, help, labels and buckets; and the two places they can go.

On a cluster they go through Ray's metrics agent, which adds the prefix ``ray_`` and, in a replica,
labels for application, deployment and replica. Without Ray they go to a prometheus-client registry.
Names end in the base unit; labels come from small fixed sets, never from a client.

Ray's own histograms are recorded value by value, several with each batch, and their ``_sum``
is an estimate. So a replica adds its buckets up itself and publishes them once a second,
as gauges of the names that Prometheus gives a histogram: they read and rate like one.

docs/metrics.md is made from this table: ``python -m cluster.monitoring.page``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from deployments.dispatch import Statistics
    from deployments.waiting import Timing

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_MODEL = ("model", "version")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_GPU = ("gpu", "mig")

Source = Literal["replica", "model", "node", "autoscaler", "fleet"]
SOURCES: dict[Source, str] = {
    "replica": "Of a replica: its streams, bytes and cost.",
    "model": "Of one version of a model in a replica: requests, batches, the engine.",
    "node": "Of a node's GPUs, from NVML. `gpu` is NVML's index; `mig` is empty for a whole GPU, "
    "`GI/CI` for an instance of one in MIG mode. Nothing of this exists on a node without NVML.",
    "autoscaler": "Of the autoscaling policy, in Serve's controller.",
    "fleet": "Of simulated devices, while `datamix simulate --metrics HOST:PORT` runs: what a "
    "device sees, where all else here is what the cloud sees.",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; ``source`` is who publishes it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Source = "model"


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
    Metric(
        "datamix_received_bytes_total", "counter", "Bytes of requests received.", source="replica"
    ),
    Metric("datamix_sent_bytes_total", "counter", "Bytes of responses sent.", source="replica"),
    Metric(
        "datamix_copied_bytes_total",
        "counter",
        "Bytes copied, by step: receive (out of the socket, once per message), batch (into "
        "the engine's batch, and on to its device) or send (behind the answer's frame).",
        (*_MODEL, "step"),
    ),
    Metric("datamix_queue_rows", "gauge", "Rows waiting for the engine.", _MODEL),
    Metric("datamix_open_streams", "gauge", "WebSocket streams open.", source="replica"),
    Metric(
        "datamix_streams_closed_total",
        "counter",
        "WebSocket streams that ended, by why; deployments/streams.py lists the reasons.",
        ("reason",),
        source="replica",
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
    Metric(
        "datamix_batch_error_seconds",
        "histogram",
        "How far a batch's time was from the prediction that admission and autoscaling rest on.",
        _MODEL,
        _SECONDS,
    ),
    Metric(
        "datamix_queue_seconds_total",
        "counter",
        "Wait of all requests that were computed, from arrival to the start of their batch.",
        _MODEL,
    ),
    Metric(
        "datamix_copy_seconds_total",
        "counter",
        "Time that batches travelled to the engine's device.",
        _MODEL,
    ),
    Metric(
        "datamix_predicted_wait_seconds",
        "gauge",
        "When all that waits and runs now will be computed, as the batcher predicts.",
        _MODEL,
    ),
    Metric(
        "datamix_batch_limit_rows", "gauge", "Rows of a batch at most (max_batch_rows).", _MODEL
    ),
    Metric(
        "datamix_inferences_total",
        "counter",
        "Inputs whose first round was computed: the rows of block 0.",
        _MODEL,
    ),
    Metric(
        "datamix_shed_rows_total",
        "counter",
        "Rows refused on arrival (429): the queue was full in rows or bytes (queue), or the answer "
        "would have come after its deadline (deadline).",
        (*_MODEL, "reason"),
    ),
    Metric(
        "datamix_expired_rows_total",
        "counter",
        "Rows that were queued and not computed, as their deadline came first (408).",
        _MODEL,
    ),
    Metric(
        "datamix_served_versions",
        "gauge",
        "1 for each version that the replica serves (ready), answers with where none is named "
        "(current), or was told to serve and cannot (failed); 0 once that is over.",
        (*_MODEL, "state"),
        source="replica",
    ),
    Metric(
        "datamix_replica_cost_total",
        "counter",
        "What the replica has cost, in the currency of price_per_hour, which is configured.",
        source="replica",
    ),
    Metric(
        "datamix_replica_energy_joules_total",
        "counter",
        "What the replica has drawn by the configured power_watts, for machines without a meter.",
        source="replica",
    ),
    # --- of a node ---
    Metric(
        "datamix_gpu_up",
        "gauge",
        "1 while NVML answers for the GPU in time; at 0 all else about it is the last that was "
        "known. Without a GPU's name where not even their number is known.",
        ("gpu",),
        source="node",
    ),
    Metric(
        "datamix_gpu_reading_age_seconds",
        "gauge",
        "Age of the node's figures: 0 while NVML answers.",
        source="node",
    ),
    Metric(
        "datamix_gpu_info",
        "gauge",
        "1; its labels name the GPU and the driver.",
        (*_GPU, "uuid", "name", "driver"),
        source="node",
    ),
    Metric(
        "datamix_gpu_utilisation_ratio",
        "gauge",
        "Share of the last moments in which a kernel ran, however small; not for MIG instances.",
        ("gpu",),
        source="node",
    ),
    Metric(
        "datamix_gpu_memory_utilisation_ratio",
        "gauge",
        "Share of the last moments in which memory was read or written.",
        ("gpu",),
        source="node",
    ),
    Metric("datamix_gpu_memory_bytes", "gauge", "Memory there is.", _GPU, source="node"),
    Metric("datamix_gpu_memory_used_bytes", "gauge", "Memory in use.", _GPU, source="node"),
    Metric(
        "datamix_gpu_process_memory_bytes",
        "gauge",
        "Memory by whose processes use it: replica (of Ray Serve) or other.",
        (*_GPU, "process"),
        source="node",
    ),
    Metric(
        "datamix_gpu_processes",
        "gauge",
        "Processes that compute there: replica (of Ray Serve) or other.",
        (*_GPU, "process"),
        source="node",
    ),
    Metric("datamix_gpu_power_watts", "gauge", "Power drawn.", ("gpu",), source="node"),
    Metric("datamix_gpu_power_limit_watts", "gauge", "Power allowed.", ("gpu",), source="node"),
    Metric(
        "datamix_gpu_energy_joules_total",
        "counter",
        "Energy used, by the GPU's own meter.",
        ("gpu",),
        source="node",
    ),
    Metric("datamix_gpu_temperature_celsius", "gauge", "Temperature.", ("gpu",), source="node"),
    Metric(
        "datamix_gpu_clock_hertz", "gauge", "Clock: sm or memory.", ("gpu", "domain"), source="node"
    ),
    Metric(
        "datamix_gpu_throttled",
        "gauge",
        "1 while the clock is held down for that reason.",
        ("gpu", "reason"),
        source="node",
    ),
    Metric(
        "datamix_gpu_throttled_seconds_total",
        "counter",
        "Time for which clocks were held down, as the driver counts it: power, thermal, "
        "reliability, board_limit.",
        ("gpu", "reason"),
        source="node",
    ),
    Metric(
        "datamix_gpu_ecc_errors_total",
        "counter",
        "Memory errors since the driver was loaded, by kind: corrected or uncorrected.",
        ("gpu", "kind"),
        source="node",
    ),
    Metric(
        "datamix_gpu_xid_errors_total",
        "counter",
        "Critical errors the driver has reported since this began to watch, by their number.",
        ("gpu", "xid"),
        source="node",
    ),
    # --- of the autoscaler ---
    Metric(
        "datamix_autoscaler_replicas",
        "gauge",
        "Replicas: target (decided) and running.",
        ("state",),
        source="autoscaler",
    ),
    Metric(
        "datamix_autoscaler_decisions_total",
        "counter",
        "Changes of the target: up or down.",
        ("direction",),
        source="autoscaler",
    ),
    Metric(
        "datamix_autoscaler_forecast_rows",
        "gauge",
        "Rows per second that are expected to be offered.",
        source="autoscaler",
    ),
    Metric(
        "datamix_autoscaler_capacity_rows",
        "gauge",
        "Rows per second that one replica is trusted with; 0 while that is not known.",
        source="autoscaler",
    ),
    Metric(
        "datamix_autoscaler_wait_seconds",
        "gauge",
        "Wait that the replicas predict, smoothed.",
        source="autoscaler",
    ),
    # --- of a fleet ---
    Metric("datamix_fleet_devices", "gauge", "Simulated devices.", source="fleet"),
    Metric(
        "datamix_fleet_connected_devices",
        "gauge",
        "Simulated devices with an open stream.",
        source="fleet",
    ),
    Metric(
        "datamix_fleet_open_inferences", "gauge", "Inferences under way on devices.", source="fleet"
    ),
    Metric(
        "datamix_fleet_begun_inferences_total",
        "counter",
        "Inferences that fell due and were begun.",
        source="fleet",
    ),
    Metric(
        "datamix_fleet_inferences_total",
        "counter",
        "Inferences that ended: ok (answered right), failed, or cancelled by the device.",
        ("outcome",),
        source="fleet",
    ),
    Metric(
        "datamix_fleet_retries_total",
        "counter",
        "Messages that devices sent again.",
        source="fleet",
    ),
    Metric(
        "datamix_fleet_reconnects_total",
        "counter",
        "Streams that devices opened again.",
        source="fleet",
    ),
    Metric(
        "datamix_fleet_latency_seconds",
        "histogram",
        "Of an inference that was answered: from when it fell due until the device had its result.",
        (),
        _SECONDS,
        source="fleet",
    ),
)


class Sample(NamedTuple):
    """A reading of one row of the table; of a counter its running total."""

    name: str
    labels: dict[str, str]
    value: float


def rows(*sources: Source) -> tuple[Metric, ...]:
    """The part of the table that these publish."""
    return tuple(metric for metric in TABLE if metric.source in sources)


class Backend(Protocol):
    """Where recorded values go."""

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Add to a counter, set a gauge or observe in a histogram."""
        ...

    def flush(self) -> None:
        """Send what was gathered; about once a second."""
        ...


class RayBackend:
    """Ray's metrics agent."""

    def __init__(self, table: Sequence[Metric] | None = None, *, of_replica: bool = True) -> None:
        """Register a part of the table with Ray.

        Args:
            table: which part; None for what a replica publishes.
            of_replica: whether series carry the names of replica, deployment and application. Those
                of a node may not: another replica goes on with them.
        """
        if of_replica:
            from ray.serve import metrics as module
        else:
            from ray.util import metrics as module  # type: ignore[no-redef]
        metrics: Any = module

        self._series: dict[str, Any] = {}
        self._observed: dict[tuple[str, tuple[str, ...]], Observed] = {}

        def gauge(name: str, metric: Metric, *more: str) -> None:
            tags = (*metric.labels, *more)
            self._series[name] = metrics.Gauge(name, description=metric.help, tag_keys=tags)

        for m in rows("replica", "model") if table is None else table:
            if m.kind == "counter":
                self._series[m.name] = metrics.Counter(
                    m.name, description=m.help, tag_keys=m.labels
                )
            elif m.kind == "gauge":
                gauge(m.name, m)
            else:
                gauge(f"{m.name}_bucket", m, "le")
                gauge(f"{m.name}_sum", m)
                gauge(f"{m.name}_count", m)

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """See :class:`Backend`."""
        if metric.kind == "counter":
            self._series[metric.name].inc(value, tags=labels)
        elif metric.kind == "gauge":
            self._series[metric.name].set(value, tags=labels)
        else:
            key = metric.name, tuple(labels.values())
            observed = self._observed.get(key)
            if observed is None:
                observed = self._observed[key] = Observed(metric.buckets, labels)
            observed.add(value)

    def flush(self) -> None:
        """See :class:`Backend`."""
        for (name, _), observed in self._observed.items():
            series = self._series[f"{name}_bucket"]
            for le, count in observed.buckets():
                series.set(count, tags={**observed.labels, "le": le})
            self._series[f"{name}_count"].set(sum(observed.counts), tags=observed.labels)
            self._series[f"{name}_sum"].set(observed.total, tags=observed.labels)


class Observed:
    """A histogram so far.

    Attributes:
        labels: of its series.
        counts: values by bucket, the last for those beyond all bounds.
        total: their sum.
    """

    __slots__ = ("_bounds", "_names", "counts", "labels", "total")

    def __init__(self, bounds: Sequence[float], labels: dict[str, str]) -> None:
        """Start empty; ``bounds`` rise."""
        self._bounds = tuple(bounds)
        self._names = (*(f"{float(bound)}" for bound in bounds), "+Inf")
        self.labels = labels
        self.counts = [0] * len(self._names)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Upper bound, as Prometheus writes it, and how many values are not above it."""
        return zip(self._names, accumulate(self.counts), strict=True)


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

    def flush(self) -> None:
        """Nothing waits here."""


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
        self._begun = False

    def record(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge, or observe in a histogram."""
        self._backend.record(self._metrics[name], value, {**self._labels, **labels})

    def advance(self, name: str, total: float, /, **labels: str) -> None:
        """Add what a running total grew by; Ray refuses to add nothing.

        A total that fell has begun anew, as a driver's does when it is loaded again.
        """
        key = (name, *labels.values())
        last = self._last.get(key, 0.0)
        if (growth := total - last if total >= last else total) > 0:
            self.record(name, growth, **labels)
        self._last[key] = total

    def publish(self, samples: Iterable[Sample]) -> None:
        """Publish readings; what counters have counted before the first call is left out.

        It belongs to nobody who reads a rate.
        """
        for name, labels, value in samples:
            if self._metrics[name].kind != "counter":
                self.record(name, value, **labels)
            elif self._begun:
                self.advance(name, value, **labels)
            else:
                self._last[name, *labels.values()] = value
        self._begun = True


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
        if timing.error_s is not None:
            record("datamix_batch_error_seconds", abs(timing.error_s))

    def publish(
        self,
        statistics: Statistics,
        outcomes: Counter[str],
        *,
        busy_s: float,
        queue_rows: int,
        predicted_wait_s: float,
        limit_rows: int,
    ) -> None:
        """Publish what changed since the last call."""
        advance = self._recorder.advance
        for outcome, count in list(outcomes.items()):
            advance("datamix_requests_total", count, outcome=outcome)
        for reason, count in list(statistics.close_reasons.items()):
            advance("datamix_batches_total", count, close_reason=reason)
        advance("datamix_rows_total", statistics.rows)
        for reason, count in list(statistics.shed_rows.items()):
            advance("datamix_shed_rows_total", count, reason=reason)
        advance("datamix_expired_rows_total", statistics.expired_rows)
        advance("datamix_inferences_total", statistics.first_rows)
        advance("datamix_engine_busy_seconds_total", busy_s)
        advance("datamix_queue_seconds_total", statistics.queue_s)
        advance("datamix_copy_seconds_total", statistics.copy_s)
        advance("datamix_copied_bytes_total", statistics.copied_bytes, step="batch")
        record = self._recorder.record
        record("datamix_queue_rows", queue_rows)
        record("datamix_predicted_wait_seconds", predicted_wait_s)
        record("datamix_batch_limit_rows", limit_rows)


class TrafficRecorder:
    """Metrics of a replica that belong to no model."""

    def __init__(
        self,
        backend: Backend,
        price_per_hour: float | None = None,
        power_watts: float | None = None,
    ) -> None:
        """Record to ``backend``, with what the replica costs and draws, where that is known."""
        self._recorder = Recorder(backend)
        self._price_per_hour, self._power_watts = price_per_hour, power_watts
        self._versions: set[tuple[str, str, str]] = set()

    def costs(self, uptime_s: float) -> None:
        """Publish what the replica has cost and drawn in ``uptime_s`` seconds."""
        if self._price_per_hour is not None:
            self._recorder.advance(
                "datamix_replica_cost_total", uptime_s * self._price_per_hour / 3600
            )
        if self._power_watts is not None:
            self._recorder.advance(
                "datamix_replica_energy_joules_total", uptime_s * self._power_watts
            )

    def versions(self, status: Sequence[Mapping[str, Any]]) -> None:
        """Publish what is served; ``status`` is that of :meth:`deployments.catalog.Catalog`."""
        now = {(row["name"], row["version"], row["state"]) for row in status}
        now |= {(row["name"], row["version"], "current") for row in status if row["current"]}
        self._versions |= now
        for model, version, state in self._versions:
            self._recorder.record(
                "datamix_served_versions",
                float((model, version, state) in now),
                model=model,
                version=version,
                state=state,
            )

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


class Decisions:
    """Metrics of the autoscaling policy."""

    def __init__(self, backend: Backend) -> None:
        """Record to ``backend``."""
        self._recorder = Recorder(backend)
        self._changes: Counter[str] = Counter()

    def publish(
        self,
        *,
        before: int,
        target: int,
        running: int,
        forecast_rows: float,
        capacity_rows: float,
        wait_s: float,
    ) -> None:
        """Publish one decision: from ``before`` to ``target`` replicas, ``running`` of them up."""
        record = self._recorder.record
        if target != before:
            self._changes["up" if target > before else "down"] += 1
        for direction, count in self._changes.items():
            self._recorder.advance("datamix_autoscaler_decisions_total", count, direction=direction)
        record("datamix_autoscaler_replicas", target, state="target")
        record("datamix_autoscaler_replicas", running, state="running")
        record("datamix_autoscaler_forecast_rows", forecast_rows)
        record("datamix_autoscaler_capacity_rows", capacity_rows)
        record("datamix_autoscaler_wait_seconds", wait_s)
