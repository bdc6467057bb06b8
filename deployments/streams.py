"""The open streams of a replica: what is in flight on each, and when and how each one ends.

One sweep a second looks at all of them, so that a message costs no timer and no look at the clock:

    idle           no message either way for ``stream_idle_timeout_s``: goodbye
    slow_reader    the peer reads nothing for ``slow_reader_timeout_s``: cut off. At once where more
                   than ``max_stream_buffer_bytes`` wait for it
    unauthorized   its token is no longer in the file: goodbye
    rotated        it was asked to go elsewhere: what is in flight is answered, then goodbye
    stopped        the replica stops: likewise

A goodbye is a close frame, whose code says whether to come again (docs/wire.md). A peer that does
not answer it is cut off after a while.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from picows import WSCloseCode

from datamix.errors import ConfigError
from deployments.waiting import Job

if TYPE_CHECKING:
    from deployments.config import Config
    from deployments.metrics import Traffic
    from deployments.tokens import Tokens
    from deployments.websocket import Messages

_SWEEP_S = 1.0
_DRAIN_S = 10.0  # for the answers to what is in flight, before the goodbye
_GOODBYE_S = 5.0  # for the peer's own
_STOP_STEP_S = 0.001  # between two streams when all must go: each is a handshake somewhere else

_CODES = {
    "idle": WSCloseCode.GOING_AWAY,
    "rotated": WSCloseCode.SERVICE_RESTART,
    "stopped": WSCloseCode.SERVICE_RESTART,
    "unauthorized": WSCloseCode.POLICY_VIOLATION,
}
# Why a stream ended, as the metric says it. Beside those above: the peer left, was cut off as it
# did not read, and broke the protocol or answered no ping.
REASONS = (*_CODES, "peer", "slow_reader", "error")

logger = logging.getLogger(__name__)


class Stream:
    """One WebSocket: its messages, and its requests that are not answered yet.

    Attributes:
        messages: the connection.
        token: digest of the token it was opened with, if any.
        opened_s: when it was opened.
        active_s: when the sweep last saw that a message came or was owed an answer.
        full_s: since when the sweep sees that the peer reads nothing; None while it reads.
        leaves_s: when it will be told to go elsewhere, as far as that is planned.
        reason: why it ends; "" as long as it does not.
        ends_s: when the next step of its end is due, whatever the peer does.
    """

    def __init__(
        self, messages: Messages, now: float, *, limit: int, max_bytes: int, token: bytes | None
    ) -> None:
        """Answer through ``messages``.

        Args:
            messages: the connection.
            now: the time.
            limit: while so many requests are unanswered, no more are read.
            max_bytes: bytes that may wait for the peer to read them.
            token: digest of the token it was opened with, if any.
        """
        self.messages = messages
        self.token = token
        self.opened_s = self.active_s = now
        self.full_s: float | None = None
        self.leaves_s = float("inf")
        self.reason = ""
        self.ends_s = float("inf")
        self._limit = limit
        self._max_bytes = max_bytes
        self._unanswered = 0
        self._jobs: set[Job] = set()

    @property
    def unanswered(self) -> int:
        """How many requests were read and not answered yet."""
        return self._unanswered

    def enter(self) -> None:
        """Count one more request; at the limit the peer is not read from any more."""
        self._unanswered += 1
        if self._unanswered == self._limit:
            self.messages.hold(True)

    def answer(self, parts: list[Any]) -> int:
        """Write one response, given in parts; return its bytes."""
        sent_bytes = self.messages.send(parts)
        if self.messages.is_full and self.messages.buffered_bytes > self._max_bytes:
            self.cut("slow_reader")
        self._unanswered -= 1
        if self._unanswered == self._limit - 1:
            self._go_on()
        return sent_bytes

    def watch(self, job: Job) -> None:
        """Remember a queued request, in case the peer leaves."""
        self._jobs.add(job)

    def forget(self, job: Job) -> None:
        """Let go of a request that is answered, and so of its message's memory."""
        self._jobs.discard(job)

    def abandon(self) -> None:
        """Cancel what is still queued: the peer is gone."""
        for job in self._jobs:
            job.cancelled = True

    def retire(self, reason: str, now: float) -> None:
        """Read no more, answer what is in flight, then say goodbye."""
        self.reason = reason
        self.ends_s = now + _DRAIN_S
        self.messages.hold(True)
        self._limit = 1  # so that answer() calls _go_on when nothing is left, and costs no more
        if not self._unanswered:
            self._go_on()

    def dismiss(self, reason: str, now: float) -> None:
        """Say goodbye at once; what is in flight is not answered."""
        self.reason = reason
        self.ends_s = now + _GOODBYE_S
        self.abandon()
        self.messages.close(_CODES[reason])

    def cut(self, reason: str) -> None:
        """End the connection without a word."""
        self.reason = reason
        self.messages.abort()

    def end(self, now: float) -> None:
        """Take the next step, as the last one took too long."""
        if self.messages.is_closing:
            self.messages.abort()
        else:
            self.dismiss(self.reason, now)

    def _go_on(self) -> None:
        if self.reason:
            self.messages.close(_CODES[self.reason])
        else:
            self.messages.hold(False)


