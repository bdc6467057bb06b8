"""Isolated hosts: that they are isolated, and that power and cables do what they say."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Hosts, why_not

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def pair() -> Iterator[Hosts]:
    """Two hosts of their own, beside those that the other tests share."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts() as pair:
        pair.up(2)
        yield pair


def reaches(hosts: Hosts, number: int, other: int, within_s: int = 20) -> bool:
    probe = f"ssh -o ConnectTimeout={within_s} {hosts.ip(other)} hostname || true"
    return hosts.run(number, probe).strip() == f"host{other}"


def test_hosts_have_a_disk_processes_and_a_name_of_their_own(pair: Hosts) -> None:
    pair.run(0, "echo here > /tmp/mine; echo here > ~/mine")
    assert pair.run(1, "hostname; ls /tmp/mine ~/mine 2>/dev/null || true") == "host1\n"
    assert not Path("/tmp/mine").exists()
    assert pair.run(1, "echo $$").strip() != str(os.getpid())
    sleeper = pair.start(0, "echo up; sleep 321.5")
    assert sleeper.stdout is not None and sleeper.stdout.readline() == "up\n"
    assert [line for line in pair.processes(0) if "321.5" in line]
    assert not [line for line in pair.processes(1) if "321.5" in line]
    pair.stop(sleeper)
    assert pair.processes(0) == []


def test_what_is_outside_tmp_is_seen_by_all(pair: Hosts) -> None:
    (pair.shared / "word").write_text("read by both")
    for number in (0, 1):
        assert pair.run(number, f"cat {pair.shared}/word") == "read by both"
        assert "conftest.py" in pair.run(number, f"ls {Path(__file__).parent}")


def test_a_cut_cable_keeps_the_host_and_loses_the_network(pair: Hosts) -> None:
    assert reaches(pair, 0, 1)
    pair.cut(1)
    try:
        assert not reaches(pair, 0, 1, within_s=1)
        assert pair.run(1, "hostname").strip() == "host1"
    finally:
        pair.mend(1)
    assert reaches(pair, 0, 1)


def test_a_host_without_power_forgets_everything(pair: Hosts) -> None:
    pair.run(1, "touch /tmp/lost")
    process = pair.start(1, "sleep 322.5")
    pair.power_off(1)
    assert process.wait(10) != 0
    pair.stop(process)
    assert not reaches(pair, 0, 1, within_s=1)
    pair.power_on(1)
    assert reaches(pair, 0, 1)
    assert pair.run(1, "ls /tmp/lost || true") == ""


def test_two_runs_do_not_meet(pair: Hosts) -> None:
    with Hosts() as others:
        others.up(2)
        assert others.ip(1) == pair.ip(1)
        pair.run(0, "touch /tmp/of-the-pair")
        assert others.run(1, f"ssh {others.ip(0)} 'ls /tmp/of-the-pair || true'") == ""
        shared = others.shared
    assert not shared.exists()
    assert reaches(pair, 0, 1)
