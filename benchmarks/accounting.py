"""Whose CPU time it was: a server's processes carry a mark in their environment.

Children inherit it, so it finds what a server starts, wherever that hangs in the process tree.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import PurePath

import psutil

VARIABLE = "DATAMIX_BENCHMARK_SERVER"

# By process id: what it is, and its CPU time so far in seconds.
Snapshot = dict[int, tuple[str, float]]


def environment(mark: str) -> dict[str, str]:
    """The environment of a server whose processes are to be counted under ``mark``."""
    return {**os.environ, VARIABLE: _unique(mark)}


@contextlib.contextmanager
def marked(mark: str) -> Iterator[None]:
    """Mark the processes that are started in the block, where no environment can be passed."""
    os.environ[VARIABLE] = _unique(mark)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def _unique(mark: str) -> str:
    """``mark`` of this run: another benchmark may be at work on the same machine."""
    return f"{mark}.{os.getpid()}"


def processes(mark: str) -> list[psutil.Process]:
    """All processes that carry ``mark`` now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(VARIABLE) == _unique(mark):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kind(command: list[str]) -> str:
    """What a process is, from its command line: the name of a module, a program or a Ray actor."""
    if not command:
        return "unknown"
    title, *arguments = command
    if title.startswith("ray::"):
        return re.split("[:.]", title.split()[0].removeprefix("ray::"))[0]
    name = PurePath(title.split()[0]).name
    if not name.startswith("python"):
        return name
    if "-m" in arguments[:-1]:
        return arguments[arguments.index("-m") + 1].rpartition(".")[2]
    if "-c" in arguments:
        return "python child"
    script = next((argument for argument in arguments if argument.endswith(".py")), name)
    return PurePath(script).stem


def snapshot(mark: str) -> Snapshot:
    """The processes that carry ``mark`` now, and their CPU time so far."""
    found: Snapshot = {}
    for process in processes(mark):
        try:
            times = process.cpu_times()
            found[process.pid] = kind(process.cmdline()), times.user + times.system
        except (psutil.Error, OSError):
            continue
    return found


def spent_s(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """CPU time in seconds between two snapshots by kind of process, the largest first.

    By process and not by kind, because Ray's actors change their titles with what they do.
    """
    total: dict[str, float] = {}
    for pid, (name, seconds) in after.items():
        total[name] = total.get(name, 0.0) + seconds - before.get(pid, (name, 0.0))[1]
    return dict(sorted(total.items(), key=lambda part: -part[1]))
