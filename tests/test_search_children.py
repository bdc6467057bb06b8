"""Trials in real processes, and that none of them is ever left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamix.errors import ConfigError
from edge.search.children import run_in_children
from edge.search.space import Candidate
from edge.search.trial import Trial
from tests.fake_trainer import Sleeper, broken, known

ROOT = Path(__file__).parents[1]


def trials(*widths: int) -> list[Trial]:
    return [Trial(Candidate("fake", (("width", width),)), 1.0, 0) for width in widths]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


def pids_in(folder: Path, count: int) -> list[int]:
    """The process ids of ``count`` sleepers, once all of them sleep."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [int(path.read_text()) for path in folder.glob("*.pid")]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{count} processes did not start within a minute")


def test_every_trial_is_run_once_and_failures_say_why() -> None:
    wanted = trials(1, 2, 3, 4, 8)
    found = {o.trial: o for o in run_in_children(broken, wanted, 3, lambda: None)}
    assert set(found) == set(wanted)
    problems = [found[trial].problem for trial in wanted]
    assert problems == [
        "the data are not there, expected some",
        "ZeroDivisionError: division by zero",
        "the process died with exit code -9",
        None,
        None,
    ]
    for trial in wanted[3:]:
        assert found[trial].measured == known(trial)
        assert found[trial].wall_s > 0


def test_no_trials_no_processes_and_no_jobs_are_refused() -> None:
    assert list(run_in_children(known, [], 2, lambda: None)) == []
    with pytest.raises(ConfigError, match="jobs is 0"):
        list(run_in_children(known, trials(4), 0, lambda: None))


class Stop(Exception):
    """What a caller may end with."""


def test_an_end_by_an_exception_leaves_nobody_behind(tmp_path: Path) -> None:
    pids: list[int] = []

    def tick() -> None:
        if len(list(tmp_path.glob("*.pid"))) == 2:
            pids.extend(pids_in(tmp_path, 2))
            raise Stop

    with pytest.raises(Stop):
        list(run_in_children(Sleeper(tmp_path), trials(1, 2, 3), 2, tick, every_s=0.05))
    assert len(pids) == 2
    assert not any(map(alive, pids))


# Reads like a search that a person started: ends by KeyboardInterrupt, or by whatever kills it.
SCRIPT = """
import sys
from pathlib import Path
from edge.search.children import run_in_children
from edge.search.space import Candidate
from edge.search.trial import Trial
from tests.fake_trainer import Sleeper

if __name__ == "__main__":
    trials = [Trial(Candidate("fake", (("width", w),)), 1.0, 0) for w in (1, 2)]
    list(run_in_children(Sleeper(Path(sys.argv[1])), trials, 2, lambda: None))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_search_ends_its_children(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    children: list[int] = []
    try:
        children = pids_in(tmp_path, 2)
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)  # a terminal's Ctrl-C reaches the children, too
        else:
            parent.send_signal(number)
        _, said = parent.communicate(timeout=90)
        assert until_gone(children)
        assert (b"KeyboardInterrupt" in said) == (number == signal.SIGINT)
    finally:
        for pid in [*filter(alive, children), *([parent.pid] if parent.poll() is None else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
