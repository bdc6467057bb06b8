"""What NVML knows, as samples; and a driver that is missing, restarts, hangs or loses a GPU."""

from __future__ import annotations

import inspect
import os
import threading
from pathlib import Path
from typing import Any

import pynvml
import pytest
from prometheus_client import CollectorRegistry

from deployments import nvml
from deployments.metrics import TABLE, PrometheusBackend, Recorder, Sample, rows
from deployments.node import take_name
from deployments.nvml import Watch
from tests.fake_nvml import GIB, FakeNvml, living


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def value(samples: list[Sample], name: str, /, **labels: str) -> float | None:
    """The one sample of that name with at least these labels."""
    named = [sample for sample in samples if sample.name == f"datamix_gpu_{name}"]
    found = [sample.value for sample in named if labels.items() <= sample.labels.items()]
    assert len(found) <= 1, (name, labels)
    return found[0] if found else None


def test_the_fake_has_the_functions_of_the_real_bindings() -> None:
    """Names and parameters; errors and constants are pynvml's own anyway."""
    for name, function in inspect.getmembers(FakeNvml, inspect.isfunction):
        if name.startswith("nvml"):
            real = list(inspect.signature(getattr(pynvml, name)).parameters)
            assert list(inspect.signature(function).parameters)[1:] == real, name


def test_the_module_of_the_driver_is_nvidias() -> None:
    assert nvml.load() is pynvml


def test_a_reading_is_in_base_units_and_labelled_as_the_table_says() -> None:
    fake = FakeNvml(2)
    samples = Watch(fake).samples()
    table = {row.name: row for row in TABLE}
    for sample in samples:
        assert table[sample.name].source == "node"
        assert tuple(sample.labels) == table[sample.name].labels
    assert value(samples, "up", gpu="1") == 1
    assert value(samples, "utilisation_ratio", gpu="0") == pytest.approx(0.57)
    assert value(samples, "memory_utilisation_ratio", gpu="0") == pytest.approx(0.31)
    assert value(samples, "memory_bytes", gpu="0", mig="") == 80 * GIB
    assert value(samples, "memory_used_bytes", gpu="0", mig="") == 21 * GIB
    assert value(samples, "power_watts", gpu="0") == 312.5
    assert value(samples, "power_limit_watts", gpu="0") == 700
    assert value(samples, "energy_joules_total", gpu="0") == 5000
    assert value(samples, "temperature_celsius", gpu="0") == 61
    assert value(samples, "clock_hertz", gpu="0", domain="sm") == 1755e6
    assert value(samples, "clock_hertz", gpu="0", domain="memory") == 2619e6
    assert value(samples, "throttled_seconds_total", gpu="0", reason="power") == 4
    assert value(samples, "throttled_seconds_total", gpu="0", reason="thermal") is None
    assert value(samples, "ecc_errors_total", gpu="0", kind="corrected") == 2
    assert value(samples, "info", gpu="0", name="NVIDIA Fake", driver="580.65") == 1
    assert value(samples, "reading_age_seconds") == 0


def test_every_row_of_a_node_is_read() -> None:
    fake = living(FakeNvml(), began=0.0)
    fake.events.append((0, 79))
    names = {sample.name for sample in Watch(fake).samples()}
    assert names == {row.name for row in rows("node")}


def test_a_reading_can_be_published() -> None:
    registry = CollectorRegistry()
    recorder = Recorder(PrometheusBackend(registry, rows("node")))
    watch = Watch(living(FakeNvml()))
    for _ in range(4):
        recorder.publish(watch.samples())
    labels = {"gpu": "0", "mig": "", "uuid": "GPU-0", "name": "NVIDIA Fake", "driver": "580.65"}
    assert registry.get_sample_value("datamix_gpu_info", labels) == 1
    assert registry.get_sample_value("datamix_gpu_energy_joules_total", {"gpu": "0"})


def test_reasons_of_throttling_are_told_apart() -> None:
    fake = FakeNvml()
    fake.gpus[0].throttled = (
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown | pynvml.nvmlClocksThrottleReasonGpuIdle
    )
    samples = Watch(fake).samples()
    assert value(samples, "throttled", reason="thermal_hardware") == 1
    assert value(samples, "throttled", reason="power_cap") == 0


def test_what_a_gpu_cannot_tell_is_left_out_and_the_rest_is_there() -> None:
    fake = FakeNvml()
    fake.gpus[0].unsupported = {
        "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceRegisterEvents",
        "nvmlDeviceGetMigMode", "nvmlDeviceGetComputeRunningProcesses",
    }  # fmt: skip
    samples = Watch(fake).samples()
    assert value(samples, "power_watts") is None
    assert value(samples, "ecc_errors_total", kind="corrected") is None
    assert value(samples, "utilisation_ratio") == pytest.approx(0.57)
    assert value(samples, "up", gpu="0") == 1


