"""Failures of the cloud under verified load: nothing wrong, nothing lost (docs/failures.md).

Those of one machine share a cluster of two replicas, those of several hosts another on isolated
hosts. How long a recovery takes is measured by `benchmarks/failures.py`, not held here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import safetensors.numpy

from benchmarks import failures, failures_hosts
from benchmarks.failures import Scene, Struck
from benchmarks.hosted import Hosted, hosted
from benchmarks.operated import BUNDLE, Fleet, Seen
from datamix.canaries import CANARIES
from datamix.errors import Unavailable
from tests.hosts import Hosts
from tests.test_bundle import replace_weights

pytestmark = pytest.mark.timeout(600)

LOAD: dict[str, Any] = {"rate": 8.0, "devices": 24}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with failures.scene(health_timeout_s=4.0) as scene:
        yield scene


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Iterator[Hosted]:
    with hosted(hosts) as cluster:
        yield cluster


def check(seen: Seen, struck: Struck) -> None:
    summary = seen.summary
    assert summary.wrong == seen.strays == 0
    assert seen.lost == struck.excused, (summary.failed, summary.unsent)
    assert summary.ok > 50


@pytest.mark.cluster
@pytest.mark.parametrize("name", failures.FAILURES)
def test_a_failure_on_one_machine_loses_nothing(scene: Scene, name: str) -> None:
    seen, struck = failures.strike(scene, name, duration_s=10.0, **LOAD)
    check(seen, struck)
    if "replica" in name or "HAProxy" in name:
        assert seen.summary.reconnects > 0, "nobody noticed, so nothing was killed under load"


@pytest.mark.cluster
def test_an_update_and_one_that_is_refused_lose_nothing(scene: Scene, tmp_path: Path) -> None:
    """Serve would go on without the old replicas' successors; `datamix deploy` goes back."""
    wrong = tmp_path / "wrong"
    shutil.copytree(BUNDLE, wrong)
    tensors = safetensors.numpy.load((wrong / CANARIES).read_bytes())
    tensors["blocks.0.output"] = -tensors["blocks.0.output"]
    replace_weights(wrong, CANARIES, safetensors.numpy.save(tensors))
    fleet = Fleet(scene.door, duration_s=600.0, **LOAD)
    fleet.wait_running()
    before = scene.cluster.running()
    scene.deploy(release="next")
    with urlopen(f"{scene.cluster.url}/v2", timeout=10) as answer:
        assert json.load(answer)["release"] == "next"
    updated = scene.cluster.running()
    assert not before & updated
    with pytest.raises(
        Unavailable, match=r"block 0 fails its canaries: .* what ran before runs on"
    ):
        scene.deploy(release="next", bundle=str(wrong))
    # What ran before was deployed again without a restart, so that Serve replaces what dies.
    assert scene.cluster.running() == updated
    fleet.stop()
    seen = fleet.seen()
    check(seen, Struck(0.0))
    assert seen.summary.moved + seen.summary.reconnects > 0


@pytest.mark.hosts
@pytest.mark.parametrize("name", failures_hosts.FAILURES)
def test_a_failure_of_a_host_loses_nothing(cluster: Hosted, name: str) -> None:
    seen, struck = failures_hosts.strike(
        cluster, failures_hosts.FAILURES[name], duration=20.0, **LOAD
    )
    check(seen, struck)
