"""Servers that send every message back and do nothing else: what the clients could do at most."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator
from typing import Any

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_create_server

from benchmarks import accounting
from benchmarks.unary import EchoServer
from datamix.limits import raise_descriptor_limit


class _Stream(WSListener):
    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY:
            transport.send(WSMsgType.BINARY, frame.get_payload_as_bytes())

    # picows would log them; a client here sends no more before it is answered.
    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


async def _serve(kind: str, port: Any) -> None:
    if kind == "stream":
        server = await ws_create_server(lambda request: _Stream(), "127.0.0.1", 0)
    else:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(EchoServer, "127.0.0.1", 0)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()


def _process(kind: str, port: Any) -> None:
    raise_descriptor_limit()
    uvloop.run(_serve(kind, port))


@contextlib.contextmanager
def bare_server(kind: str, mark: str = "") -> Iterator[str]:
    """A bare echo in a process of its own, for ``stream`` or ``post``; yields its URL."""
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Value("i", 0)
    process = spawn.Process(target=_process, args=(kind, port), daemon=True)
    with accounting.marked(mark):
        process.start()
    try:
        while not port.value:
            process.join(0.05)
            if not process.is_alive():
                raise RuntimeError(f"the bare server ended with code {process.exitcode}")
        yield f"{'ws' if kind == 'stream' else 'http'}://127.0.0.1:{port.value}/"
    finally:
        process.kill()
        process.join()
