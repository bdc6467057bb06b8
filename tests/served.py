"""`datamix serve` as a user starts it, for the tests that need a real cluster."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "fashion-mnist-mix"
MARK = "DATAMIX_TEST_MARK"
START_S, STOP_S = 120, 60


@dataclass(frozen=True)
class Served:
    """A cluster that `datamix serve` started."""

    url: str
    bundle: str
    mark: str
    process: subprocess.Popen[str]
    address: str


def marked(mark: str) -> list[psutil.Process]:
    """Every living process that was started, directly or not, with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def gone(mark: str, within_s: float) -> list[psutil.Process]:
    """Wait until no marked process is left; the ones that are there in the end."""
    deadline = time.monotonic() + within_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@contextlib.contextmanager
def serving(
    *options: str, bundle: Path | None = BUNDLE, beside: Served | None = None
) -> Iterator[Served]:
    """`datamix serve` on a free port, or ``beside`` another on its cluster; ended with Ctrl-C."""
    from cluster.local import free_port

    mark = uuid.uuid4().hex
    address, port = "", str(free_port())
    if beside is not None:
        address, port = beside.address, beside.url.rsplit(":", 1)[1]
        options = (*options, "--address", address)
    arguments = [*(["--bundle", str(bundle)] if bundle else []), "--port", port]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", *arguments, *options],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:  # a cluster that fails to start ends, and with it its output
            if found := re.match(r"datamix models .*--address (\S+)", line):
                address = found[1]
            if found := re.match(r"serving at (\S+),", line):
                break
        else:
            pytest.fail("datamix serve ended before it served")
        yield Served(found[1], str(bundle), mark, process, address)
        assert process.poll() is None, "datamix serve ended by itself"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        finally:
            for left in marked(mark):  # of a run that went wrong: the next test is not to suffer
                left.kill()
            if process.stdout is not None:
                process.stdout.close()
