"""All mutants of one run, everything at once: streams here, other connections beside them.

Every mutant is awaited: one answer, the one that :mod:`benchmarks.fuzzing.oracle` foretells. What
else happens is a finding. On a stream several mutants are under way at once, and answers come as
they are ready, so each is matched with the mutant that it can answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks.fuzzing import messages, mutants, posts, structures
from benchmarks.fuzzing.connections import post_lane, rough_lane, script_lane
from benchmarks.fuzzing.mutants import Mutant
from benchmarks.fuzzing.oracle import Oracle, judge
from benchmarks.fuzzing.tally import Tally, Waiting, settle
from datamix import wire

_BURSTS = (1, 1, 1, 4, 16, 40)  # messages under way at once on a stream


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
    body = wire.encode_request(messages.features_of(chance, 1), request_id="last")
    stream.send(body)
    try:
        answer = await stream.receive(tally.limit_s)
        if answer is None:
            tally.found("farewell", "the stream was closed")
        elif problem := judge(oracle.stream(body), wire.decode_response(answer)):
            tally.found("farewell", problem, body)
    except TimeoutError:
        tally.found("farewell", "no answer")
    await stream.close()


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
