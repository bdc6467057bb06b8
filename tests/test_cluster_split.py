"""Two applications on a real cluster, one of which loses its replica while masks are fetched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.local import free_port
from cluster.serve import serve
from datamix.bundle import load_backbone
from datamix.errors import ConfigError, DataMixError
from deployments.config import Config
from edge.client import Client, ClientConfig
from edge.data import load_sample
from edge.evaluate import _unmixed
from edge.runtime import TorchDevice
from tests.served import BUNDLE, ROOT, Served, serving
from tests.used_masks import assert_used_once, watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

Floats = npt.NDArray[np.float32]
NAME = "operator-b"


def stats(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/v2/stats", timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def second(cluster: Served) -> Iterator[Served]:
    """Operator B, beside the shared application and under a prefix of its own."""
    options = ("--operator", NAME, "--name", NAME, "--prefix", f"/{NAME}")
    with serving(*options, beside=cluster) as served:
        assert served.url == f"{cluster.url}/{NAME}"
        yield served


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    return watch(monkeypatch)


def test_a_killed_replica_of_operator_b_costs_time_and_nothing_else(
    cluster: Served, second: Served, used: dict[str, list[bytes]]
) -> None:
    """kill -9 while masks are fetched: every answer is right, and no mask hides two groups."""
    device, images = TorchDevice(BUNDLE), load_sample().inputs[slice(0, 200)]
    features = device.stem(device.preprocess(images))
    local = _unmixed(device, load_backbone(BUNDLE)[1], features)
    patience = ClientConfig(timeout_s=60, attempt_timeout_s=3, retry_reserve=100, masks_ahead=200)

    async def run() -> tuple[int, int]:
        options: dict[str, Any] = {
            "mode": "split", "second": second.url, "allow_same_operator": True, "config": patience,
        }  # fmt: skip
        async with Client(cluster.url, device, **options) as client:
            assert client._masks is not None and client.masks_from is not None
            filling = asyncio.create_task(client.prefetch())
            while len(client._masks) < 16:
                await asyncio.sleep(0.01)
            os.kill(stats(second.url)["pid"], signal.SIGKILL)
            assert not filling.done(), "all masks were there before the replica was killed"
            for start in range(0, len(images), 40):
                outputs = await client.infer(images[start : start + 40])
                # float16 at the shipped sigma; an answer to other noise would be off by hundreds.
                assert np.abs(outputs - local[start : start + 40]).max() < 1
            await filling
            assert client.not_private is not None
            return client._masks.fetched, client.masks_from.retries

    before = stats(second.url)["replica"]
    fetched, retries = asyncio.run(run())
    assert stats(second.url)["replica"] != before
    assert retries > 0, "nobody noticed, so the replica was not killed while it was asked"
    rounds, size = len(device.manifest.blocks), device.manifest.group_size
    assert len(used["noise"]) == len(images) // size * rounds
    # Retries send the same seeds again, and draw none.
    assert fetched * size * rounds <= len(used["seed"]) <= (fetched + 8) * size * rounds
    assert_used_once(used)


def test_a_fleet_is_answered_right_by_two_applications(
    cluster: Served, second: Served, tmp_path: Path
) -> None:
    report = tmp_path / "fleet.json"
    command = ["simulate", "--url", cluster.url, "--bundle", cluster.bundle, "--mode", "split"]
    command += ["--second", second.url, "--devices", "30", "--rate", "10", "--duration", "3"]
    done = _datamix(*command, "--allow-same-operator", "--json", str(report))
    summary = json.loads(report.read_text())
    assert done.returncode in (0, 3), done.stderr  # 3: this machine could not make the load in time
    assert summary["wrong"] == summary["unsent"] == 0 and not summary["failed"]
    assert summary["ok"] == summary["inferences"] > 10
    assert summary["not_private"] and "NOT PRIVATE" in done.stdout


def test_what_infer_prints_and_writes_is_marked(
    cluster: Served, second: Served, tmp_path: Path
) -> None:
    np.save(tmp_path / "some.npy", load_sample().inputs[slice(0, 3)][:, 0])
    done = _datamix(
        "infer", str(tmp_path / "some.npy"), "--url", cluster.url, "--bundle", cluster.bundle,
        "--mode", "split", "--second", second.url, "--allow-same-operator",
        "--json", str(tmp_path / "found.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.endswith(" (NOT PRIVATE)") for line in done.stdout.splitlines()] == [True] * 3
    assert done.stderr.startswith("NOT PRIVATE: ")
    assert all(row["not_private"] for row in json.loads((tmp_path / "found.json").read_text()))


def test_a_second_application_needs_a_cluster_to_be_on(cluster: Served) -> None:
    config = Config(bundle=cluster.bundle)
    with pytest.raises(ConfigError, match="expected --address with the running cluster"):
        serve(config, port=free_port(), name=NAME)
    with pytest.raises(ConfigError, match="prefix is 'operator-b', expected /"):
        serve(config, port=free_port(), address=cluster.address, name=NAME, prefix=NAME)


def test_an_operator_b_that_is_gone_is_an_error_and_sends_nothing(cluster: Served) -> None:
    before = stats(cluster.url)["rows"]

    async def run() -> None:
        options: dict[str, Any] = {"second": f"{cluster.url}/nobody", "allow_same_operator": True}
        async with Client(cluster.url, BUNDLE, mode="split", **options) as client:
            with pytest.raises(DataMixError, match="operator B: GET /v2 was .* status 404"):
                await client.infer(load_sample().inputs[slice(0, 4)])

    asyncio.run(run())
    assert stats(cluster.url)["rows"] == before


def _datamix(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
