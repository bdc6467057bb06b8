"""A cluster with tokens, TLS before it, devices under load and two rotations; prints what it saw.

A program of its own, since Ray must be started by the process that calls its handles.
"""

import asyncio
import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from cluster.local import APPLICATION, local_cluster
from datamix.tokens import read_token, write_token
from deployments.config import Config
from edge.client import Client
from edge.data import load_sample
from edge.runtime import TorchDevice
from edge.transport import StreamTransport
from tests.served import BUNDLE
from tests.test_tls import haproxy, issue

CLIENTS, REPLICAS = 30, 2


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


async def broadcast(method: str, *arguments: float) -> list[Any]:
    """Call a method of every replica, as an operator's program would."""
    from ray import serve

    handle = serve.get_deployment_handle("Backbone", APPLICATION)
    answers: list[Any] = await handle.broadcast(method, *arguments).results_async()
    return answers


async def run(port: int, folder: Path) -> dict[str, Any]:
    """30 devices infer through TLS without a pause, while all streams are moved twice."""
    device, images = TorchDevice(BUNDLE), load_sample().inputs[:8]
    token, files = read_token(folder / "token"), issue(folder)
    enough = asyncio.Event()
    outputs: list[Any] = []

    async def load(client: Client) -> None:
        while not enough.is_set():
            outputs.append(await client.infer(images))

    async with haproxy(files, port) as tls_port:
        url = f"https://127.0.0.1:{tls_port}"
        clients = [Client(url, device, token=token, ca_file=files.ca) for _ in range(CLIENTS)]
        busy = [asyncio.create_task(load(client)) for client in clients]
        rotated = []
        for within_s in (1.0, 0.0):
            while sum(s["open_streams"] for s in await broadcast("stats")) < CLIENTS:
                await asyncio.sleep(0.1)
            rotated.append(sum(await broadcast("rotate_streams", 1.0, within_s)))
            await asyncio.sleep(within_s + 2)
        enough.set()
        await asyncio.gather(*busy)
        closed = [s["streams_closed"] for s in await broadcast("stats")]
        for client in clients:
            await client.close()
    transports = [client.cloud.transport for client in clients]
    return {
        "rotated": rotated,
        "closed": closed,
        "retries": sum(client.retries for client in clients),
        "connections": sum(t.connections for t in transports if isinstance(t, StreamTransport)),
        "inferences": len(outputs),
        "spread": max(float(np.abs(o - outputs[0]).max()) for o in outputs),
    }


def main(folder: Path) -> None:
    (folder / "tokens").write_text(write_token(folder / "token"))
    config = Config(
        bundle=str(BUNDLE),
        tokens_file=str(folder / "tokens"),
        rotate_streams_within_s=None,  # none but those that are asked for here
    )
    # Ray's handles belong to a loop that must outlive the cluster.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    with local_cluster(config, replicas=REPLICAS) as cluster:
        paths = ("/-/healthz", "/v2/health/live", "/v2/health/ready", "/v2", "/v2/stats")
        seen = {path: status_of(cluster.url + path) for path in paths}
        rest = asyncio.run_coroutine_threadsafe(run(cluster.port, folder), loop).result()
        print(json.dumps({"without_token": seen, **rest}))
    loop.call_soon_threadsafe(loop.stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
