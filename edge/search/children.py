"""Trials in processes of their own: one each, so that a crash or a leak costs one trial.

child -> parent   Outcome, once
parent -> child   nothing: the pipe is the lifeline. A child whose parent is gone, by whatever
                  end, reads the pipe's end and leaves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from datamix.errors import ConfigError, DataMixError
from edge.search.trial import Outcome, Trainer, Trial

_PATIENCE_S = 5.0  # for a child that was asked to end

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Child:
    """One running trial."""

    trial: Trial
    process: SpawnProcess
    started_s: float


def run_here(trainer: Trainer, trials: Sequence[Trial]) -> Generator[Outcome, None, None]:
    """Run trials one after the other in this process."""
    for trial in trials:
        yield _run(trainer, trial)


def run_in_children(
    trainer: Trainer, trials: Sequence[Trial], jobs: int, tick: Tick, every_s: float = 10.0
) -> Generator[Outcome, None, None]:
    """Run trials in ``jobs`` processes at a time; outcomes come as they finish.

    However this generator ends, closed or by an exception, no process stays behind.

    Args:
        trainer: goes to the children.
        trials: what to run, in order.
        jobs: processes at a time.
        tick: called about every ``every_s`` seconds while nothing finishes.
        every_s: see ``tick``.

    Raises:
        ConfigError: ``jobs`` is less than one.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}, expected at least 1")
    waiting = list(trials)
    running: dict[Connection, _Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                _start(trainer, waiting.pop(0), running)
            ready = wait(list(running), every_s)
            if not ready:
                tick()
            for connection in ready:
                assert isinstance(connection, Connection)
                outcome = _outcome(connection, running[connection])
                del running[connection]
                connection.close()
                yield outcome
    finally:
        _end(running)


def _start(trainer: Trainer, trial: Trial, running: dict[Connection, _Child]) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(there, trainer, trial), daemon=True)
    process.start()
    running[here] = _Child(trial, process, time.monotonic())
    there.close()


def _outcome(connection: Connection, child: _Child) -> Outcome:
    """What the child says; or what became of it, if it says nothing."""
    try:
        said = connection.recv()
    except (EOFError, OSError):
        child.process.join(_PATIENCE_S)
        said = f"the process died with exit code {child.process.exitcode}"
    else:
        child.process.join(_PATIENCE_S)
    wall_s = time.monotonic() - child.started_s
    if isinstance(said, Outcome):
        return Outcome(child.trial, said.measured, said.problem, said.cpu_s, wall_s)
    return Outcome(child.trial, None, str(said), 0.0, wall_s)


def _end(running: dict[Connection, _Child]) -> None:
    for child in running.values():
        child.process.terminate()
    for connection, child in running.items():
        child.process.join(_PATIENCE_S)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        connection.close()


def _main(connection: Connection, trainer: Trainer, trial: Trial) -> None:
    """Run one trial; the entry of the spawned process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means

    def hear() -> None:
        with contextlib.suppress(EOFError, OSError):
            connection.recv()
        os._exit(1)

    threading.Thread(target=hear, name="hear", daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent is gone: nobody to tell
        connection.send(_run(trainer, trial))


def _run(trainer: Trainer, trial: Trial) -> Outcome:
    """A trial's outcome; an error is one, too, unless it says that the settings are wrong."""
    wall_s, cpu_s = time.monotonic(), time.process_time()
    measured, problem = None, None
    try:
        measured = trainer(trial)
    except DataMixError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return Outcome(trial, measured, problem, time.process_time() - cpu_s, time.monotonic() - wall_s)
