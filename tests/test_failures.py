"""Failures of the cloud under verified load: nothing wrong, nothing lost (docs/failures.md).

Those of one machine share a cluster of two replicas, those of several hosts another on isolated
hosts. How long a recovery takes is measured by `benchmarks/failures.py`, not held here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import failures, failures_hosts
from benchmarks.failures import Scene, Struck
from benchmarks.hosted import Hosted, hosted
from benchmarks.operated import Seen
from tests.hosts import Hosts

pytestmark = pytest.mark.timeout(600)

LOAD = {"rate": 8.0, "devices": 24}


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


@pytest.mark.hosts
@pytest.mark.parametrize("name", failures_hosts.FAILURES)
def test_a_failure_of_a_host_loses_nothing(cluster: Hosted, name: str) -> None:
    seen, struck = failures_hosts.strike(
        cluster, failures_hosts.FAILURES[name], duration=20.0, **LOAD
    )
    check(seen, struck)
