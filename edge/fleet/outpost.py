"""One shard behind method calls, for whoever runs shards elsewhere than in a child process.

Nothing here knows who calls: ``cluster.ray_fleet`` makes a Ray actor of it, so that the nodes need
``datamix`` and ``edge`` only. Several calls may be under way at once, each in a thread.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import Any

from datamix.framing import Buffer
from edge.fleet.process import Task, work
from edge.fleet.stock import Layout, Stock


class Outpost:
    """A shard in a thread, and the words that it and its parent have for each other."""

    def __init__(self) -> None:
        """Wait for a task."""
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def where(self) -> str:
        """The name of this machine."""
        return socket.gethostname()

    def clock(self) -> float:
        """This machine's monotonic clock, by which the shard runs."""
        return time.monotonic()

    def work(self, task: Task, layout: Layout | None = None, memory: Buffer | None = None) -> None:
        """Begin; what comes of it is said by :meth:`words`.

        Args:
            task: what to do, without a shelf.
            layout: of what was prepared, if anything.
            memory: that it lies in, shared by all of this machine.
        """
        stock = None if layout is None or memory is None else Stock(layout, memory)

        def run() -> None:
            self.send(work(self, task, stock))

        threading.Thread(target=run, name="shard", daemon=True).start()

    def tell(self, word: float | None) -> None:
        """Hand the shard an order: the common start by this machine's clock, or None to stop."""
        self._orders.put(word)

    def words(self, timeout_s: float) -> list[Any]:
        """What the shard has said since the last call; waits for a word, but not for longer."""
        said = []
        with contextlib.suppress(queue.Empty):
            said.append(self._said.get(timeout=timeout_s))
            while True:
                said.append(self._said.get_nowait())
        return said

    # How the shard sees it: see :class:`edge.fleet.process.Line`.

    def recv(self) -> Any:
        """Wait for the parent's next word."""
        return self._orders.get()

    def send(self, word: Any) -> None:
        """Keep a word for the parent."""
        self._said.put(word)
