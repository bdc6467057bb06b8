"""The table of metrics: named by convention, and every row of it moves when the system works."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry

from cluster.monitoring.page import page
from deployments.dispatch import Statistics
from deployments.metrics import (
    TABLE,
    Backend,
    Decisions,
    Metric,
    ModelRecorder,
    Observed,
    PrometheusBackend,
    Recorder,
    Sample,
    Traffic,
    TrafficRecorder,
)
from deployments.metrics import rows as published_by
from deployments.waiting import Timing
from tests.served import ROOT

LABELS = {
    *("model", "version", "outcome", "close_reason", "reason", "step", "state", "direction"),
    *("gpu", "mig", "domain", "process", "kind", "xid", "uuid", "name", "driver"),
}
UNITS = ("_seconds", "_bytes", "_rows", "_ratio", "_joules", "_watts", "_celsius", "_hertz")
# Counts of things, which have no unit.
COUNTS = {
    "datamix_requests_total",
    "datamix_batches_total",
    "datamix_open_streams",
    "datamix_streams_closed_total",
    "datamix_inferences_total",
    "datamix_served_versions",
    "datamix_replica_cost_total",  # in whatever currency the price is
    "datamix_autoscaler_replicas",
    "datamix_autoscaler_decisions_total",
    "datamix_gpu_up",
    "datamix_gpu_info",
    "datamix_gpu_processes",
    "datamix_gpu_throttled",
    "datamix_gpu_ecc_errors_total",
    "datamix_gpu_xid_errors_total",
    "datamix_fleet_devices",
    "datamix_fleet_connected_devices",
    "datamix_fleet_open_inferences",
    "datamix_fleet_begun_inferences_total",
    "datamix_fleet_inferences_total",
    "datamix_fleet_retries_total",
    "datamix_fleet_reconnects_total",
}


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample of ``registry``, as Prometheus would scrape it, summed over labels."""
    totals: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def exported(metric: Metric) -> str:
    """The sample that shows that ``metric`` moved."""
    return f"{metric.name}_sum" if metric.kind == "histogram" else metric.name


class Replica:
    """The totals of a replica, and what publishes them."""

    def __init__(self, backend: Backend) -> None:
        self.model = ModelRecorder(backend, "small", "7")
        self.replica = TrafficRecorder(backend, price_per_hour=3.6, power_watts=50)
        self.decisions = Decisions(backend)
        self.statistics, self.outcomes, self.traffic = Statistics(), Counter[str](), Traffic()

    def work(self) -> None:
        self.statistics, self.outcomes, self.traffic = busy_system()
        self.model.batch(
            Timing(queue_s=0.02, compute_s=0.01, batch_rows=8, close_reason="full", error_s=-0.002)
        )

    def publish(self, queue_rows: int = 5, uptime_s: float = 10) -> None:
        self.model.publish(
            self.statistics,
            self.outcomes,
            busy_s=self.statistics.busy_s,
            queue_rows=queue_rows,
            predicted_wait_s=0.03,
            limit_rows=256,
        )
        self.replica.publish(self.traffic)
        self.replica.costs(uptime_s)
        self.replica.versions(
            [{"name": "small", "version": "7", "state": "ready", "current": True}]
        )


def busy_system() -> tuple[Statistics, Counter[str], Traffic]:
    """Totals as they stand after some work."""
    statistics = Statistics(busy_s=0.5, batches=3, rows=12, queue_s=0.1, copied_bytes=700)
    statistics.copy_s, statistics.first_rows, statistics.expired_rows = 0.004, 9, 2
    statistics.shed_rows.update({"queue": 4, "deadline": 3})
    statistics.close_reasons.update({"engine_free": 2, "full": 1})
    traffic = Traffic(received_bytes=1000, sent_bytes=2000, open_streams=2)
    traffic.streams_closed.update({"peer": 7, "idle": 2})
    traffic.astray.update({"404": 3})
    return statistics, Counter({"ok": 4, "429": 1}), traffic


