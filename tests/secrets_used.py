"""A device that infers again and again, in a process of its own, and writes down what it used.

    python -m tests.secrets_used FILE COUNT MODE

A line for each secret the moment it is drawn, its kind and its sha256; then one for each inference.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from typing import Any

from datamix import wire
from datamix.noise import expand_rows
from edge import masks, mixing, modes
from edge.client import Client
from edge.transport import InProcessTransport
from tests.fake_cloud import echo
from tests.fake_device import GROUP, SHAPES, FakeDevice, compute, raw_inputs


async def answer(message: bytes) -> bytes:
    request = wire.decode_request(message)
    if request.noise:
        rows = expand_rows(request.features, SHAPES[request.block][0])
    else:
        rows = wire.dequantise(request.features, request.scale)
    return echo(request, features=compute(request.block, rows))


def main(path: str, count: int, mode: str) -> None:
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(kind: str, secret: bytes) -> None:
        os.write(file, f"{kind} {hashlib.sha256(secret).hexdigest()}\n".encode())

    haar, draw_seeds = mixing.haar, masks.draw_seeds

    def noted_haar(group_size: int) -> Any:
        drawn = haar(group_size)
        note("coefficients", drawn._matrix.tobytes())
        return drawn

    def noted_seeds(count: int) -> Any:
        drawn = draw_seeds(count)
        for seed in drawn:
            note("seed", seed.tobytes())
        return drawn

    vars(modes)["haar"] = noted_haar
    masks.draw_seeds = noted_seeds
    protect = modes.share

    def noted_share(clipped: Any, mask: masks.Mask, sigma: float, step: float | None = None) -> Any:
        note("noise", mask.noise.tobytes())
        return protect(clipped, mask, sigma, step)

    modes.share = noted_share

    async def run() -> None:
        options: dict[str, Any] = {"mode": mode}
        if mode == "split":
            options |= {"second": InProcessTransport(answer), "allow_same_operator": True}
        client = Client(InProcessTransport(answer), FakeDevice(all_modes=True), **options)
        inputs = raw_inputs(GROUP)  # always the same: only the secrets differ
        async with client:
            for _ in range(count):
                await client.infer(inputs)
                note("inference", b"")

    asyncio.run(run())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
