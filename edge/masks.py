"""Noise that two operators cancel: drawn before the input exists, handed out once, then wiped.

A mask is a seed's Gaussian noise Z for one round of one group, and operator B's answer to it. The
:class:`MaskPool` fetches them ahead of time (the offline phase), so that an inference waits for
operator A only (the online phase). Masks live in this process's memory and nowhere else: whoever
is restarted starts with none, and so does a child after a fork.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.noise import SEED_BYTES, expand, from_rows
from edge.installed import require
from edge.mixing import wipe

if TYPE_CHECKING:
    from datamix.bundle import BlockShape

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Seeds = npt.NDArray[np.uint8]

# (block, seeds (n, 32)) -> operator B's answers (n, *output_shape) float32, checked.
Fetch = Callable[[int, Seeds], Awaitable[Floats]]

_ROWS_AT_ONCE = 32
_BYTES_AT_ONCE = 4 << 20  # of noise in a request: a replica makes no more than a message may have


def draw_seeds(count: int) -> Seeds:
    """``(count, 32)`` bytes from the operating system's entropy, a seed a row."""
    drawn = np.frombuffer(os.urandom(count * SEED_BYTES), np.uint8)
    return drawn.reshape(count, SEED_BYTES).copy()  # urandom's bytes could not be wiped


class Mask:
    """Noise for one round of one group, and what operator B makes of it.

    Attributes:
        noise: (K, *input_shape) float64 of unit variance.
        answer: (K, *output_shape) float32.
    """

    __slots__ = ("answer", "noise")

    def __init__(self, noise: npt.NDArray[np.float64], answer: Floats) -> None:
        """Take ownership of both."""
        self.noise = noise
        self.answer = answer

    def wipe(self) -> None:
        """Overwrite both."""
        wipe(self.noise)
        wipe(self.answer)

    def __repr__(self) -> str:
        """Say nothing."""
        return "Mask(values=secret)"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a pickle leaves the device."""
        raise TypeError("masks are secret and cannot be pickled or copied")


class Masks:
    """The masks of one group, one for each block; each can be taken once."""

    __slots__ = ("_left",)

    def __init__(self, masks: Sequence[Mask]) -> None:
        """Keep one mask per block, in their order."""
        self._left: dict[int, Mask] = dict(enumerate(masks))

    def take(self, block: int) -> Mask:
        """The mask for ``block``, for good.

        Raises:
            ConfigError: it was taken before.
        """
        mask = self._left.pop(block, None)
        if mask is None:
            raise ConfigError(f"the mask of block {block} was used, expected a fresh one")
        return mask

    def wipe(self) -> None:
        """Overwrite those that nobody took."""
        while self._left:
            self._left.popitem()[1].wipe()

    def __repr__(self) -> str:
        """Say how many are left."""
        return f"Masks(left={len(self._left)}, values=secret)"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a pickle leaves the device."""
        raise TypeError("masks are secret and cannot be pickled or copied")


class MaskPool:
    """Keeps masks for the next groups ready.

    Attributes:
        fetched: masks of whole groups that were fetched.
        waited: how often a group found none ready.
    """

    def __init__(
        self, fetch: Fetch, blocks: Sequence[BlockShape], group_size: int, depth: int
    ) -> None:
        """Prepare; nothing is fetched yet.

        Args:
            fetch: asks operator B.
            blocks: shapes of each round's rows.
            group_size: K.
            depth: groups to keep masks ready for.

        Raises:
            ConfigError: ``depth`` is below 1, or what makes noise from seeds is not installed.
        """
        require("cryptography", "split")
        if depth < 1:
            raise ConfigError(f"depth of the mask pool is {depth}, expected at least 1")
        self._fetch = fetch
        self._blocks = tuple(blocks)
        self._group_size = group_size
        self._depth = depth
        self._ready: deque[Masks] = deque()
        self._process = os.getpid()
        self._filling: asyncio.Task[None] | None = None
        self.fetched = 0
        self.waited = 0

    def __len__(self) -> int:
        """Groups that masks are ready for."""
        self._leave_parents()
        return len(self._ready)

    async def take(self) -> Masks:
        """Masks for one group; waits where none are ready.

        Raises:
            DataMixError: operator B could not be made to answer.
        """
        if not len(self):
            self.waited += 1
            await self.wait()
        return self.take_ready()

    async def wait(self) -> None:
        """Until masks for a group are ready, which somebody else may then take first.

        Raises:
            DataMixError: operator B could not be made to answer.
        """
        while not len(self):
            await asyncio.shield(self._fill())

    def take_ready(self) -> Masks:
        """Masks for one group, which :func:`len` says are ready.

        Raises:
            ConfigError: none are.
        """
        if not len(self):
            raise ConfigError("no masks are ready, expected some for a group")
        masks = self._ready.popleft()
        if len(self._ready) <= self._depth // 2:
            self._fill()
        return masks

    async def fill(self) -> None:
        """Fetch until ``depth`` groups have masks.

        Raises:
            DataMixError: operator B could not be made to answer.
        """
        while len(self) < self._depth:
            await asyncio.shield(self._fill())

    async def close(self) -> None:
        """Stop fetching and wipe what is left."""
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        while self._ready:
            self._ready.pop().wipe()

    def _fill(self) -> asyncio.Task[None]:
        """The task that fetches some masks: all who wait share it."""
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fetch_some())
            # Where nobody waits, nobody else looks at its failure: the next taker tries again.
            self._filling.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._filling

    async def _fetch_some(self) -> None:
        """One request to operator B for each block, for as many groups as fit into one."""
        largest = max(math.prod(block.input_shape) for block in self._blocks)
        rows = min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // (4 * largest))
        groups = min(self._depth, max(1, rows // self._group_size))
        found = await asyncio.gather(
            *(self._masks(index, groups) for index in range(len(self._blocks)))
        )
        self._ready.extend(Masks(of_group) for of_group in zip(*found, strict=True))
        self.fetched += groups

    async def _masks(self, block: int, groups: int) -> list[Mask]:
        seeds = draw_seeds(groups * self._group_size)
        try:
            answers = await self._fetch(block, seeds)
            shape = self._blocks[block].input_shape
            noise = await asyncio.to_thread(expand_seeds, seeds, shape)
        finally:
            wipe(seeds)
        size = self._group_size
        cuts = [slice(at, at + size) for at in range(0, len(seeds), size)]
        return [Mask(noise[cut], answers[cut]) for cut in cuts]

    def _leave_parents(self) -> None:
        """Forget, in a child, what a fork copied: the parent will use it."""
        if os.getpid() != self._process:
            self._ready.clear()
            self._filling = None
            self._process = os.getpid()


def expand_seeds(seeds: Seeds, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Noise for a row of each seed: (n, 32) to (n, *shape) float64."""
    return expand(from_rows(seeds), shape)