# --- the table ----------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_metric_follows_the_conventions_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"datamix(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    unit = metric.name.removesuffix("_total").endswith(UNITS)
    assert unit != (metric.name in COUNTS)
    # What the client library appends to a histogram, and units that are not base units.
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_ms", "_us", "_percent"))
    assert metric.help.endswith(".")
    assert not metric.help[0].islower()


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_labels_come_from_a_small_fixed_set(metric: Metric) -> None:
    assert set(metric.labels) <= LABELS
    assert len(set(metric.labels)) == len(metric.labels)


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_histograms_have_rising_buckets_and_nothing_else_has_any(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert all(bound > 0 for bound in metric.buckets)


# --- recording ----------------------------------------------------------------------------------


def test_every_metric_of_the_table_moves() -> None:
    registry = CollectorRegistry()
    replica = Replica(PrometheusBackend(registry))
    before = samples(registry)
    replica.work()
    replica.publish()
    replica.decisions.publish(
        before=1, target=3, running=1, forecast_rows=50, capacity_rows=20, wait_s=0.1
    )
    after = samples(registry)
    for metric in published_by("replica", "model", "autoscaler"):
        assert after[exported(metric)] > before.get(exported(metric), 0.0), metric.name


def test_values_arrive_under_their_labels() -> None:
    registry = CollectorRegistry()
    replica = Replica(PrometheusBackend(registry))
    replica.work()
    replica.publish()

    def value(name: str, **labels: str) -> float | None:
        of_model = {"model": "small", "version": "7", **labels}
        return registry.get_sample_value(name, of_model)

    def total(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("datamix_requests_total", outcome="ok") == 4
    assert value("datamix_requests_total", outcome="429") == 1
    assert total("datamix_requests_total", model="", version="", outcome="404") == 3
    assert value("datamix_batches_total", close_reason="engine_free") == 2
    assert value("datamix_batches_total", close_reason="full") == 1
    assert value("datamix_rows_total") == 12
    assert value("datamix_engine_busy_seconds_total") == 0.5
    assert total("datamix_received_bytes_total") == 1000
    assert total("datamix_sent_bytes_total") == 2000
    assert total("datamix_copied_bytes_total", model="", version="", step="receive") == 1000
    assert total("datamix_copied_bytes_total", model="", version="", step="send") == 2000
    assert value("datamix_copied_bytes_total", step="batch") == 700
    assert value("datamix_queue_rows") == 5
    assert total("datamix_open_streams") == 2
    assert total("datamix_streams_closed_total", reason="peer") == 7
    assert total("datamix_streams_closed_total", reason="idle") == 2
    assert value("datamix_batch_rows_sum") == 8
    assert value("datamix_batch_rows_bucket", le="8.0") == 1
    assert value("datamix_batch_rows_bucket", le="4.0") == 0
    assert value("datamix_batch_compute_seconds_sum") == 0.01
    assert value("datamix_batch_queue_seconds_sum") == 0.02
    assert value("datamix_batch_error_seconds_sum") == 0.002
    assert value("datamix_queue_seconds_total") == 0.1
    assert value("datamix_copy_seconds_total") == 0.004
    assert value("datamix_predicted_wait_seconds") == 0.03
    assert value("datamix_batch_limit_rows") == 256
    assert value("datamix_inferences_total") == 9
    assert value("datamix_shed_rows_total", reason="queue") == 4
    assert value("datamix_shed_rows_total", reason="deadline") == 3
    assert value("datamix_expired_rows_total") == 2
    assert value("datamix_served_versions", state="current") == 1
    assert total("datamix_replica_cost_total") == pytest.approx(0.01)  # 10 s at 3.6 an hour
    assert total("datamix_replica_energy_joules_total") == 500


def test_publishing_twice_counts_once() -> None:
    registry = CollectorRegistry()
    replica = Replica(PrometheusBackend(registry))
    replica.work()
    replica.publish()
    once = samples(registry)
    replica.publish()
    assert samples(registry) == once
    replica.statistics.rows += 3
    replica.outcomes["ok"] += 1
    replica.traffic.open_streams = 0
    replica.publish(queue_rows=0)
    grown = samples(registry)
    assert grown["datamix_rows_total"] == once["datamix_rows_total"] + 3
    assert grown["datamix_requests_total"] == once["datamix_requests_total"] + 1
    assert grown["datamix_open_streams"] == grown["datamix_queue_rows"] == 0


def test_a_counter_is_never_asked_to_add_nothing() -> None:
    """Ray's counters refuse that."""

    class Strict:
        def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
            assert metric.kind != "counter" or value > 0
            assert set(labels) == set(metric.labels)

        def flush(self) -> None: ...

    replica = Replica(Strict())
    replica.publish(uptime_s=0)
    replica.work()
    for _ in range(2):
        replica.publish()


def test_a_registry_takes_the_table_once() -> None:
    registry = CollectorRegistry()
    PrometheusBackend(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusBackend(registry)


def test_a_version_that_has_left_stands_at_0() -> None:
    registry = CollectorRegistry()
    recorder = TrafficRecorder(PrometheusBackend(registry))

    def value(version: str, state: str) -> float | None:
        labels = {"model": "m", "version": version, "state": state}
        return registry.get_sample_value("datamix_served_versions", labels)

    old = {"name": "m", "version": "1", "state": "ready", "current": True}
    new = {"name": "m", "version": "2", "state": "ready", "current": True}
    recorder.versions([old])
    recorder.versions([{**old, "current": False}, new])
    assert (value("1", "ready"), value("1", "current")) == (1, 0)
    assert (value("2", "ready"), value("2", "current")) == (1, 1)
    recorder.versions([new])
    assert value("1", "ready") == 0


def test_what_was_counted_before_anybody_read_is_left_out() -> None:
    registry = CollectorRegistry()
    recorder = Recorder(PrometheusBackend(registry))

    def publish(joules: float, xids: dict[str, int]) -> tuple[float | None, float | None]:
        recorder.publish(
            [
                Sample("datamix_gpu_energy_joules_total", {"gpu": "0"}, joules),
                Sample("datamix_gpu_power_watts", {"gpu": "0"}, 300),
                *(
                    Sample("datamix_gpu_xid_errors_total", {"gpu": "0", "xid": xid}, count)
                    for xid, count in xids.items()
                ),
            ]
        )
        return (
            registry.get_sample_value("datamix_gpu_energy_joules_total", {"gpu": "0"}),
            registry.get_sample_value("datamix_gpu_xid_errors_total", {"gpu": "0", "xid": "79"}),
        )

    assert publish(1e9, {}) == (None, None)
    assert publish(1e9 + 600, {}) == (600, None)
    assert publish(1e9 + 1200, {"79": 1}) == (1200, 1)  # an error that came later counts
    assert publish(50, {"79": 1}) == (1250, 1)  # the driver was loaded again, its meter with it


def test_the_page_is_what_the_table_makes_of_it() -> None:
    """Otherwise: python -m cluster.monitoring.page."""
    assert (ROOT / "docs/metrics.md").read_text() == page()


def test_buckets_are_those_that_prometheus_own_client_counts() -> None:
    registry = CollectorRegistry()
    theirs, metric = PrometheusBackend(registry), next(m for m in TABLE if m.kind == "histogram")
    labels = dict.fromkeys(metric.labels, "x")
    ours = Observed(metric.buckets, labels)
    for value in (0, 0.5, 1, 1.5, 2, 3, 700, 1024, 1025, 9999):
        theirs.record(metric, value, labels)
        ours.add(value)
    for le, count in ours.buckets():
        found = registry.get_sample_value(f"{metric.name}_bucket", {**labels, "le": le})
        assert found == count, le
    assert registry.get_sample_value(f"{metric.name}_sum", labels) == ours.total
    assert registry.get_sample_value(f"{metric.name}_count", labels) == sum(ours.counts)