def test_instances_of_a_gpu_in_mig_mode_stand_beside_it() -> None:
    fake = FakeNvml()
    fake.gpus[0].mig = [(3, 0, 20 * GIB), (5, 0, 10 * GIB)]
    samples = Watch(fake).samples()
    assert value(samples, "memory_bytes", mig="3/0") == 20 * GIB
    assert value(samples, "memory_bytes", mig="5/0") == 10 * GIB
    assert value(samples, "memory_bytes", mig="") == 80 * GIB
    assert value(samples, "info", uuid="MIG-0-1") == 1
    assert value(samples, "utilisation_ratio") is None  # NVML has none there
    assert value(samples, "power_watts", gpu="0") == 312.5


def test_memory_of_processes_is_summed_by_whose_they_are() -> None:
    fake = FakeNvml()
    fake.gpus[0].processes = [(os.getpid(), 2 * GIB), (2**22 + 1, GIB), (1, None)]
    samples = Watch(fake).samples()
    assert value(samples, "processes", process="other") == 3
    assert value(samples, "processes", process="replica") == 0
    assert value(samples, "process_memory_bytes", process="other") == 3 * GIB


def test_a_replica_is_known_by_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"/proc/7/cmdline": b"ray::ServeReplica:datamix:Backbone\0", "/proc/8/cmdline": b"sh"}
    monkeypatch.setattr(Path, "read_bytes", lambda path: lines[str(path)])
    assert [nvml._kind(pid) for pid in (7, 8)] == ["replica", "other"]


def test_critical_errors_are_counted_from_reading_to_reading() -> None:
    fake = FakeNvml(2)
    watch = Watch(fake)
    assert value(watch.samples(), "xid_errors_total") is None
    fake.events += [(1, 79), (1, 79), (0, 63)]
    watch.samples()
    fake.events.append((1, 79))
    samples = watch.samples()
    assert value(samples, "xid_errors_total", gpu="1", xid="79") == 3
    assert value(samples, "xid_errors_total", gpu="0", xid="63") == 1


def test_without_a_driver_nothing_is_known_and_up_is_0() -> None:
    fake = FakeNvml()
    fake.library = False
    watch = Watch(fake)
    samples = watch.samples()
    assert {(s.name, s.value) for s in samples if s.name.endswith("up")} == {("datamix_gpu_up", 0)}
    assert value(samples, "up", gpu="") == 0
    assert watch.absent
    assert "Library" in watch.problem or "Shared" in watch.problem


def test_a_driver_that_is_loaded_later_is_found() -> None:
    fake, clock = FakeNvml(), Clock()
    fake.running = False
    watch = Watch(fake, clock=clock)
    assert value(watch.samples(), "up", gpu="") == 0
    fake.running = True
    clock.now += 0.1
    assert value(watch.samples(), "up", gpu="") == 0  # not asked again at once
    clock.now += 60
    assert value(watch.samples(), "up", gpu="0") == 1
    assert watch.problem == ""


def test_a_restart_of_the_driver_shows_as_down_and_then_new_figures() -> None:
    fake, clock = FakeNvml(), Clock()
    watch = Watch(fake, clock=clock)
    watch.samples()
    fake.restart()
    clock.now += 2
    samples = watch.samples()
    assert value(samples, "up", gpu="0") == 0
    assert value(samples, "reading_age_seconds") == 2
    assert value(samples, "energy_joules_total") == 5000  # the last that was known
    samples = watch.samples()
    assert value(samples, "up", gpu="0") == 1
    assert value(samples, "energy_joules_total") == 0
    assert fake.opened == 2


def test_a_driver_that_hangs_costs_a_bounded_wait_and_one_thread() -> None:
    fake, clock = FakeNvml(), Clock()
    watch = Watch(fake, clock=clock, deadline_s=0.05)
    assert value(watch.samples(), "up", gpu="0") == 1
    before = threading.active_count()
    fake.hang.clear()
    try:
        for _ in range(5):
            clock.now += 10
            samples = watch.samples()
            assert value(samples, "up", gpu="0") == 0
            assert value(samples, "utilisation_ratio") == pytest.approx(0.57)
        assert value(samples, "reading_age_seconds") == 50
        assert threading.active_count() == before + 1
        (hung,) = (t for t in threading.enumerate() if t.name == "nvml")
        assert hung.daemon, "it would keep its process from ending"
    finally:
        fake.hang.set()
    hung.join(10)
    samples = watch.samples()
    assert value(samples, "up", gpu="0") == 1
    assert value(samples, "reading_age_seconds") == 0


def test_a_gpu_that_is_lost_is_down_alone() -> None:
    fake = FakeNvml(2)
    watch = Watch(fake)
    watch.samples()
    fake.gpus[0].lost = True
    samples = watch.samples()
    assert value(samples, "up", gpu="0") == 0
    assert value(samples, "up", gpu="1") == 1
    assert value(samples, "power_watts", gpu="0") is None
    assert value(samples, "power_watts", gpu="1") == 312.5


def test_a_name_is_taken_once_and_free_again_when_it_is_closed() -> None:
    name = f"datamix-test-{os.getpid()}"
    first = take_name(name)
    assert first is not None
    with first:
        assert take_name(name) is None
    second: Any = take_name(name)
    assert second is not None
    second.close()
