"""Clients of the fuzz run: those that send mutants, and the good ones beside them.

Every mutant is awaited: one answer, the one that :mod:`benchmarks.oracle` foretells. What else
happens is a finding. On a stream several mutants are under way at once, and answers come as they
are ready, so each is matched with the mutant that it can answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks import frames, mutants, posts
from benchmarks.mutants import Mutant
from benchmarks.oracle import Expected, Oracle, Reply, judge, judge_reply
from datamix import wire
from datamix.errors import DataMixError

_BURSTS = (1, 1, 1, 4, 16, 40)  # messages under way at once on a stream
_MOST_FINDINGS = 50  # then the run ends: the replica is broken, or the oracle
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not have happened, and the bytes that made it happen."""

    kind: str
    what: str
    sent: bytes = b""


@dataclass(slots=True)
class Tally:
    """What was sent and what came of it.

    Attributes:
        limit_s: how long to wait for an answer before it counts as a hang.
        sent: mutants by kind.
        statuses: answers by kind and status.
        findings: what was wrong.
    """

    limit_s: float
    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def found(self, kind: str, what: str, sent: bytes = b"") -> None:
        """Note a finding."""
        self.findings.append(Finding(kind, what, sent))

    @property
    def hopeless(self) -> bool:
        """Whether there is no sense in going on."""
        return len(self.findings) >= _MOST_FINDINGS


# --- streams ----------------------------------------------------------------------------------


class Stream(WSListener):
    """One WebSocket, read message by message."""

    def __init__(self) -> None:
        """Read from nobody yet."""
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()

    @classmethod
    async def open(cls, url: str) -> Stream:
        """Connect."""
        stream = cls()
        await ws_connect(lambda: stream, f"ws{url.removeprefix('http')}/v2/models/echo/stream")
        return stream

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Keep the way back."""
        self._transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take an answer; the cloud never sends one in fragments."""
        if frame.msg_type == WSMsgType.BINARY and frame.fin:
            self._answers.put_nowait(frame.get_payload_as_bytes())
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Say so behind the last answer."""
        self._answers.put_nowait(None)

    def send(self, body: bytes) -> None:
        """Send one message."""
        self._transport.send(WSMsgType.BINARY, body)

    async def receive(self, limit_s: float) -> bytes | None:
        """The next message; None where the connection is gone.

        Raises:
            TimeoutError: there was none in ``limit_s``.
        """
        return await asyncio.wait_for(self._answers.get(), limit_s)

    async def close(self) -> None:
        """Leave."""
        self._transport.disconnect()
        with contextlib.suppress(Exception):  # why the connection ended is of no interest now
            await self._transport.wait_disconnected()


@dataclass(frozen=True, slots=True)
class Waiting:
    """A mutant whose answer has not come."""

    mutant: Mutant
    expected: Expected


def settle(tally: Tally, waiting: list[Waiting], answer: bytes) -> None:
    """Find the mutant that ``answer`` is for, take it out of ``waiting``, note what is wrong."""
    try:
        response = wire.decode_response(answer)
    except DataMixError as error:
        tally.found("answer", f"is no message: {error}", answer)
        return
    wrongs = [(judge(one.expected, response), one) for one in waiting]
    # Several may fit: take one that fits no other answer.
    fits = [one for wrong, one in wrongs if not wrong]
    if fits:
        one = min(fits, key=lambda fit: len(fit.expected.statuses))
    else:
        same = [(w, one) for w, one in wrongs if one.expected.request_id == response.request_id]
        wrong, one = (same or wrongs)[0]
        tally.found(one.mutant.kind, wrong, one.mutant.body)
    waiting.remove(one)
    tally.statuses[one.mutant.kind, response.status] += 1


async def stream_lane(
    url: str, source: Iterator[Mutant], count: int, oracle: Oracle, tally: Tally, seed: str
) -> None:
    """Send ``count`` mutants over a stream, in bursts, and await the answers of each burst."""
    chance = random.Random(seed)
    stream = await Stream.open(url)
    while count > 0 and not tally.hopeless:
        burst = min(count, chance.choice(_BURSTS))
        count -= burst
        waiting = []
        for _ in range(burst):
            mutant = next(source)
            waiting.append(Waiting(mutant, oracle.stream(mutant.body)))
            tally.sent[mutant.kind] += 1
        for one in waiting:
            stream.send(one.mutant.body)
        try:
            while waiting:
                answer = await stream.receive(tally.limit_s)
                if answer is None:
                    raise ConnectionError("the stream was closed")
                settle(tally, waiting, answer)
        except (TimeoutError, ConnectionError) as error:
            for one in waiting:
                tally.found(one.mutant.kind, f"no answer: {error!r}", one.mutant.body)
            await stream.close()
            stream = await Stream.open(url)
    await _farewell(stream, oracle, tally, chance)


async def _farewell(stream: Stream, oracle: Oracle, tally: Tally, chance: random.Random) -> None:
    """A last good message: were there an answer too many, it would come before this one's."""
    body = wire.encode_request(mutants.features_of(chance, 1), request_id="last")
    stream.send(body)
    try:
        answer = await stream.receive(tally.limit_s)
        if answer is None or judge(oracle.stream(body), wire.decode_response(answer)):
            tally.found("farewell", f"an answer too many, or the wrong one: {answer!r}")
    except TimeoutError:
        tally.found("farewell", "no answer")
    await stream.close()


