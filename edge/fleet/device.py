"""One simulated device: its stream to the cloud and the inferences it has under way."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Protocol

from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from edge.fleet.links import Traffic
from edge.fleet.profiles import Times
from edge.fleet.workload import Inference

FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0
SILENCE_S = 2.0

_MOVED = (WSCloseCode.GOING_AWAY, WSCloseCode.SERVICE_RESTART)


def backoff_s(attempt: int, generator: random.Random) -> float:
    """Draw how long to wait before attempt ``attempt`` (from 1): half fixed, half jitter.

    Doubles from 50 ms to 2 s. The jitter keeps thousands of devices that lost the same replica from
    coming back at the same moment; the fixed half keeps them from hammering it.
    """
    longest: float = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(attempt - 1, 16))
    return longest * (0.5 + 0.5 * generator.random())


class Flight:
    """One inference under way. Mutable and short-lived; what lasts is its row in the table."""

    __slots__ = (
        "attempts",
        "block",
        "deadline_s",
        "device",
        "ended",
        "held",
        "index",
        "inference",
        "message",
        "moved",
        "position",
        "ready_s",
        "request_id",
        "sent",
        "sent_s",
        "status",
    )

    def __init__(self, position: int, index: int, device: FleetDevice, deadline_s: float) -> None:
        """Begin; the shard fills in the rest as the inference goes on."""
        self.position = position
        self.index = index  # its number in the whole fleet
        self.device = device
        self.deadline_s = deadline_s
        self.inference: Inference | None = None  # None again once it has ended
        self.ended = False
        self.request_id = ""
        self.block = 0
        self.message = b""
        self.held = False  # whether a charged time or a simulated link has it now
        self.ready_s = 0.0  # when the present message is ready to leave, by a profile's times
        self.sent = False  # whether the present message has left the device
        self.sent_s = 0.0  # when it has, by the shard's clock
        self.attempts = 0  # resends so far, of all messages
        self.moved = False  # whether a message waits because the cloud moved the stream
        self.status = 0  # why the present message has to be sent again; 0 if it has not


class Owner(Protocol):
    """Who wants to hear what happens to a device's stream: the shard."""

    def on_message(self, device: FleetDevice, body: bytes) -> None:
        """A whole binary message came."""
        ...

    def on_connected(self, device: FleetDevice) -> None:
        """The stream is open."""
        ...

    def on_lost(self, device: FleetDevice) -> None:
        """The stream is gone."""
        ...

    def on_crash(self, error: Exception) -> None:
        """The simulator itself failed."""
        ...


class FleetDevice(WSListener):
    """A device with one stream.

    Attributes:
        number: which device of the fleet.
        transport: the open stream, or None while there is none.
        flights: inferences under way, sent or not.
        waiting: inferences whose message waits for the stream to come back.
        opened_s: when the stream was opened, by the shard's clock.
        heard_s: when a message last came, likewise.
        moved: the cloud wants the stream elsewhere; it has answered what it has read.
        number_of_stream: how many streams it has had.
        opening: how many tasks are about to give it a stream.
        hurried: it lost its stream in a storm and comes back at once.
        away: it has gone for a while, and wants no stream.
        toggle_s: when it goes or comes next, by the shard's clock; infinity if never.
        toggles: when it goes or comes after that, in seconds after the start.
        slow: it reads nothing for a while after each read.
        profile: its place in the run's list of profiles, 0 where there is none.
        times: what its profile charges, or None: then everything runs at the generator's speed.
        traffic: its simulated link, or None.
        answers: messages it has received.
        turns: inferences it has begun in a closed loop.
    """

    def __init__(self, number: int, owner: Owner) -> None:
        """Make a device that is not connected yet."""
        self.number = number
        self.transport: WSTransport | None = None
        self.flights: set[Flight] = set()
        self.waiting: list[Flight] = []
        self.opened_s = 0.0
        self.heard_s = 0.0
        self.moved = False
        self.number_of_stream = 0
        self.opening = 0
        self.hurried = False
        self.away = False
        self.toggle_s = math.inf
        self.toggles: Iterator[float] = iter(())
        self.slow = False
        self.profile = 0
        self.times: Times | None = None
        self.traffic: Traffic | None = None
        self.answers = 0
        self.turns = 0
        self._paused = False
        self._owner = owner
        self._fragments: list[bytes] = []

    def send(self, message: bytes) -> None:
        """Hand one message to the open stream."""
        if self.transport is not None:
            self.transport.send(WSMsgType.BINARY, message)

    def leave(self) -> None:
        """Close the stream, if there is one, as the protocol wants it."""
        if self.transport is not None:
            self.transport.send_close(WSCloseCode.OK)
            self.transport.disconnect()

    def drop(self) -> None:
        """Lose the stream, if there is one, as a broken link does."""
        if self.transport is not None:
            self.transport.disconnect(graceful=False)

    def is_silent(self, now: float, attempt_timeout_s: float) -> bool:
        """Whether the stream may have died without a sign: asked long ago, and nothing came."""
        return now - self.heard_s > SILENCE_S and any(
            flight.sent and not flight.held and now - flight.sent_s > attempt_timeout_s
            for flight in self.flights
        )

    def pause(self) -> bool:
        """Read nothing more until :meth:`resume`; return whether that is new."""
        if self._paused or self.transport is None:
            return False
        stream = self.transport.underlying_transport
        if stream.is_closing():
            return False
        stream.pause_reading()
        self._paused = True
        return True

    def resume(self, number_of_stream: int) -> None:
        """Read on, if the stream is still the one that was paused."""
        if self._paused and self.number_of_stream == number_of_stream:
            self._paused = False
            if self.transport is not None:
                stream = self.transport.underlying_transport
                if not stream.is_closing():
                    stream.resume_reading()

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Keep the stream."""
        self.transport = transport
        self.moved = self.hurried = self._paused = False
        self.number_of_stream += 1
        self._fragments.clear()
        self._owner.on_connected(self)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Put messages together and pass them on; a failure here ends the run, never hides."""
        try:
            kind = frame.msg_type
            if kind == WSMsgType.CLOSE:
                self.moved = frame.get_close_code() in _MOVED
                transport.send_close(WSCloseCode.OK)
                transport.disconnect()
            elif kind in (WSMsgType.BINARY, WSMsgType.CONTINUATION):
                # A copy: the frame's memory is reused as soon as this returns.
                body = frame.get_payload_as_bytes()
                if not frame.fin:
                    self._fragments.append(body)
                    return
                if self._fragments:
                    body = b"".join([*self._fragments, body])
                    self._fragments.clear()
                self._owner.on_message(self, body)
        except Exception as error:
            self._owner.on_crash(error)

    def pause_writing(self) -> None:
        """Go on: the load is open, whatever the cloud does."""

    def resume_writing(self) -> None:
        """See :meth:`pause_writing`."""

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Tell the shard, unless the stream was replaced already."""
        if transport is self.transport:
            self.transport = None
            self._owner.on_lost(self)
