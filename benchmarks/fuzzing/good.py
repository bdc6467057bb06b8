"""Clients that do nothing wrong, beside others that do: is every answer right, and in time?

They use the device's own transports and know each answer bit for bit.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from benchmarks.fuzzing import messages
from benchmarks.fuzzing.oracle import Oracle, judge
from datamix import wire
from datamix.errors import DataMixError
from edge.transport import StreamTransport, Transport, UnaryTransport

_PAUSE_S = 0.02  # between an answer and the next question of one client
_PROBE_S = 0.1


@dataclass(slots=True)
class Good:
    """What good clients lived.

    Attributes:
        latencies_s: of every right answer.
        probes_s: how long the replica took to say that it is alive.
        wrong: what was wrong with answers that were not right, or did not come.
    """

    latencies_s: list[float] = field(default_factory=list)
    probes_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def good_request(chance: random.Random) -> tuple[str, bytes]:
    """A request that a replica has to answer, and its id."""
    request_id = messages.name(chance)
    body = wire.encode_request(
        messages.features_of(chance, chance.randrange(1, messages.MAX_ROWS + 1)),
        request_id=request_id,
        dtype=chance.choice(wire.DTYPES),
        deadline_s=chance.choice((None, 600.0)),
    )
    return request_id, body


async def _ask(
    transport: Transport,
    oracle: Oracle,
    good: Good,
    chance: random.Random,
    stopped: Callable[[], bool],
    limit_s: float,
) -> None:
    while not stopped():
        request_id, body = good_request(chance)
        start_s = time.monotonic()
        try:
            response = await transport.send(body, request_id, limit_s)
            wrong = judge(oracle.stream(body), response)
        except DataMixError as error:
            wrong = repr(error)
        if wrong:
            good.wrong.append(wrong)
        else:
            good.latencies_s.append(time.monotonic() - start_s)
        await asyncio.sleep(_PAUSE_S)
    await transport.close()


async def _probe(url: str, good: Good, stopped: Callable[[], bool], limit_s: float) -> None:
    """Ask the event loop itself, past batcher and engine."""
    async with httpx.AsyncClient(trust_env=False, timeout=limit_s) as client:
        while not stopped():
            start_s = time.monotonic()
            try:
                (await client.get(f"{url}/v2/health/live")).raise_for_status()
                good.probes_s.append(time.monotonic() - start_s)
            except httpx.HTTPError as error:
                good.wrong.append(f"no sign of life: {error!r}")
            await asyncio.sleep(_PROBE_S)


async def befriend(
    url: str,
    oracle: Oracle,
    stopped: Callable[[], bool],
    *,
    streams: int = 4,
    seed: int = 0,
    limit_s: float = 30.0,
) -> Good:
    """Ask until ``stopped``: over ``streams`` streams, and over HTTP."""
    good = Good()
    ways = [StreamTransport(url, "echo") for _ in range(streams)]
    clients: list[Transport] = [*ways, UnaryTransport(url, "echo")]
    async with asyncio.TaskGroup() as group:
        group.create_task(_probe(url, good, stopped, limit_s))
        for number, transport in enumerate(clients):
            chance = random.Random(f"{seed} good {number}")
            group.create_task(_ask(transport, oracle, good, chance, stopped, limit_s))
    if unmatched := sum(way.unmatched for way in ways):
        good.wrong.append(f"{unmatched} answers came that nobody had asked for")
    if lost := sum(way.connections - 1 for way in ways):
        good.wrong.append(f"streams were lost {lost} times")
    return good
