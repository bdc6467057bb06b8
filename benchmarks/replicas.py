"""The product's replica behind uvicorn in a process of its own: no Ray, no HAProxy between.

``start(**settings)`` runs this file as a script, which prints its URL when it is ready and lives
until its standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def start(**settings: Any) -> Iterator[str]:
    """Start a replica with these settings; yields its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.replicas", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the replica did not start")
        yield url
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _serve(settings: dict[str, Any]) -> None:
    from deployments.config import Config
    from tests.real_cloud import serving

    async with serving(Config(**settings)) as cloud:
        print(cloud.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(json.loads(sys.argv[1])))
