"""What is shown of a running cluster, once: Grafana's dashboards and the live page come from here.

A panel asks Prometheus in terms of the table of metrics (deployments/metrics.py). ``$filter`` in
an expression stands for the label matchers of whoever looks: Grafana puts its variables there, the
live page nothing. ``$window`` is the range of a rate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal[
    "ratio",
    "per_s",
    "seconds",
    "bytes",
    "bytes_per_s",
    "rows",
    "watts",
    "celsius",
    "count",
    "joules",
]
Kind = Literal["lines", "heat", "table"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and how its series are called: a text with ``{{label}}`` in it."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    Attributes:
        name: unique on its board, for addresses and tests.
        title: what it shows, in a few words.
        help: how to read it, in a sentence or two.
        unit: of its values.
        queries: what is drawn.
        kind: lines over time, a heat map of a histogram's buckets, or a table of what is there now.
        live: whether the live page shows it.
    """

    name: str
    title: str
    help: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    live: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard.

    Attributes:
        name: unique; its file's name.
        title: for people.
        rows: from top to bottom.
        runbooks: pages of docs/runbooks that belong to it.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    runbooks: tuple[str, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All of them, in order."""
        return tuple(panel for row in self.rows for panel in row.panels)


def _rate(metric: str, by: str = "", more: str = "") -> str:
    matchers = "$filter" + (f",{more}" if more else "")
    total = f"rate(ray_datamix_{metric}{{{matchers}}}[$window])"
    return f"sum by ({by}) ({total})" if by else f"sum({total})"


def _sum(metric: str, by: str = "") -> str:
    series = f"ray_datamix_{metric}{{$filter}}"
    return f"sum by ({by}) ({series})" if by else f"sum({series})"


def _quantile(metric: str, share: float) -> str:
    return f"histogram_quantile({share:g}, {_rate(metric + '_bucket', 'le')})"


_OK = _rate("requests_total", more='outcome="ok"')

# --- panels -------------------------------------------------------------------------------------

REQUESTS = Panel(
    "requests",
    "Requests by outcome",
    "ok is an answer; all else is an HTTP status. 429 and 408 are refusals under load.",
    "per_s",
    (Query(_rate("requests_total", "outcome"), "{{outcome}}"),),
    live=True,
)
ERRORS = Panel(
    "errors",
    "Share of requests without an answer",
    "Of all that were answered or refused.",
    "ratio",
    (
        Query(
            f"1 - ({_OK} or vector(0)) / ({_rate('requests_total')} > 0)",
            "not answered",
        ),
    ),
)
INFERENCES = Panel(
    "inferences",
    "Inferences and rows",
    "An inference counts in its first round; rows are what engines computed, in all rounds.",
    "per_s",
    (
        Query(_rate("inferences_total"), "inferences"),
        Query(_rate("rows_total"), "rows"),
    ),
    live=True,
)
QUEUE_HEAT = Panel(
    "queue_heat",
    "Wait for the engine",
    "From a request's arrival to the start of its batch, the oldest request of each batch. The "
    "stronger the colour, the more batches.",
    "seconds",
    (Query(_rate("batch_queue_seconds_bucket", "le"), "{{le}}"),),
    kind="heat",
    live=True,
)
QUEUE_QUANTILES = Panel(
    "queue_quantiles",
    "Wait for the engine, quantiles",
    "Of the oldest request of each batch; estimated within a histogram's buckets.",
    "seconds",
    tuple(
        Query(_quantile("batch_queue_seconds", share), f"p{share * 100:g}")
        for share in (0.5, 0.9, 0.99)
    ),
)
PREDICTED = Panel(
    "predicted_wait",
    "Predicted wait",
    "When all that waits and runs now will be computed, as each batcher predicts: the worst one.",
    "seconds",
    (Query("max(ray_datamix_predicted_wait_seconds{$filter})", "worst replica"),),
    live=True,
)
PREDICTION = Panel(
    "prediction_error",
    "How far predictions were off",
    "Between a batch's predicted end and its real one.",
    "seconds",
    (
        Query(_quantile("batch_error_seconds", 0.5), "p50"),
        Query(_quantile("batch_error_seconds", 0.95), "p95"),
    ),
)
BUSY = Panel(
    "engine_busy",
    "Engine busy, by replica",
    "Share of time in which an engine had a batch. The same on a processor and on a GPU.",
    "ratio",
    (Query(_rate("engine_busy_seconds_total", "replica"), "{{replica}}"),),
    live=True,
)
GPU_BUSY = Panel(
    "gpu_utilisation",
    "GPU utilisation",
    "Share of time in which a kernel ran, however small: read it beside rows per second and watts.",
    "ratio",
    (
        Query(
            "max by (NodeAddress, gpu) (ray_datamix_gpu_utilisation_ratio{$node})",
            "{{NodeAddress}} gpu {{gpu}}",
        ),
    ),
    live=True,
)
FILL = Panel(
    "batch_fill",
    "Batch fill",
    "Mean rows of a batch over the most it may have. Low where engines are idle, which is right.",
    "ratio",
    (
        Query(
            f"{_rate('rows_total', 'model')} / ({_rate('batches_total', 'model')} > 0)"
            " / on (model) max by (model) (ray_datamix_batch_limit_rows{$filter})",
            "{{model}}",
        ),
    ),
)
BATCH_ROWS = Panel(
    "batch_rows",
    "Rows in a batch",
    "The stronger the colour, the more batches of that size.",
    "rows",
    (Query(_rate("batch_rows_bucket", "le"), "{{le}}"),),
    kind="heat",
)
CLOSE_REASONS = Panel(
    "close_reasons",
    "Why batches closed",
    "engine_free: the engine took what waited; full: load is above what one batch takes.",
    "per_s",
    (Query(_rate("batches_total", "close_reason"), "{{close_reason}}"),),
    live=True,
)
COMPUTE = Panel(
    "compute",
    "Engine time per batch",
    "Quantiles, estimated within a histogram's buckets.",
    "seconds",
    tuple(
        Query(_quantile("batch_compute_seconds", share), f"p{share * 100:g}")
        for share in (0.5, 0.99)
    ),
)
QUEUE_ROWS = Panel(
    "queue_rows",
    "Rows waiting",
    "For an engine, in all replicas.",
    "rows",
    (Query(_sum("queue_rows", "model"), "{{model}}"),),
    live=True,
)
SHED = Panel(
    "shed",
    "Rows refused or too late",
    "queue: no room; deadline: the answer would have been late; expired: it became late while it "
    "waited.",
    "per_s",
    (
        Query(_rate("shed_rows_total", "reason"), "{{reason}}"),
        Query(_rate("expired_rows_total"), "expired"),
    ),
)
STREAMS = Panel(
    "streams",
    "Devices connected",
    "WebSocket streams open, one per device.",
    "count",
    (Query(_sum("open_streams", "NodeAddress"), "{{NodeAddress}}"),),
    live=True,
)
CLOSED = Panel(
    "streams_closed",
    "Streams that ended",
    "By why; rotation after a replica has started is planned.",
    "per_s",
    (Query(_rate("streams_closed_total", "reason"), "{{reason}}"),),
)
BYTES = Panel(
    "bytes",
    "Bytes in and out",
    "Of requests and answers, without the framing of streams.",
    "bytes_per_s",
    (
        Query(_rate("received_bytes_total"), "received"),
        Query(_rate("sent_bytes_total"), "sent"),
    ),
)
COPIES = Panel(
    "copies",
    "Bytes copied per step",
    "Between the socket and the engine's device.",
    "bytes_per_s",
    (Query(_rate("copied_bytes_total", "step"), "{{step}}"),),
)
VERSIONS = Panel(
    "versions",
    "Versions in service",
    "Replicas that serve a version (ready), answer with it (current), or cannot load it (failed).",
    "count",
    (
        Query(
            "sum by (model, version, state) (ray_datamix_served_versions{$filter}) > 0",
            "{{model}} {{version}} {{state}}",
        ),
    ),
    kind="table",
    live=True,
)
REPLICAS_BY_NODE = Panel(
    "replicas",
    "Replicas by node",
    "With what their engines did in the last moments.",
    "ratio",
    (
        Query(
            _rate("engine_busy_seconds_total", "NodeAddress, replica"),
            "{{NodeAddress}} {{replica}}",
        ),
    ),
    kind="table",
    live=True,
)
AUTOSCALER = Panel(
    "autoscaler",
    "Replicas: decided and running",
    "What the policy asks for, and what there is.",
    "count",
    (Query("max by (state) (ray_datamix_autoscaler_replicas{$cluster})", "{{state}}"),),
    live=True,
)
FORECAST = Panel(
    "forecast",
    "Load that is expected, and what replicas carry",
    "Rows per second; the policy keeps the second above the first.",
    "per_s",
    (
        Query("max(ray_datamix_autoscaler_forecast_rows{$cluster})", "expected"),
        Query(
            "max(ray_datamix_autoscaler_capacity_rows{$cluster}) * on () "
            'max(ray_datamix_autoscaler_replicas{$cluster,state="running"})',
            "carried",
        ),
    ),
)
DECISIONS = Panel(
    "decisions",
    "Decisions per hour",
    "Many in both directions are flapping.",
    "count",
    (
        Query(
            "3600 * sum by (direction) "
            "(rate(ray_datamix_autoscaler_decisions_total{$cluster}[$window]))",
            "{{direction}}",
        ),
    ),
)
GPU_MEMORY = Panel(
    "gpu_memory",
    "GPU memory in use",
    "Of what there is.",
    "ratio",
    (
        Query(
            "max by (NodeAddress, gpu, mig) (ray_datamix_gpu_memory_used_bytes{$node}) / "
            "max by (NodeAddress, gpu, mig) (ray_datamix_gpu_memory_bytes{$node})",
            "{{NodeAddress}} gpu {{gpu}} {{mig}}",
        ),
    ),
)
GPU_POWER = Panel(
    "gpu_power",
    "Power",
    "A GPU that is busy and draws little does little.",
    "watts",
    (
        Query(
            "max by (NodeAddress, gpu) (ray_datamix_gpu_power_watts{$node})",
            "{{NodeAddress}} gpu {{gpu}}",
        ),
    ),
)
GPU_HEAT = Panel(
    "gpu_temperature",
    "Temperature",
    "Clocks fall where it nears the limit.",
    "celsius",
    (
        Query(
            "max by (NodeAddress, gpu) (ray_datamix_gpu_temperature_celsius{$node})",
            "{{NodeAddress}} gpu {{gpu}}",
        ),
    ),
)
GPU_THROTTLED = Panel(
    "gpu_throttled",
    "Clocks held down",
    "1 while that reason holds.",
    "count",
    (
        Query(
            "max by (NodeAddress, gpu, reason) (ray_datamix_gpu_throttled{$node}) > 0",
            "{{NodeAddress}} gpu {{gpu}} {{reason}}",
        ),
    ),
)
GPU_ERRORS = Panel(
    "gpu_errors",
    "Errors of GPUs",
    "Memory errors and the driver's XID reports, per hour.",
    "count",
    (
        Query(
            "3600 * sum by (NodeAddress, gpu, kind) "
            "(rate(ray_datamix_gpu_ecc_errors_total{$node}[$window]))",
            "{{NodeAddress}} gpu {{gpu}} ECC {{kind}}",
        ),
        Query(
            "3600 * sum by (NodeAddress, gpu, xid) "
            "(rate(ray_datamix_gpu_xid_errors_total{$node}[$window]))",
            "{{NodeAddress}} gpu {{gpu}} XID {{xid}}",
        ),
    ),
)
JOULES = Panel(
    "joules",
    "Energy per 1,000 inferences",
    "By the GPUs' own meters, and by the configured power of replicas.",
    "joules",
    (
        Query(
            "1000 * sum(rate(ray_datamix_gpu_energy_joules_total{$node}[$window])) / "
            f"({_rate('inferences_total')} > 0)",
            "measured",
        ),
        Query(
            f"1000 * {_rate('replica_energy_joules_total')} / ({_rate('inferences_total')} > 0)",
            "configured",
        ),
    ),
)
COST = Panel(
    "cost",
    "Cost per 1,000 inferences",
    "By the configured price_per_hour of a replica, in its currency.",
    "count",
    (
        Query(
            f"1000 * {_rate('replica_cost_total')} / ({_rate('inferences_total')} > 0)",
            "cost",
        ),
    ),
)
FLEET_DEVICES = Panel(
    "fleet_devices",
    "Simulated devices",
    "There are, connected, and inferences under way on them (datamix simulate --metrics).",
    "count",
    (
        Query("sum(ray_datamix_fleet_devices)", "devices"),
        Query("sum(ray_datamix_fleet_connected_devices)", "connected"),
        Query("sum(ray_datamix_fleet_open_inferences)", "inferences under way"),
    ),
)
FLEET_OUTCOMES = Panel(
    "fleet_outcomes",
    "Inferences, as devices see them",
    "Begun, and how they ended. Retries hide what the cloud refused; its own count shows that.",
    "per_s",
    (
        Query("sum(rate(ray_datamix_fleet_begun_inferences_total[$window]))", "begun"),
        Query(
            "sum by (outcome) (rate(ray_datamix_fleet_inferences_total[$window]))", "{{outcome}}"
        ),
    ),
    live=True,
)
FLEET_LATENCY = Panel(
    "fleet_latency",
    "Latency, as devices see it",
    "From when an inference fell due until its result, all rounds, networks and retries included.",
    "seconds",
    tuple(
        Query(
            f"histogram_quantile({share:g}, "
            "sum by (le) (rate(ray_datamix_fleet_latency_seconds_bucket[$window])))",
            f"p{share * 100:g}",
        )
        for share in (0.5, 0.9, 0.99)
    ),
    live=True,
)
FLEET_AGAIN = Panel(
    "fleet_again",
    "Sent and opened again",
    "Messages that devices sent again, and streams that they opened again.",
    "per_s",
    (
        Query("sum(rate(ray_datamix_fleet_retries_total[$window]))", "messages"),
        Query("sum(rate(ray_datamix_fleet_reconnects_total[$window]))", "streams"),
    ),
)

# By the recording rules (rules.yml), of all that Prometheus watches: windows of days are slow.
BURN = Panel(
    "slo_burn",
    "Error budget burned",
    "Share of failed requests over the 1% that the objective allows: at 1 the budget lasts for its "
    "period, at 14.4 for two days of thirty.",
    "count",
    tuple(
        Query(f"datamix:slo_errors:ratio_rate{window} / 0.01", f"{{{{application}}}} {window}")
        for window in ("5m", "1h", "6h", "3d")
    ),
)
GOODPUT = Panel(
    "goodput",
    "Goodput",
    "Requests answered in time.",
    "per_s",
    (Query("datamix:goodput:rate5m", "{{application}}"),),
)
REFUSED = Panel(
    "rows_shed",
    "Share of rows refused",
    "On arrival, of all that came.",
    "ratio",
    (Query("datamix:rows_shed:ratio_rate5m", "{{application}}"),),
)
WAITS = Panel(
    "queue_waits",
    "Wait for the engine, mean and tail",
    "The mean is of all requests, the 99th percentile of each batch's oldest.",
    "seconds",
    (
        Query("datamix:queue_wait_seconds:mean5m", "{{model}} {{version}} mean"),
        Query("datamix:queue_wait_seconds:p99_5m", "{{model}} {{version}} p99"),
    ),
)

# --- boards -------------------------------------------------------------------------------------

BOARDS: tuple[Board, ...] = (
    Board(
        "overview",
        "DataMix: overview",
        (
            Row(
                "Requests: rate, errors, duration", (REQUESTS, ERRORS, QUEUE_QUANTILES, QUEUE_HEAT)
            ),
            Row("Engines: utilisation, saturation, errors", (BUSY, GPU_BUSY, QUEUE_ROWS, SHED)),
            Row("What is in service", (VERSIONS, REPLICAS_BY_NODE, INFERENCES, STREAMS)),
        ),
        ("slo-burn", "version-skew", "stuck-batcher"),
    ),
    Board(
        "gpus",
        "DataMix: GPUs",
        (
            Row("Use", (GPU_BUSY, BUSY, GPU_MEMORY, GPU_POWER)),
            Row("Health", (GPU_HEAT, GPU_THROTTLED, GPU_ERRORS)),
            Row("What it costs", (JOULES, COST)),
        ),
        ("underused-gpus", "throttling", "gpu-errors"),
    ),
    Board(
        "batching",
        "DataMix: batching",
        (
            Row("Batches", (BATCH_ROWS, FILL, CLOSE_REASONS, COMPUTE)),
            Row("Waiting", (QUEUE_HEAT, PREDICTED, PREDICTION, QUEUE_ROWS)),
            Row("Bytes", (BYTES, COPIES)),
        ),
        ("small-batches", "stuck-batcher"),
    ),
    Board(
        "fleet",
        "DataMix: devices",
        (
            Row("Devices", (STREAMS, CLOSED, REQUESTS)),
            Row("What they are refused", (SHED, ERRORS, BYTES)),
            Row("Simulated", (FLEET_LATENCY, FLEET_OUTCOMES, FLEET_DEVICES, FLEET_AGAIN)),
        ),
        ("retry-storm",),
    ),
    Board(
        "autoscaling",
        "DataMix: autoscaling",
        (Row("Replicas", (AUTOSCALER, FORECAST, DECISIONS, PREDICTED)),),
    ),
    Board(
        "slo",
        "DataMix: service level",
        (
            Row("The objective", (BURN, GOODPUT)),
            Row("What eats it", (REFUSED, WAITS)),
        ),
        ("slo-burn", "shedding", "retry-storm"),
    ),
)


def live_panels() -> tuple[Panel, ...]:
    """What the live page shows, each once, in the order of the boards."""
    found: dict[str, Panel] = {}
    for board in BOARDS:
        found.update({panel.name: panel for panel in board.panels if panel.live})
    return tuple(found.values())


def fill(expression: str, *, filters: str, node: str, cluster: str, window: str) -> str:
    """An expression as Prometheus takes it.

    Args:
        expression: one of a :class:`Query`.
        filters: label matchers for what replicas publish, with commas between them.
        node: the same for what nodes publish.
        cluster: the same for what there is once in a cluster.
        window: the range of rates, such as ``1m``.
    """
    named = {"filter": filters, "node": node, "cluster": cluster, "window": window}
    # In one pass: what is put in may hold Grafana's variables, of the same names.
    filled = re.sub(r"\$(\w+)", lambda found: named[found[1]], expression)
    # Without matchers a comma may be left over at the start.
    return filled.replace("{,", "{")
