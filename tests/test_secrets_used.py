"""No coefficients, seed or noise is used twice: two processes race, one is killed and restarted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fake_device import SHAPES
from tests.test_readme import ROOT

INFERENCES = 5000  # of each mode, by both processes together


def start(file: Path, count: int, mode: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.secrets_used", str(file), str(count), mode]
    return subprocess.Popen(command, cwd=ROOT)


def inferences(file: Path) -> int:
    return file.read_bytes().count(b"inference ") if file.exists() else 0


@pytest.mark.parametrize("mode", ["mix", "split"])
def test_nothing_secret_is_used_twice(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "used"
    half = INFERENCES // 2
    running = [start(file, half, mode), start(file, INFERENCES, mode)]
    try:
        end_s = time.monotonic() + 150
        while inferences(file) < half and time.monotonic() < end_s:
            time.sleep(0.05)  # another process's progress: there is no clock to pass in
        os.kill(running[1].pid, signal.SIGKILL)
        assert running[1].wait() == -signal.SIGKILL
        done = inferences(file)
        assert half <= done < INFERENCES + half
        running.append(start(file, half, mode))
        assert running[0].wait(150) == 0
        assert running[2].wait(150) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    lines = file.read_text().split("\n")[:-1]
    kinds = Counter(line.split()[0] for line in lines)
    assert kinds["inference"] >= INFERENCES
    expected = {"mix": ("coefficients",), "split": ("seed", "noise")}[mode]
    for kind in expected:
        assert kinds[kind] >= INFERENCES * len(SHAPES)
    repeated = [line for line, n in Counter(lines).items() if n > 1 and "inference" not in line]
    assert not repeated
