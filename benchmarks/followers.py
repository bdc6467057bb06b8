"""Clients that name no version, and so get the current one: does each answer belong to one version?

They send a pool of random rows again and again, and know what each version makes of each of them.
An answer must be what the version makes of it that it names, in all of its rows.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix import wire
from datamix.bundle import load_backbone
from datamix.errors import DataMixError
from edge.transport import StreamTransport

_ROWS, _POOL = 4, 32
_ATTEMPTS, _TIMEOUT_S, _PAUSE_S = 8, 20.0, 0.2

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client lived it.

    Attributes:
        done_s: when it was answered or given up, on the monotonic clock.
        outcome: ``right``, ``failed``, ``mixed`` (rows, or name and rows, of several versions) or
            ``wrong`` (rows of none).
        version: that the answer named.
    """

    done_s: float
    outcome: str
    version: str = ""


@dataclass
class Pool:
    """Rows for one block, and what every version makes of them: (pool, rows, ...)."""

    block: int
    inputs: npt.NDArray[np.float16]
    expected: dict[str, Floats]
    tolerance: float

    def judge(self, index: int, version: str, values: Floats) -> str:
        """What an answer to message ``index`` is that names ``version``; values: (rows, ...)."""
        own = self.expected.get(version)
        if own is not None and all(self._same(values, own[index])):
            return "right"
        of_any = [self._same(values, expected[index]) for expected in self.expected.values()]
        return "mixed" if np.any(of_any, axis=0).all() else "wrong"

    def _same(self, values: Floats, expected: Floats) -> npt.NDArray[np.bool_]:
        """Row by row, (rows,)."""
        bound = self.tolerance * np.maximum(1.0, np.abs(expected))
        same: npt.NDArray[np.bool_] = (np.abs(values - expected) <= bound).all(axis=(1, 2, 3))
        return same


def pools(bundles: list[Path]) -> list[Pool]:
    """One pool for each block of bundles that are versions of one model.

    Raises:
        ValueError: two of them answer the same.
    """
    import torch

    random = np.random.default_rng(7)
    loaded = [load_backbone(bundle) for bundle in bundles]
    found = []
    for index, block in enumerate(loaded[0][0].blocks):
        shape = (_POOL, _ROWS, *block.input_shape)
        inputs = random.standard_normal(shape, np.float32).astype(np.float16)
        flat = torch.from_numpy(inputs.reshape(-1, *block.input_shape).astype(np.float32))
        expected = {}
        for manifest, modules in loaded:
            with torch.inference_mode():
                outputs = modules[index](flat).numpy()
            expected[manifest.version] = outputs.reshape(_POOL, _ROWS, *block.output_shape)
        pool = Pool(index, inputs, expected, max(manifest.tolerance for manifest, _ in loaded))
        for one, other in itertools.combinations(expected.values(), 2):
            if any(pool._same(a, b).any() for a, b in zip(one, other, strict=True)):
                raise ValueError("two versions answer the same, expected that they can be told")
        found.append(pool)
    return found


@dataclass
class Followers:
    """Clients in a thread of their own, until :meth:`stop`."""

    url: str
    model: str
    pools: list[Pool]
    clients: int = 8
    pause_s: float = 0.1
    answers: list[Answer] = field(default_factory=list)
    retries: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Start."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), name="followers")
        self._thread.start()

    def stop(self) -> None:
        """Let every client finish what it asks, and end."""
        self._over.set()
        self._thread.join()

    def counts(self, from_s: float, to_s: float) -> Counter[str]:
        """Outcomes of what ended in between."""
        return Counter(a.outcome for a in list(self.answers) if from_s <= a.done_s < to_s)

    def named(self, from_s: float, to_s: float) -> Counter[str]:
        """Versions that answers in between named."""
        return Counter(a.version for a in list(self.answers) if from_s <= a.done_s < to_s)

    async def _all(self) -> None:
        await asyncio.gather(*(self._one(number) for number in range(self.clients)))

    async def _one(self, number: int) -> None:
        transport = StreamTransport(self.url, self.model)
        turn = number
        try:
            while not self._over.is_set():
                pool = self.pools[turn % len(self.pools)]
                self.answers.append(await self._ask(transport, pool, turn, f"{number}-{turn}"))
                turn += 1
                await asyncio.sleep(self.pause_s)
        finally:
            await transport.close()

    async def _ask(
        self, transport: StreamTransport, pool: Pool, turn: int, request_id: str
    ) -> Answer:
        index = turn % _POOL
        message = wire.encode_request(
            pool.inputs[index], request_id=request_id, dtype="float16", block=pool.block
        )
        for attempt in range(_ATTEMPTS):
            self.retries += attempt > 0
            try:
                response: Any = await transport.send(message, request_id, _TIMEOUT_S)
            except DataMixError:
                response = None
            if response is not None and response.status == 200:
                version = response.model_version or ""
                outcome = pool.judge(index, version, response.values())
                return Answer(time.monotonic(), outcome, version)
            await asyncio.sleep(_PAUSE_S * 2 ** min(attempt, 3))
        return Answer(time.monotonic(), "failed")
