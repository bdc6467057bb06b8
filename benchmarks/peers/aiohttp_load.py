"""The script that many write instead of a load generator: aiohttp, one task per request.

    aiohttp_load.py post|stream URL BODY RATE CONNECTIONS SECONDS

Sends at Poisson times whatever comes back. For ``stream`` each connection is a WebSocket.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import aiohttp
import uvloop

HEADERS = {
    "content-type": "application/vnd.apache.arrow.stream",
    "x-request-disconnect-disabled": "?1",
}


async def post(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    async with session.post(url, data=body, headers=HEADERS) as answer:
        answer.raise_for_status()
        await answer.read()


async def listen(stream: aiohttp.ClientWebSocketResponse) -> None:
    async for message in stream:
        if len(message.data) < 1000:
            raise RuntimeError(f"an answer has {len(message.data)} bytes, expected the rows")


async def main(
    kind: str, url: str, body: bytes, rate: float, connections: int, seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=connections)
    tasks: set[asyncio.Task[None]] = set()
    async with aiohttp.ClientSession(connector=connector) as session:
        streams = []
        if kind == "stream":
            for _ in range(connections):
                stream = await session.ws_connect(url, max_msg_size=1 << 26)
                streams.append(stream)
                tasks.add(asyncio.create_task(listen(stream)))
        end = loop.time() + seconds
        due = loop.time()
        while due < end:
            due += random.expovariate(rate)
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if streams:
                await random.choice(streams).send_bytes(body)
            else:
                task = asyncio.create_task(post(session, url, body))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    how, where, file, *numbers = sys.argv[1:]
    per_s, many, lasting = float(numbers[0]), int(numbers[1]), float(numbers[2])
    uvloop.run(main(how, where, Path(file).read_bytes(), per_s, many, lasting))
