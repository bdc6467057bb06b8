"""Connections of which every byte is ours: HTTP, what is hardly HTTP, and broken WebSockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import struct
from collections.abc import Iterator
from urllib.parse import urlsplit

from benchmarks.fuzzing import frames, messages, posts
from benchmarks.fuzzing.mutants import Mutant
from benchmarks.fuzzing.oracle import Oracle, Reply, judge_reply
from benchmarks.fuzzing.tally import Tally, Waiting, settle
from datamix import wire

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")


class Connection:
    """One TCP connection, of which every byte is ours."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use an open connection."""
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connect."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24))

    async def send(self, data: bytes) -> None:
        """Send; a peer that hung up meanwhile is noticed when its answer is read."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def reply(self) -> Reply:
        """The next final HTTP response.

        Raises:
            IncompleteReadError, ConnectionError: the connection is gone.
        """
        while True:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            status = int(first.split()[1])
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
            if status >= 200 or status == 101:
                return Reply(status, headers, body)

    async def frame(self) -> tuple[int, bytes]:
        """The next frame of a server: its kind and payload."""
        first, second = await self.reader.readexactly(2)
        size = second
        if size == 126:
            (size,) = struct.unpack(">H", await self.reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", await self.reader.readexactly(8))
        return first & 15, await self.reader.readexactly(size)

    async def close(self, *, abort: bool = False) -> None:
        """Close the connection, or reset it."""
        if abort:
            self.writer.transport.abort()
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


_GONE = (ConnectionError, asyncio.IncompleteReadError)


async def post_lane(
    url: str, source: Iterator[posts.Named], count: int, oracle: Oracle, tally: Tally, seed: str
) -> None:
    """POST ``count`` mutants over kept-alive connections, sometimes several before an answer."""
    chance = random.Random(seed)
    peer = await Connection.open(url)
    while count > 0 and not tally.hopeless:
        burst = [next(source) for _ in range(min(count, chance.choice((1, 1, 1, 3))))]
        count -= len(burst)
        raw = [posts.raw(one.post, chunk=chance.choice((0, 0, 0, 300))) for one in burst]
        await peer.send(b"".join(raw))
        for index, (named, sent) in enumerate(zip(burst, raw, strict=True)):
            tally.sent[named.kind] += 1
            try:
                reply = await asyncio.wait_for(peer.reply(), tally.limit_s)
                tally.statuses[named.kind, reply.status] += 1
                if wrong := judge_reply(oracle.post(named.post), reply):
                    tally.found(named.kind, wrong, sent)
            except (TimeoutError, *_GONE) as error:
                tally.found(named.kind, f"no answer: {error!r}", b"".join(raw[index:]))
                await peer.close()
                peer = await Connection.open(url)
                break
    await peer.close()


async def rough_lane(url: str, count: int, tally: Tally, seed: str) -> None:
    """Send what is hardly HTTP: anything but a server error, within the time, is an answer."""
    chance = random.Random(seed)
    for _ in range(count):
        if tally.hopeless:
            return
        rough = posts.rough(chance)
        kind = f"HTTP: {rough.kind}"
        tally.sent[kind] += 1
        peer = await Connection.open(url)
        try:
            await peer.send(rough.sent)
            if rough.leaves:
                with contextlib.suppress(OSError):
                    peer.writer.write_eof()
            head = await asyncio.wait_for(peer.reader.read(1 << 16), tally.limit_s)
            status = int(found[1]) if (found := _STATUS.match(head)) else 0
            tally.statuses[kind, status] += 1
            if status >= 500:
                tally.found(kind, f"answered with {head[:300]!r}", rough.sent)
        except TimeoutError:
            tally.found(kind, "neither an answer nor the end", rough.sent)
        except ConnectionError:
            tally.statuses[kind, 0] += 1
        finally:
            await peer.close(abort=True)


# --- broken WebSockets ------------------------------------------------------------------------


async def script_lane(url: str, count: int, oracle: Oracle, tally: Tally, seed: str) -> None:
    """Run ``count`` scripts, each on a connection of its own."""
    chance = random.Random(seed)
    for _ in range(count):
        if tally.hopeless:
            return
        script = frames.script(chance)
        kind = f"WebSocket: {script.kind}"
        tally.sent[kind] += 1
        peer = await Connection.open(url)
        try:
            async with asyncio.timeout(tally.limit_s):
                wrong = await _play(peer, script, oracle, chance, tally)
        except TimeoutError:
            wrong = "neither all answers nor the end came"
        except _GONE as error:
            wrong = "" if script.ending != "asks" else f"the connection was lost: {error!r}"
        finally:
            await peer.close(abort=script.ending == "abort")
        if wrong:
            tally.found(kind, wrong, b"".join(script.sent))


async def _play(
    peer: Connection, script: frames.Script, oracle: Oracle, chance: random.Random, tally: Tally
) -> str:
    """Run one script; what was wrong, "" if nothing was."""
    lines = script.handshake or frames.handshake()
    head = "\r\n".join(["GET /v2/models/echo/stream HTTP/1.1", "Host: x", *lines, "", ""])
    await peer.send(head.encode("latin-1", "replace"))
    reply = await peer.reply()
    kind = f"WebSocket: {script.kind}"
    if reply.status != 101:
        tally.statuses[kind, reply.status] += 1
        refused = script.handshake is not None and 400 <= reply.status < 500
        return "" if refused else f"the handshake got {reply.status} {reply.body[:200]!r}"
    for piece in script.sent:
        await peer.send(piece)
        await asyncio.sleep(0)
    if script.ending in ("fin", "abort"):
        return ""
    pongs = script.pongs
    waiting = [Waiting(Mutant(kind, body or b""), oracle.stream(body)) for body in script.messages]
    if script.ending == "asks" or script.handshake is not None:
        last = messages.request(chance)
        waiting.append(Waiting(Mutant(kind, last), oracle.stream(last)))
        await peer.send(frames.frame(frames.BINARY, last, chance))
    while waiting or pongs > 0 or script.ending == "shut":
        got, payload = await peer.frame()
        if got == frames.CLOSE:
            return "" if script.ending != "asks" else f"the connection was closed: {payload!r}"
        if got == frames.PONG:
            pongs -= 1
        elif got == frames.BINARY and waiting:
            settle(tally, waiting, payload)
        elif got == frames.BINARY and script.ending == "asks":
            return "an answer too many"
    if script.ending == "either" and script.handshake is None:
        got, payload = await peer.frame()
        status = wire.decode_response(payload).status if got == frames.BINARY else 0
        return f"answered with {status}" if status >= 500 else ""
    await peer.send(frames.frame(frames.CLOSE, struct.pack(">H", 1000), chance))
    while (await peer.frame())[0] != frames.CLOSE:
        if script.ending == "asks":
            return "an answer too many, or a pong"
    return ""
