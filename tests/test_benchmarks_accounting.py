"""CPU time is booked to the server that took it."""

import os
import subprocess
import sys

import pytest

from benchmarks import accounting

# Starts a child that takes 0.2 s of CPU time, says so, and waits to be told to end.
PARENT = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", '''
import sys, time
while time.process_time() < 0.2: pass
print("busy", flush=True)
sys.stdin.read()
'''])
"""


def test_children_are_counted_and_strangers_are_not() -> None:
    before = accounting.snapshot("test")
    assert before == {}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env=accounting.environment("test"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"busy\n"
        after = accounting.snapshot("test")
        assert accounting.snapshot("another") == {}
        parent.communicate()
    assert len(after) == 2
    assert set(accounting.spent_s(before, after)) == {"python child"}
    assert accounting.spent_s(before, after)["python child"] >= 0.19
    assert accounting.snapshot("test") == {}


def test_time_is_told_by_process_and_summed_by_kind() -> None:
    before = {1: ("idle", 1.0), 2: ("worker", 2.0)}
    after = {1: ("replica", 1.5), 2: ("worker", 2.25), 3: ("worker", 0.5)}
    assert accounting.spent_s(before, after) == {"worker": 0.75, "replica": 0.5}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["ray::ServeReplica:datamix:Backbone"], "ServeReplica"),
        (["ray::ServeController.listen_for_change"], "ServeController"),
        (["/opt/x/haproxy", "-db", "-f", "x.cfg"], "haproxy"),
        (["/opt/python3.11", "-m", "benchmarks.peers.mosec_app", "--port=1"], "mosec_app"),
        (["python", "-u", "/opt/ray/log_monitor.py", "--x"], "log_monitor"),
        (["python3", "-c", "from multiprocessing.spawn import spawn_main"], "python child"),
        (["python3"], "python3"),
        ([], "unknown"),
    ],
)
def test_a_process_is_called_by_what_it_does(command: list[str], kind: str) -> None:
    assert accounting.kind(command) == kind


def test_a_mark_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(accounting.VARIABLE, raising=False)
    with accounting.marked("test"):
        inside = os.environ[accounting.VARIABLE]
    assert inside == accounting.environment("test")[accounting.VARIABLE]
    assert accounting.VARIABLE not in os.environ
