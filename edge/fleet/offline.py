"""The offline phase of a fleet in the mode split: one process's masks, asked of operator B.

The devices of a process share one stream to operator B and one pool of masks; each mask is handed
out once (:mod:`edge.masks`). The pool is filled before the run, and again while it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.masks import MaskPool, Masks
from edge.offline import fetch_from

if TYPE_CHECKING:
    from datamix.bundle import Manifest
    from edge.fleet.config import FleetConfig


@dataclass(frozen=True, slots=True)
class OfflineTraffic:
    """What was asked of operator B, in one process or in all of them.

    Attributes:
        fetched: groups that masks were fetched for.
        used: of those, that an inference took.
        waited: inferences that fell due and found no masks ready.
        requests: messages sent, retries included.
        retries: messages sent again.
        bytes_up: of all messages sent.
        bytes_down: of all messages received.
    """

    fetched: int = 0
    used: int = 0
    waited: int = 0
    requests: int = 0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Offline:
    """Masks for the devices of one process. Belongs to the event loop it is used in."""

    def __init__(self, config: FleetConfig, manifest: Manifest, groups: int) -> None:
        """Prepare; operator B is contacted by :meth:`fill`.

        Args:
            config: the run; its ``second`` is operator B.
            manifest: of the bundle that both operators serve.
            groups: how many inferences this process owes: no more masks are fetched ahead.
        """
        # An echo worker does without what they import.
        from edge.requester import ClientConfig, Requester
        from edge.transport import StreamTransport

        assert config.second is not None
        patience = ClientConfig(timeout_s=config.timeout_s)
        self._stream = StreamTransport(config.second, manifest.name, config.second_access)
        self._end = Requester(self._stream, patience, "operator B")
        self._pool = MaskPool(
            fetch_from(self._end, manifest, config.timeout_s),
            manifest.blocks,
            manifest.group_size,
            max(1, min(config.masks_ahead, groups)),
        )
        self._used = self._waited = 0

    @property
    def ready(self) -> bool:
        """Whether :meth:`take` has masks for a group."""
        return len(self._pool) > 0

    async def fill(self) -> None:
        """Fetch what is to be there before the run.

        Raises:
            DataMixError: operator B could not be made to answer.
        """
        await self._pool.fill()

    async def wait(self) -> None:
        """For an inference that found none ready: until some are.

        Raises:
            DataMixError: operator B could not be made to answer.
        """
        self._waited += 1
        await self._pool.wait()

    def take(self) -> Masks:
        """Masks for one group, for good.

        Raises:
            ConfigError: none are ready.
        """
        masks = self._pool.take_ready()
        self._used += 1
        return masks

    def traffic(self) -> OfflineTraffic:
        """What was done so far."""
        return OfflineTraffic(
            fetched=self._pool.fetched,
            used=self._used,
            waited=self._waited,
            requests=self._end.requests,
            retries=self._end.retries,
            bytes_up=self._end.bytes_up,
            bytes_down=self._stream.received_bytes,
        )

    async def close(self) -> None:
        """Let go of the stream, and wipe masks that nobody took."""
        await self._pool.close()
        await self._stream.close()