# --- raw connections --------------------------------------------------------------------------


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
    messages, pongs = list(script.messages), script.pongs
    if script.ending == "asks" or script.handshake is not None:
        messages.append(mutants.request(chance))
        last = messages[-1]
        assert last is not None
        await peer.send(frames.frame(frames.BINARY, last, chance))
    waiting = [Waiting(Mutant(kind, body or b""), oracle.stream(body)) for body in messages]
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
        await peer.frame()
        return ""
    await peer.send(frames.frame(frames.CLOSE, struct.pack(">H", 1000), chance))
    while (await peer.frame())[0] != frames.CLOSE:
        if script.ending == "asks":
            return "an answer too many, or a pong"
    return ""


# --- all together -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """How many mutants go which way.

    Attributes:
        messages: over streams, made of bytes.
        structures: over streams, made by hypothesis.
        posts: over HTTP, made of bytes.
        structured_posts: over HTTP, made by hypothesis.
        roughs: connections that hardly speak HTTP.
        scripts: connections that break WebSocket.
        streams: streams at once; a quarter as many connections go each of the other ways.
        seed: of everything.
        limit_s: for each answer.
    """

    messages: int
    structures: int
    posts: int
    structured_posts: int
    roughs: int
    scripts: int
    streams: int = 16
    seed: int = 0
    limit_s: float = 30.0

    @classmethod
    def of(cls, count: int, **options: Any) -> Plan:
        """``count`` mutants, mostly over streams."""
        parts = {
            "structures": count // 20,
            "posts": count // 10,
            "structured_posts": count // 40,
            "roughs": count // 50,
            "scripts": count // 25,
        }
        return cls(messages=count - sum(parts.values()), **parts, **options)


def _shares(count: int, lanes: int) -> list[int]:
    return [count // lanes + (lane < count % lanes) for lane in range(lanes)]


async def attack(url: str, plan: Plan, oracle: Oracle, tally: Tally) -> None:
    """Send all mutants of a plan, everything at once."""
    lanes: list[Coroutine[Any, Any, None]] = []
    few = max(1, plan.streams // 4)

    def add(count: int, width: int, what: str, lane: Callable[[int, str], Any]) -> None:
        for number, share in enumerate(_shares(count, width)):
            lanes.append(lane(share, f"{plan.seed} {what} {number}"))

    from benchmarks import structures  # hypothesis takes a second to import

    add(
        plan.messages,
        plan.streams,
        "messages",
        lambda n, s: stream_lane(url, mutants.endless(s), n, oracle, tally, s),
    )
    add(
        plan.structures,
        1,
        "structures",
        lambda n, s: stream_lane(url, structures.streams(s), n, oracle, tally, s),
    )
    add(
        plan.posts, few, "posts", lambda n, s: post_lane(url, posts.endless(s), n, oracle, tally, s)
    )
    add(
        plan.structured_posts,
        1,
        "structured posts",
        lambda n, s: post_lane(url, posts.structured(s), n, oracle, tally, s),
    )
    add(plan.roughs, few, "roughs", lambda n, s: rough_lane(url, n, tally, s))
    add(plan.scripts, few, "scripts", lambda n, s: script_lane(url, n, oracle, tally, s))
    async with asyncio.TaskGroup() as group:
        for lane in lanes:
            group.create_task(lane)
