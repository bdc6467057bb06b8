"""`datamix gpu-exporter`: what Prometheus scrapes, and its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.gpu import export_gpus
from datamix.errors import ConfigError
from tests.fake_nvml import FakeNvml, living
from tests.served import ROOT


@contextlib.contextmanager
def exporting(nvml: FakeNvml, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    done, ready = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        assert done.wait(60)

    thread = threading.Thread(target=export_gpus, args=(0, "127.0.0.1", nvml, wait))
    thread.start()
    assert ready.wait(30)
    found = re.search(r"GPUs at (\S+),", capsys.readouterr().out)
    assert found
    try:
        yield found[1]
    finally:
        done.set()
        thread.join(30)
    assert not thread.is_alive()


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_is_a_reading(capsys: pytest.CaptureFixture[str]) -> None:
    fake = living(FakeNvml(2))
    with exporting(fake, capsys) as url:
        first = scrape(url)
        fake.gpus[1].celsius = 88
        second = scrape(url)
    assert first['datamix_gpu_up{"gpu": "1"}'] == 1
    assert first['datamix_gpu_temperature_celsius{"gpu": "1"}'] == 61
    assert second['datamix_gpu_temperature_celsius{"gpu": "1"}'] == 88
    energy = 'datamix_gpu_energy_joules_total{"gpu": "0"}'
    assert second[energy] > first[energy]


def test_without_a_driver_it_serves_that(capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeNvml()
    fake.library = False
    with exporting(fake, capsys) as url:
        found = scrape(url)
    assert found['datamix_gpu_up{"gpu": ""}'] == 0


def test_a_port_that_is_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with exporting(FakeNvml(), capsys) as url:
        port = int(re.findall(r"\d+", url)[-1])
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used"):
            export_gpus(port, "127.0.0.1", FakeNvml(), lambda: None)


def test_the_command_serves_until_ctrl_c() -> None:
    """On whatever this machine has: without a driver it says so and serves on."""
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "gpu-exporter", "--port", "0", "--host", "127.0.0.1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"GPUs at (http://127\.0\.0\.1:(\d+)/metrics),", line):
                    break
            assert found
            assert any(name.startswith("datamix_gpu_up") for name in scrape(found[1]))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            with pytest.raises(ConnectionRefusedError):
                http.client.HTTPConnection("127.0.0.1", int(found[2]), timeout=5).connect()
        finally:
            process.kill()
