"""The time of a device with a profile: what its processor and its link take, simulated by timers.

What really runs in the generator, runs at the beginning of the wait for what is charged, so that it
costs the device nothing unless it takes longer than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from edge.fleet.device import Flight
from edge.fleet.profiles import Times
from edge.fleet.stages import Stages
from edge.fleet.timers import Timers
from edge.fleet.workload import Question


class Host(Protocol):
    """What the simulation wants of the shard."""

    @property
    def column(self) -> dict[str, Any]:
        """The table's columns."""
        ...

    @property
    def stages(self) -> Stages | None:
        """What really ran since it was cleared; None where nothing does."""
        ...

    def ask(self, flight: Flight, question: Question, at_s: float) -> float:
        """Make a message, at the device's time ``at_s``; return what that really took."""
        ...

    def hand_over(self, flight: Flight) -> None:
        """Send a message by the real stream."""
        ...


class OwnTime:
    """Lets messages leave and answers arrive when the device's profile says."""

    def __init__(self, host: Host, timers: Timers, clock: Callable[[], float]) -> None:
        """Simulate for one shard."""
        self._host = host
        self._timers = timers
        self._clock = clock

    def prepare(self, flight: Flight, question: Question, at_s: float, times: Times) -> None:
        """Mix and make a message from the device's time ``at_s`` on, and let it set out."""
        host, position = self._host, flight.position
        mix_s = times.mix_s
        if mix_s is None:
            mix_s = 0.0 if host.stages is None else host.stages.mix_s
        host.column["mix_s"][position] += mix_s
        encode_s = host.ask(flight, question, at_s + mix_s)
        if times.encode_s is not None:
            encode_s = times.encode_s
        host.column["encode_s"][position] += encode_s
        self.set_out(flight, at_s + mix_s + encode_s)

    def set_out(self, flight: Flight, ready_s: float) -> None:
        """Put a message that is ready at ``ready_s`` on the device's link."""
        device = flight.device
        flight.ready_s = leave_s = ready_s
        if device.transport is None:
            device.waiting.append(flight)
            return
        if device.traffic is not None:
            turn = (flight.block << 16) + flight.attempts
            leave_s = device.traffic.up(ready_s, len(flight.message), flight.index, turn)
            self._host.column["uplink_s"][flight.position] += leave_s - ready_s
        flight.held = True
        if leave_s > self._clock():
            self._timers.at(leave_s, self._leave, flight, leave_s)
        else:
            self._leave(flight, leave_s)

    def _leave(self, flight: Flight, leave_s: float) -> None:
        """Let a message out of the simulated link, onto the real one."""
        flight.held = False
        if flight.inference is None:
            return
        column = self._host.column
        if np.isnan(column["sent_s"][flight.position]):
            column["lag_s"][flight.position] = self._clock() - leave_s
        self._host.hand_over(flight)

    def come_down(self, flight: Flight, size_bytes: int) -> float:
        """Put an answer on the way down; return when it is there.

        What has left the cloud arrives, also where the stream is lost meanwhile.
        """
        device, there_s = flight.device, self._clock()
        if device.traffic is not None:
            device.answers += 1
            now_s = there_s
            there_s = device.traffic.down(now_s, size_bytes, device.number, device.answers)
            self._host.column["downlink_s"][flight.position] += there_s - now_s
        return there_s

    def wait(
        self, flight: Flight, until_s: float, then: Callable[..., None], *arguments: Any
    ) -> None:
        """Call ``then(*arguments)`` at the device's time ``until_s``, at once if that is past."""
        if until_s > self._clock():
            flight.held = True
            self._timers.at(until_s, then, *arguments)
        else:
            then(*arguments)
