"""`ray up` for real: the shipped on-premises file, on isolated hosts, from first to last.

Starting takes a minute or two, and scaling as long again; the fixture takes it all down at the end
of the run, and fails where a process is left.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.launched import HEAD, USER, WORKERS, Launched, until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]


def check(report: dict[str, Any]) -> None:
    """Every inference that was not under way at the end is answered, and rightly."""
    assert report["verified"] is True
    assert report["failed"] == {} and report["wrong"] == report["unsent"] == 0, report
    assert report["misrouted"] == report["unmatched"] == report["unreadable"] == 0
    assert report["ok"] > 0


def test_the_head_and_a_worker_serve(launched: Launched) -> None:
    """min_workers is 0: the worker came because a replica had to go somewhere."""
    assert set(launched.nodes()) >= {HEAD, WORKERS[0]}
    shown = launched.datamix(f"status {launched.file}")
    assert "application datamix: RUNNING" in shown and "1 RUNNING" in shown


def test_the_nodes_have_what_the_cloud_needs_and_no_more(launched: Launched) -> None:
    for number in (HEAD, WORKERS[0]):
        found = launched.hosts.run(number, "ls ~/datamix; find ~/datamix/bundles -type f")
        assert {"bundles", "constraints.txt", "datamix", "deployments"} <= set(found.split())
        assert "edge" not in found.split()
        assert "backbone.safetensors" in found and "device.safetensors" not in found


def test_the_dashboard_is_not_for_others(launched: Launched) -> None:
    for host, expected in ((HEAD, "yes"), (USER, "no")):
        address = "127.0.0.1" if host == HEAD else launched.hosts.ip(HEAD)
        probe = f"curl -sf -m 5 http://{address}:8265/api/version >/dev/null && echo yes || echo no"
        assert launched.hosts.run(host, probe).strip() == expected


def test_a_second_worker_comes_with_the_demand_and_goes_without(launched: Launched) -> None:
    """And every front door answers, verified, meanwhile."""
    until(lambda: len(launched.nodes()) == 2, "one worker at rest", 120)
    fleet = launched.fleet("demand", [HEAD, WORKERS[0]], rate=20, seconds=400)
    until(lambda: len(launched.nodes()) == 3, "a second worker", 240)
    until(lambda: launched.answers(WORKERS[1]), "its front door", 120)
    doors = launched.fleet("doors", [HEAD, *WORKERS], rate=10, seconds=10)
    check(doors.ended())
    check(fleet.ended(now=True))
    until(lambda: len(launched.nodes()) == 2, "the end of the second worker", 240)
    assert launched.answers(HEAD)
