"""Shards as processes of this machine, one event loop and so at most one core each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from edge.fleet.config import FleetConfig
from edge.fleet.crew import Crew, Lost, Word
from edge.fleet.prepare import Shelf
from edge.fleet.process import Failure, Target, Task, check_descriptors, main
from edge.fleet.shard import ShardResult


class _Processes:
    """A crew of spawned processes; they share this machine's clock."""

    start_error_s = 0.0

    def __init__(self, processes: dict[Connection, SpawnProcess]) -> None:
        self.size = len(processes)
        self._processes = processes
        self._numbers = {connection: number for number, connection in enumerate(processes)}

    def hear(self, timeout_s: float) -> list[Word]:
        said: list[Word] = []
        for connection in wait(self._open(), timeout_s):
            assert isinstance(connection, Connection)
            try:
                word: Any = connection.recv()
            except (EOFError, OSError):
                word = Lost(self._numbers[connection], f"exit code {self._exit_code(connection)}")
            if isinstance(word, ShardResult | Failure | Lost):
                connection.close()
            said.append(word)
        return said

    def start(self, headroom_s: float) -> float:
        start_s = time.monotonic() + headroom_s
        self._tell(start_s)
        return start_s

    def stop(self) -> None:
        self._tell(None)

    def _tell(self, word: float | None) -> None:
        for connection in self._open():
            with contextlib.suppress(OSError):  # that shard is gone, which is heard soon
                connection.send(word)

    def _open(self) -> list[Connection]:
        return [connection for connection in self._processes if not connection.closed]

    def _exit_code(self, connection: Connection) -> int | None:
        process = self._processes[connection]
        process.join(1)
        return process.exitcode


@contextlib.contextmanager
def processes(config: FleetConfig, target: Target, shelf: Shelf | None) -> Iterator[Crew]:
    """Start the shard processes; on leaving, whatever the reason, none of them is alive.

    Raises:
        ConfigError: a process may not open as many files as it has devices.
    """
    check_descriptors(config)
    # Spawned, not forked: a fork would copy locks and threads of a parent that may run anything.
    context = multiprocessing.get_context("spawn")
    started: dict[Connection, SpawnProcess] = {}
    try:
        with _quiet_children():
            for number in range(config.processes):
                ours, theirs = context.Pipe()
                task = Task(config, target, number, config.processes, shelf)
                process = context.Process(
                    target=main, args=(theirs, task), name=f"fleet-{number}", daemon=True
                )
                process.start()
                theirs.close()
                started[ours] = process
        yield _Processes(started)
    finally:
        for connection in started:
            connection.close()  # the shard's lifeline: it leaves
        for process in started.values():
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Children started in here don't see Ctrl-C and have one arithmetic thread.

    Ctrl-C goes to every process of the terminal; the parent alone decides what it means. Shards
    share the cores among themselves already, so a thread pool in each would only fight the others.
    """
    # It would be started with the first child, and unblock what is blocked here.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    old = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
