"""The transports that the benchmark compares all reach the product's protocol, without Ray here."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np
import pytest
import uvicorn

from benchmarks.transports_app import DUPLEX_PATH, STREAM_PATH, App, Outbox, Replica
from benchmarks.transports_clients import Endpoint, Meter, connect
from datamix import wire
from deployments.config import Config
from tests.asynchronous import asynchronous
from tests.real_cloud import SHAPE, Cloud, replica

CONFIG = Config(engine="null", echo_shape=SHAPE)
FEATURES = np.arange(4 * np.prod(SHAPE), dtype=np.float32).reshape(4, *SHAPE)
MESSAGE = wire.encode_request(FEATURES, request_id="a")
Sockets = Literal["auto", "websockets", "websockets-sansio"]


@asynccontextmanager
async def serving(sockets: Sockets) -> AsyncIterator[tuple[Cloud, int]]:
    """The benchmark's application behind uvicorn at the prefix that Serve would give it."""
    async with replica(CONFIG) as cloud:
        app = App(cloud.app)

        async def mounted(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "root_path": "/prefix"}, receive, send)

        settings = uvicorn.Config(mounted, ws=sockets, lifespan="off", log_config=None)
        settings.load()
        server = uvicorn.Server(settings)
        server.lifespan = settings.lifespan_class(settings)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        await server.startup(sockets=[listener])
        try:
            yield cloud, listener.getsockname()[1]
        finally:
            await server.shutdown(sockets=[listener])


@pytest.mark.parametrize(
    ("kind", "path", "sockets"),
    [
        ("websocket", STREAM_PATH, "auto"),
        ("websocket", STREAM_PATH, "websockets-sansio"),
        ("duplex", DUPLEX_PATH, "auto"),
        ("post", "/v2/models/echo/infer", "auto"),
    ],
)
@asynchronous
async def test_a_transport_answers_again_and_again(kind: str, path: str, sockets: Sockets) -> None:
    async with serving(sockets) as (cloud, port):
        scheme = "ws" if kind == "websocket" else "http"
        meter = Meter(len(MESSAGE) // 2)
        headers = {"content-type": wire.MEDIA_TYPE}
        client = await connect(
            Endpoint(kind, f"{scheme}://127.0.0.1:{port}/prefix{path}", headers), MESSAGE, meter
        )
        client.begin()
        while len(meter.latencies_s) < 20:
            assert meter.broken is None
            await asyncio.sleep(0.01)
        client.close()
        while cloud.backbone.traffic.open_streams:
            await asyncio.sleep(0.01)
        assert cloud.model.batcher.statistics.rows >= 20 * len(FEATURES)


@asynchronous
async def test_an_error_is_not_taken_for_an_answer() -> None:
    async with serving("auto") as (_, port):
        meter = Meter(1)
        url = f"http://127.0.0.1:{port}/prefix/v2/models/nobody/infer"
        client = await connect(Endpoint("post", url), MESSAGE, meter)
        client.begin()
        while meter.broken is None:
            await asyncio.sleep(0.01)
        client.close()
        assert "404" in meter.broken


@asynchronous
async def test_the_grpc_method_answers_each_message() -> None:
    async with replica(CONFIG) as cloud:

        class Served(Replica):
            def __init__(self) -> None:
                self._protocol = cloud.app

        left: asyncio.Queue[bytes] = asyncio.Queue()

        async def requests() -> AsyncIterator[bytes]:
            while True:
                yield await left.get()

        answers = Served().Exchange(requests())
        for number in range(3):
            left.put_nowait(wire.encode_request(FEATURES, request_id=f"n{number}"))
            response = wire.decode_response((await anext(answers)).SerializeToString())
            assert response.request_id == f"n{number}"
            np.testing.assert_array_equal(response.features, FEATURES)
        await answers.aclose()
        assert cloud.backbone.traffic.open_streams == 0


@asynchronous
async def test_a_held_stream_is_not_read() -> None:
    outbox = Outbox()
    outbox.hold(True)
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.hold(False)
    await waiting