class Streams:
    """All open streams, oldest first."""

    def __init__(
        self,
        config: Config,
        traffic: Traffic,
        tokens: Tokens | None,
        clock: Callable[[], float],
    ) -> None:
        """Watch over streams that are yet to come; :meth:`start` begins to sweep.

        Args:
            config: limits and timeouts.
            traffic: counts the open and the closed ones.
            tokens: who may stay; None for everybody.
            clock: seconds, monotonic.
        """
        self._config = config
        self._traffic = traffic
        self._tokens = tokens
        self._tokens_version = 0 if tokens is None else tokens.version
        self._clock = clock
        self._open: dict[Stream, None] = {}  # a set in the order of opening
        self._leaving: list[tuple[float, int, Stream, str]] = []  # a heap: when, which, why
        self._order = count()
        self._last_stop_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __iter__(self) -> Iterator[Stream]:
        """The open ones, oldest first."""
        return iter(self._open)

    def open(self, messages: Messages, token: bytes | None = None) -> Stream:
        """Add a stream that is about to be accepted."""
        stream = Stream(
            messages,
            self._clock(),
            limit=self._config.max_stream_requests,
            max_bytes=self._config.max_stream_buffer_bytes,
            token=token,
        )
        messages.on_stop = lambda: self._stop(stream)
        self._open[stream] = None
        self._traffic.open_streams += 1
        return stream

    def close(self, stream: Stream) -> None:
        """Remove a stream whose connection is gone, and count why."""
        del self._open[stream]
        stream.abandon()
        self._traffic.open_streams -= 1
        why = stream.reason or ("error" if stream.messages.is_broken else "peer")
        self._traffic.streams_closed[why] += 1

    # --- the timer ---

    def start(self) -> None:
        """Sweep every second from now on, on the running event loop."""
        self._arm(_SWEEP_S)

    def stop(self) -> None:
        """Sweep no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, delay_s: float) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        delay_s = _SWEEP_S
        try:
            delay_s = self.sweep()
        except Exception as error:  # the next sweep may work, and is needed all the more
            logger.error("a sweep over the streams failed: %s", type(error).__name__)
        self._arm(delay_s)

    # --- the sweep ---

    def sweep(self) -> float:
        """Do what is due with each stream; return in how many seconds the next sweep should be."""
        now = self._clock()
        self._check_tokens(now)
        while self._leaving and self._leaving[0][0] <= now:
            _, _, stream, reason = heapq.heappop(self._leaving)
            if stream in self._open and not stream.reason:
                stream.retire(reason, now)
        for stream in list(self._open):
            self._look(stream, now)
        return min(_SWEEP_S, self._leaving[0][0] - now) if self._leaving else _SWEEP_S

    def _look(self, stream: Stream, now: float) -> None:
        messages = stream.messages
        if messages.touched or stream.unanswered:
            messages.touched = False
            stream.active_s = now
        if messages.is_full:
            stream.full_s = now if stream.full_s is None else stream.full_s
            if now - stream.full_s >= self._config.slow_reader_timeout_s:
                stream.cut("slow_reader")
                return
        else:
            stream.full_s = None
        messages.excuse()
        if messages.is_closing and stream.ends_s == float("inf"):  # the peer said goodbye
            stream.ends_s = now + _GOODBYE_S
        idle_s = self._config.stream_idle_timeout_s
        if now >= stream.ends_s:
            stream.end(now)
        elif idle_s is not None and not stream.reason and now - stream.active_s >= idle_s:
            stream.retire("idle", now)

    def _check_tokens(self, now: float) -> None:
        if self._tokens is None:
            return
        self._tokens.refresh()
        if self._tokens.version == self._tokens_version:
            return
        self._tokens_version = self._tokens.version
        for stream in self._open:
            if stream.token is not None and not self._tokens.holds(stream.token):
                stream.dismiss("unauthorized", now)

    # --- goodbyes ---

    def rotate(self, share: float, within_s: float) -> int:
        """Move the oldest streams to wherever their devices are led next; return how many.

        Each is told when its turn comes, evenly spread, and answered first what is in flight. A
        stream that opens meanwhile stays. To ask twice moves nothing twice: a stream whose turn is
        planned keeps it, or gets the earlier one.

        Whenever replicas come or go, Ray reloads HAProxy, and the old worker cuts its streams
        after RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S (120), whatever is in flight: all streams, moved
        within that time, are not affected.

        Args:
            share: of the open streams, above 0 and at most 1.
            within_s: seconds until the last one is told; 0 for all at once.

        Raises:
            ConfigError: a number that makes no sense.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}, expected more than 0, at most 1")
        if not 0 <= within_s < math.inf:
            raise ConfigError(f"within_s is {within_s}, expected 0 or more, finite")
        staying = [stream for stream in self._open if not stream.reason]
        going = staying[: math.ceil(share * len(staying))]
        now = self._clock()
        for number, stream in enumerate(going):
            self._leave(stream, "rotated", now + within_s * number / len(going))
        if going:
            self._arm(0.0)
        return len(going)

    def _stop(self, stream: Stream) -> None:
        """The server stops: let the stream go, a little after the one before."""
        if stream.reason:
            return  # on its way already
        now = self._clock()
        self._last_stop_s = max(now, self._last_stop_s + _STOP_STEP_S)
        self._leave(stream, "stopped", self._last_stop_s)
        self._arm(max(0.0, self._leaving[0][0] - now))

    def _leave(self, stream: Stream, reason: str, at_s: float) -> None:
        if at_s < stream.leaves_s:  # else its turn in the heap comes first
            stream.leaves_s = at_s
            heapq.heappush(self._leaving, (at_s, next(self._order), stream, reason))
