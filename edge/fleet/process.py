"""One spawned process with one shard, and what it and its parent tell each other.

    parent -> child   float: the common start by the monotonic clock; None: stop
    child  -> parent  Progress, twice a second; Ready; then ShardResult or Failure, once

The pipe is the lifeline: a child whose parent is gone reads its end and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from datamix.errors import ConfigError, DataMixError
from datamix.limits import raise_descriptor_limit
from edge.fleet.config import FleetConfig
from edge.fleet.offline import Offline
from edge.fleet.prepare import Shelf
from edge.fleet.recorder import recording
from edge.fleet.shard import Shard, ShardResult
from edge.fleet.stock import Stock, StockWorkload
from edge.fleet.workload import EchoWorkload, Workload

_PROGRESS_S = 0.5
_SPARE_DESCRIPTORS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """What the cloud at the other end serves.

    Attributes:
        model: its name.
        engine: the engine's name, such as ``torch:cpu:float32`` or ``null``.
        input_shapes: row shape of each block's input.
        version: the version that the devices ask for, as stem and head belong to one; None for
            whichever is current.
    """

    model: str
    engine: str
    input_shapes: tuple[tuple[int, ...], ...]
    version: str | None = None

    @property
    def path(self) -> str:
        """How the URL names it."""
        return self.model if self.version is None else f"{self.model}/versions/{self.version}"


@dataclass(frozen=True, slots=True)
class Task:
    """What one shard has to do.

    Attributes:
        config: the run.
        target: the cloud.
        number: which shard.
        shards: of how many.
        shelf: what to send, where that was prepared.
    """

    config: FleetConfig
    target: Target
    number: int
    shards: int
    shelf: Shelf | None = None


class Line(Protocol):
    """The way to the parent and back; a pipe's end is one."""

    def recv(self) -> Any:
        """Wait for the parent's next word.

        Raises:
            EOFError, OSError: the parent is gone.
        """
        ...

    def send(self, word: Any) -> None:
        """Tell the parent something."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """All devices of a shard have their stream."""

    shard: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A shard could not go on.

    Attributes:
        sentence: why.
        status: of the error that says so; 0 for a defect of the simulator.
    """

    sentence: str
    status: int


def main(connection: Connection, task: Task) -> None:
    """Run one shard to its end; the entry of the spawned process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with contextlib.suppress(BrokenPipeError):  # the parent is gone: nobody to tell
        try:
            stock = None if task.shelf is None else task.shelf.stock()
        except DataMixError as error:
            connection.send(Failure(str(error), error.status))
        else:
            connection.send(work(connection, task, stock))


def work(line: Line, task: Task, stock: Stock | None) -> ShardResult | Failure:
    """Run one shard to its end in this thread; its last word is what is returned."""
    try:
        check_descriptors(task.config)
        return _run(_serve(line, task, stock))
    except DataMixError as error:
        return Failure(str(error), error.status)
    except Exception:
        return Failure(traceback.format_exc(limit=-4), 0)


def check_descriptors(config: FleetConfig) -> None:
    """Raise the limit of open files as far as allowed.

    Raises:
        ConfigError: that is not as far as a shard needs it.
    """
    needed = -(-config.devices // config.processes) + _SPARE_DESCRIPTORS
    allowed = raise_descriptor_limit()
    if needed > allowed:
        raise ConfigError(
            f"a process may open {allowed} files here and needs {needed} for its devices: raise "
            f"the hard limit (ulimit -Hn) or use at least "
            f"{math.ceil(config.devices / max(1, allowed - _SPARE_DESCRIPTORS))} processes"
        )


def _run(main: Coroutine[Any, Any, ShardResult]) -> ShardResult:
    """Run on uvloop where there is one (Linux), else on asyncio."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform == "linux":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


async def _serve(connection: Line, task: Task, stock: Stock | None) -> ShardResult:
    config = task.config
    whole = config.schedule()
    mine = whole.shard(task.number, task.shards)
    # Of a closed loop nobody knows how many inferences it will have.
    offline = _offline(config, len(mine) if whole.closed is None else config.masks_ahead)
    workload = load(config, task.target, whole.distinct, stock, offline)
    shard = Shard(
        config, task.target.path, mine, workload, task.number, task.shards, offline=offline
    )
    loop = asyncio.get_running_loop()
    start: asyncio.Future[float] = loop.create_future()

    def obey(word: float | None) -> None:
        if word is None:
            shard.stop()
            if not start.done():
                start.cancel()
        elif not start.done():
            start.set_result(word)

    def hear() -> None:
        """Listen for the parent's words, whatever the loop is busy with."""
        while True:
            try:
                word = connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            with contextlib.suppress(RuntimeError):  # the loop is closed: all has been said
                loop.call_soon_threadsafe(obey, word)

    def tell() -> None:
        connection.send(shard.progress())
        loop.call_later(_PROGRESS_S, tell)

    # A thread: an event loop would make the pipe non-blocking, and long results need it to block.
    threading.Thread(target=hear, name="hear", daemon=True).start()
    tell()
    with recording(shard):
        await shard.connect()
        # What lives now lives to the end; without it the collector has little to walk through.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        connection.send(Ready(task.number))
        return await shard.run(await start)


def _offline(config: FleetConfig, groups: int) -> Offline | None:
    """This process's masks, in the mode split; the parent has checked that it is this one."""
    if config.second is None or config.bundle is None:
        return None
    from datamix.bundle import read_manifest

    return Offline(config, read_manifest(config.bundle), groups)


def load(
    config: FleetConfig,
    target: Target,
    inferences: int,
    stock: Stock | None = None,
    offline: Offline | None = None,
) -> Workload:
    """Make the workload of a process."""
    if stock is not None:
        return StockWorkload(stock, config.verify)
    if config.workload == "echo":
        return EchoWorkload(target.input_shapes[0], config.rows, config.seed, config.verify)
    from edge.fleet.inputs import bundle_workload

    return bundle_workload(config, inferences, offline)
