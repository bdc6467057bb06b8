"""What a client can do to the WebSocket protocol itself, frame by frame and header by header."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import pytest

from deployments.config import Config
from deployments.websocket import Messages
from tests.real_cloud import (
    PATIENCE_S,
    SHAPE,
    Cloud,
    HttpPeer,
    Reply,
    ask,
    assert_echoes,
    http,
    message_of,
    serving,
)

CONFIG = Config(engine="null", echo_shape=SHAPE, max_request_rows=8, max_batch_rows=16)
HANDSHAKE = {
    "host": "x",
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
BINARY, CONTINUATION, FIN = 0x2, 0x0, 0x80


def run(test: Callable[[Cloud], Awaitable[None]]) -> None:
    """Run ``test`` against a replica behind a server."""

    async def go() -> None:
        async with serving(CONFIG) as cloud:
            await test(cloud)

    asyncio.run(go())


def frame(first: int, payload: bytes) -> bytes:
    """A frame of up to 125 bytes as a client sends it, under a mask of zeros."""
    return bytes((first, 0x80 | len(payload), 0, 0, 0, 0)) + payload


async def upgrade(peer: HttpPeer, method: str = "GET", **changes: str | None) -> None:
    """Ask for a WebSocket; a header that is None is left out."""
    headers = HANDSHAKE | {key.replace("_", "-"): value for key, value in changes.items()}
    lines = [f"{key}: {value}" for key, value in headers.items() if value is not None]
    head = [f"{method} /v2/models/echo/stream HTTP/1.1", *lines, "", ""]
    peer.writer.write("\r\n".join(head).encode())


async def refused(peer: HttpPeer) -> Reply:
    """The answer to an upgrade that is not granted, and the end of the connection."""
    reply = await peer.reply()
    async with asyncio.timeout(PATIENCE_S):
        assert await peer.reader.read() == b""
    return reply


def test_a_message_in_many_tiny_frames_holds_nobody_up() -> None:
    """Adding up all fragments at each of them made 140 kB cost seconds, and a megabyte minutes."""

    async def test(cloud: Cloud) -> None:
        body = message_of(1)
        crumbs = [frame(CONTINUATION, b"")] * 50_000
        crumbs += [frame(CONTINUATION, body[at : at + 1]) for at in range(1, len(body))]
        async with http(cloud) as peer, cloud.stream() as stream:
            await upgrade(peer)
            await peer.reader.readuntil(b"\r\n\r\n")
            start = time.process_time()
            peer.writer.write(frame(BINARY, body[:1]) + b"".join(crumbs) + frame(FIN, b""))
            async with asyncio.timeout(PATIENCE_S):
                first, size = await peer.reader.readexactly(2)
            assert (first, size) == (FIN | BINARY, 126)  # an answer, larger than 125 bytes
            assert time.process_time() - start < 2  # it took more than 10
            assert cloud.outcomes == {"ok": 1}
            assert_echoes(await ask(stream, message_of(2)), 2)

    run(test)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("GET", {"sec_websocket_key": "short"}),
        ("GET", {"sec_websocket_key": None}),
        ("GET", {"sec_websocket_version": "12"}),
        ("GET", {"transfer_encoding": "chunked"}),
        ("GET", {f"x-{number}": "y" for number in range(150)}),
        ("POST", {"content_length": "0"}),
    ],
    ids=["bad key", "no key", "old version", "chunked", "many headers", "method"],
)
def test_a_bad_handshake_leaves_nothing_behind(method: str, changes: dict[str, str | None]) -> None:
    """Its stream stayed open for ever, a task and a slot each, as nobody said that it had ended."""

    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            await upgrade(peer, method, **changes)
            assert (await refused(peer)).status == 400
        async with asyncio.timeout(PATIENCE_S):
            while cloud.backbone.traffic.open_streams:
                await asyncio.sleep(0.001)
        async with cloud.stream() as stream:
            assert_echoes(await ask(stream, message_of(2)), 2)

    run(test)


@pytest.mark.parametrize("size", [15_500, 16_500, 70_000])
def test_a_handshake_with_too_long_headers_is_told_so(size: int) -> None:
    """It did not fit picows' buffer, and the connection was dropped without an answer."""

    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            await upgrade(peer, x_long="y" * size)
            reply = await refused(peer)
            assert reply.status == 431
            assert re.fullmatch(
                r"the upgrade request has \d+ bytes, expected at most 15360", reply.error
            )
        assert not cloud.backbone.traffic.open_streams
        async with http(cloud) as peer:
            await upgrade(peer, x_long="y" * 14_000)
            assert (await peer.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")

    run(test)


def test_what_goes_nowhere_is_not_counted_as_sent() -> None:
    assert Messages().send([b"answer"]) == 0
