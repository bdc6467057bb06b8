"""What a replica that has just started asks of the others: to send their devices on.

A device holds its stream for days, so new replicas would stay idle. And whenever replicas come or
go, Ray reloads HAProxy, whose old worker cuts every stream it still holds some time later, whatever
is in flight. So a new replica asks all of them to let go of their streams one by one before that;
each device connects anew, wherever there are fewest connections.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Protocol

logger = logging.getLogger(__name__)

# Until HAProxy knows the new replica: the controller's turn, the reload, two good health checks.
SETTLE_S = 5.0
_BROADCAST_S = 30.0


class Peers(Protocol):
    """The replicas of this deployment."""

    async def rotate(self, within_s: float) -> None:
        """Ask all others to let go of all their streams within so many seconds."""
        ...


class NoPeers:
    """A replica by itself, outside Ray."""

    async def rotate(self, within_s: float) -> None:
        """Nobody to ask."""


class RayPeers:
    """The replicas that Serve runs; only inside one of them."""

    def __init__(self, replica: str) -> None:
        """Ask in the name of this replica, which keeps its own streams."""
        self._replica = replica

    async def rotate(self, within_s: float) -> None:
        """See :class:`Peers`."""
        from ray import serve

        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        asked = handle.broadcast("rotate_streams", 1.0, within_s, self._replica)
        answers = await asked.results_async(timeout_s=_BROADCAST_S, return_exceptions=True)
        logger.info("%d replicas were asked to let go of their streams", len(answers))


async def announce(peers: Peers, rotate_within_s: float, settle_s: float = SETTLE_S) -> None:
    """Say that this replica is here, once devices can reach it."""
    await asyncio.sleep(settle_s)
    try:
        await peers.rotate(min(rotate_within_s, _hard_stop_s() * 0.6))
    except Exception as error:  # of whatever kind Ray has; the streams then end at the hard stop
        logger.error("the other replicas were not asked to rotate: %s", type(error).__name__)


def _hard_stop_s() -> float:
    """When HAProxy's old worker cuts what it still holds, in seconds; Ray's default is 120."""
    return float(os.environ.get("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "120"))
