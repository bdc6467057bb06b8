"""A device's link to the cloud, simulated: how long a message takes on its way up or down.

Bandwidth is a queue: the messages of one device follow each other, so a large one holds up the
next. Half a round trip, jitter and lost packets come on top, and no message overtakes another (the
real stream is TCP). Nothing here knows a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge.fleet.chance import Purpose, exponential, uniform

PACKET_BYTES = 1400
_LARGEST = 1 - 2.0**-53


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of link.

    Attributes:
        up_bytes_per_s: bandwidth towards the cloud.
        down_bytes_per_s: bandwidth towards the device.
        round_trip_s: of an empty link, halved each way.
        jitter_s: mean of an exponential delay each way.
        loss: share of packets of 1400 bytes that are lost and sent again a round trip later.
    """

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    jitter_s: float = 0.0
    loss: float = 0.0

    def resends(self, size_bytes: int, share: float) -> int:
        """How many round trips pass until the last packet of a message got through.

        After n sendings of what is missing, all p packets are there with probability
        (1 - loss^n)^p; ``share``, a number in [0, 1), is looked up in that distribution.
        """
        if self.loss <= 0 or share <= 0:
            return 0
        packets = max(1, -(-size_bytes // PACKET_BYTES))
        if share <= (1 - self.loss) ** packets:
            return 0
        missing = -math.expm1(math.log(min(share, _LARGEST)) / packets)
        return max(1, math.ceil(math.log(missing) / math.log(self.loss))) - 1


class Traffic:
    """What is on one device's link. Mutable: one per device, both ways."""

    __slots__ = ("_down_arrived_s", "_down_free_s", "_link", "_seed", "_up_arrived_s", "_up_free_s")

    def __init__(self, link: Link, seed: int) -> None:
        """Begin with an idle link."""
        self._link = link
        self._seed = seed
        self._up_free_s = self._up_arrived_s = -math.inf
        self._down_free_s = self._down_arrived_s = -math.inf

    def up(self, now_s: float, size_bytes: int, place: int, turn: int) -> float:
        """Put a message on the way up; return when its last byte is at the cloud.

        Args:
            now_s: by any clock, but the same for every call.
            size_bytes: of the message.
            place: with ``turn``, where jitter and loss are looked up (:mod:`edge.fleet.chance`).
            turn: see ``place``.
        """
        self._up_free_s = max(now_s, self._up_free_s) + size_bytes / self._link.up_bytes_per_s
        drawn = (Purpose.JITTER_UP, Purpose.LOSS_UP, place, turn)
        arrived_s = self._up_free_s + self._delay_s(size_bytes, *drawn)
        self._up_arrived_s = max(self._up_arrived_s, arrived_s)
        return self._up_arrived_s

    def down(self, now_s: float, size_bytes: int, place: int, turn: int) -> float:
        """Put a message on the way down; return when its last byte is at the device."""
        self._down_free_s = max(now_s, self._down_free_s) + size_bytes / self._link.down_bytes_per_s
        drawn = (Purpose.JITTER_DOWN, Purpose.LOSS_DOWN, place, turn)
        arrived_s = self._down_free_s + self._delay_s(size_bytes, *drawn)
        self._down_arrived_s = max(self._down_arrived_s, arrived_s)
        return self._down_arrived_s

    def reset(self) -> None:
        """Forget what is on its way: the stream is gone, and a new one begins empty."""
        self._up_free_s = self._up_arrived_s = -math.inf
        self._down_free_s = self._down_arrived_s = -math.inf

    def _delay_s(
        self, size_bytes: int, jitter: Purpose, loss: Purpose, place: int, turn: int
    ) -> float:
        """Half a round trip, jitter, and the round trips that lost packets cost."""
        link = self._link
        delay_s = link.round_trip_s / 2
        if link.jitter_s > 0:
            delay_s += exponential(link.jitter_s, uniform(self._seed, jitter, place, turn))
        if link.loss > 0:
            drawn = uniform(self._seed, loss, place, turn)
            delay_s += link.resends(size_bytes, drawn) * link.round_trip_s
        return delay_s
