"""A batcher and its engine under load in this process: no network, no messages."""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np

from datamix.errors import DataMixError
from deployments.batcher import Batcher
from deployments.engine import Engine, Rows
from deployments.waiting import Computed, Job

ROWS = 4  # of a request


class Run:
    """One batcher under load, and what its requests lived."""

    def __init__(self, engine: Engine, max_batch_rows: int) -> None:
        """Start a batcher for the engine's first block; on a running event loop."""
        self.batcher = Batcher(
            engine,
            asyncio.get_running_loop(),
            max_batch_rows=max_batch_rows,
            max_queue_rows=1 << 20,
        )
        values = np.random.default_rng(1).standard_normal((ROWS, *engine.blocks[0].input_shape))
        self.rows = Rows(values.astype(np.float16), None)
        self.latencies_s: list[float] = []
        self.open = 0

    def ask(self, due: float) -> None:
        """Offer one request that was due then."""

        def done(outcome: Computed | DataMixError) -> None:
            self.open -= 1
            if isinstance(outcome, Computed):
                self.latencies_s.append(time.monotonic() - due)

        self.open += 1
        self.batcher.offer(Job(0, self.rows, done))

    async def saturate(self, seconds: float, waiting: int) -> float:
        """Keep ``waiting`` requests in the system; rows per second."""
        await self._fill(min(2.0, seconds / 4), waiting)
        before, start = self.batcher.statistics.rows, time.monotonic()
        await self._fill(seconds, waiting)
        return (self.batcher.statistics.rows - before) / (time.monotonic() - start)

    async def _fill(self, seconds: float, waiting: int) -> None:
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            for _ in range(waiting - self.open):
                self.ask(now)
            await asyncio.sleep(0.0005)

    async def load(self, seconds: float, rate: float, seed: int) -> None:
        """Poisson arrivals at ``rate`` requests per second, on schedule whatever happens."""
        rng = random.Random(seed)
        due = start = time.monotonic()
        while due < start + seconds:
            due += rng.expovariate(rate)
            if (early_s := due - time.monotonic()) > 0:
                await asyncio.sleep(early_s)
            self.ask(due)
        while self.open:
            await asyncio.sleep(0.001)
