"""A line between devices and the cloud that can be cut: nothing passes, and nobody is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager


class _End(asyncio.Protocol):
    """One of the two ends of a connection."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.line.ends.add(self)
        if self.line.is_cut:
            transport.pause_reading()
        if self.other is None:
            self.line.spawn(self._reach())
        elif self.other.early:
            transport.write(b"".join(self.other.early))
            self.other.early.clear()

    async def _reach(self) -> None:
        """Connect this caller to the cloud."""
        assert self.transport is not None
        other = _End(self.line)
        other.other = self
        try:
            await self.line.loop.create_connection(lambda: other, "127.0.0.1", self.line.target)
        except OSError:
            self.transport.close()
            return
        self.other = other
        if self.early and other.transport is not None:
            other.transport.write(b"".join(self.early))
            self.early.clear()

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.line.ends.discard(self)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Line:
    """All connections to one port of this machine."""

    def __init__(self, target: int, loop: asyncio.AbstractEventLoop) -> None:
        self.target = target
        self.loop = loop
        self.is_cut = False
        self.ends: set[_End] = set()
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def open(self) -> asyncio.Server:
        server = await self.loop.create_server(lambda: _End(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def cut(self, cut: bool) -> None:
        """Let nothing pass any more, or everything again; from any thread."""
        self.loop.call_soon_threadsafe(self._cut, cut)

    def _cut(self, cut: bool) -> None:
        self.is_cut = cut
        for end in self.ends:
            if end.transport is not None and not end.transport.is_closing():
                if cut:
                    end.transport.pause_reading()
                else:
                    end.transport.resume_reading()


@contextmanager
def relay(target: int) -> Iterator[Line]:
    """A line to port ``target``, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="relay", daemon=True)
    thread.start()
    line = Line(target, loop)
    server = asyncio.run_coroutine_threadsafe(line.open(), loop).result(10)

    async def close() -> None:
        server.close()
        for end in list(line.ends):
            if end.transport is not None:
                end.transport.abort()
        await asyncio.sleep(0)

    try:
        yield line
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
