"""Requests for the image of noise: each seed used once, and expanded beside the event loop.

In the mode split (docs/privacy.md) this replica may be operator B's. A request then has seeds where
others have features (docs/wire.md), and what the engine gets is the noise that they stand for. It
waits here until that is made, and goes the way of all requests from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from datamix import wire
from datamix.errors import (
    Conflict,
    DataMixError,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
)
from datamix.noise import expand_rows, from_rows
from deployments.engine import Array, Rows, Shape
from deployments.waiting import Job

if TYPE_CHECKING:
    from deployments.batcher import Batcher
    from deployments.config import Config

_REMEMBERED = 1 << 16  # seeds, of some 200 bytes each with all that Python needs for them
_THREADS = 2  # numpy and cryptography let go of the GIL; the engine needs the cores, too
_DIGEST_BYTES = 16

logger = logging.getLogger(__name__)


class Seeds:
    """Which request each of the latest seeds came with.

    Two inferences under one seed would cancel each other's noise for operator A, so a device that
    draws a seed twice has a fault that it must learn of. A request that comes again is a retry.
    """

    def __init__(self, limit: int = _REMEMBERED) -> None:
        """Remember the latest ``limit`` seeds."""
        self._limit = limit
        # Neither seeds nor ids are kept, but digests under a key that nobody knows: how long a
        # look-up takes, or how digests collide, then tells nothing about them.
        self._keyed = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=secrets.token_bytes(32))
        self._owners: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._owners)

    def claim(self, request: wire.Request) -> None:
        """Take the seeds for this request, which may take them again.

        Raises:
            Conflict: another request has one of them, or this one has it twice. None is taken.
        """
        seeds = from_rows(request.features)
        digests = [self._digest(seed) for seed in seeds]
        if len(set(digests)) < len(digests):
            raise Conflict("the request has a seed twice, expected one seed for each row")
        owner = self._digest(f"{request.request_id} {request.block} ".encode() + b"".join(seeds))
        if any(self._owners.get(digest, owner) != owner for digest in digests):
            raise Conflict(
                "a seed came with another request before, expected new ones (a retry sends the same"
                " seeds, block and request id)"
            )
        for digest in digests:
            self._owners[digest] = owner
            self._owners.move_to_end(digest)
        while len(self._owners) > self._limit:
            self._owners.popitem(last=False)

    def _digest(self, data: bytes) -> bytes:
        digest = self._keyed.copy()
        digest.update(data)
        return digest.digest()


class Expander:
    """The requests whose noise is not made yet."""

    def __init__(
        self, config: Config, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]
    ) -> None:
        """Expand in threads that start with the first request; go on on ``loop``.

        Args:
            config: how much may wait; with what waits for the engine, no more rows than it allows.
            loop: the event loop on which requests enter the queue.
            clock: the batcher's, seconds.
        """
        self._max_rows = config.max_queue_rows
        self._max_bytes = config.max_queue_bytes
        self._loop = loop
        self._clock = clock
        self._seeds = Seeds()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="noise")
        self._rows = self._bytes = 0
        self._closed = False

    def offer(self, batcher: Batcher, request: wire.Request, job: Job, shape: Shape) -> None:
        """Expand the seeds of a request to rows of ``shape``, then queue it.

        What goes wrong after that, ``job.done`` learns.

        Raises:
            Overloaded: too much waits already; says when to try again.
            Conflict: a seed was used before.
            Unavailable: the replica has stopped.
        """
        if self._closed:
            raise Unavailable("this replica is draining, send the request again")
        size_bytes = expanded_bytes(job.count, shape)
        if (
            self._rows + batcher.queue_rows + job.count > self._max_rows
            or self._bytes + size_bytes > self._max_bytes
        ):
            raise Overloaded(
                f"{self._rows} rows of noise wait to be expanded, try again later",
                retry_after_s=batcher.predicted_wait_s(),
            )
        self._seeds.claim(request)
        self._rows += job.count
        self._bytes += size_bytes
        self._pool.submit(self._expand, batcher, job, shape)

    def close(self) -> None:
        """Take no more; what is under way finds its batcher drained."""
        self._closed = True
        self._pool.shutdown(wait=False)

    def _expand(self, batcher: Batcher, job: Job, shape: Shape) -> None:
        """On a thread of the pool."""
        noise: Array | DataMixError
        try:
            if job.is_live(self._clock()):
                noise = expand_rows(job.rows.features, shape)
            else:
                noise = DeadlineExceeded("the deadline passed before the computation began")
        except Exception as error:
            # Its text may hold a seed: the log gets its type.
            logger.error("noise was not expanded: %s", type(error).__name__)
            noise = Unavailable("the replica failed on this request")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._go_on, batcher, job, noise, shape)

    def _go_on(self, batcher: Batcher, job: Job, noise: Array | DataMixError, shape: Shape) -> None:
        """On the event loop."""
        self._rows -= job.count
        self._bytes -= expanded_bytes(job.count, shape)
        if job.cancelled:
            return
        if isinstance(noise, DataMixError):
            job.done(noise)
            return
        job.rows = Rows(noise, None)
        try:
            batcher.offer(job)
        except DataMixError as error:
            job.done(error)


def expanded_bytes(rows: int, shape: Shape) -> int:
    """Bytes of so many rows of noise, float32."""
    return 4 * rows * math.prod(shape)
