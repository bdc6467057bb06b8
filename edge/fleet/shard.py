"""One process full of devices: sends what is due, takes what comes, writes it down.

In an open loop no inference waits for the answer to another. All inferences have the same time to
live, so their deadlines pass in the order they began, and one queue swept every few milliseconds
does for thousands of timers.

A device with a profile lives by its own time: what its processor and its link would take is added
to the moment at which an inference was due or an answer came in, and a timer waits for the sum.
What the generator itself needs meanwhile is part of that wait, and counts as lag only beyond it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datamix import wire
from datamix.errors import AnswerError, DataMixError, TooLarge, WireError, from_status
from edge.fleet import result
from edge.fleet.book import Book
from edge.fleet.config import FleetConfig
from edge.fleet.counters import Counters, Progress, ShardResult
from edge.fleet.device import FleetDevice, Flight, backoff_s
from edge.fleet.links import Traffic
from edge.fleet.offline import Offline
from edge.fleet.own_time import OwnTime
from edge.fleet.pacing import Schedule
from edge.fleet.profiles import assign
from edge.fleet.settled import Settled
from edge.fleet.stages import Stages
from edge.fleet.streams import Streams
from edge.fleet.timers import TICK_S, Timers
from edge.fleet.turns import Turns
from edge.fleet.workload import Inference, Question, Sealed, Workload

__all__ = ["Counters", "Progress", "Shard", "ShardResult"]

_AT_ONCE = 16  # inferences begun in a row before answers get their turn
_SWEEP_S = 0.01
_LISTEN_S = 0.5
_RETRY_FLOOR = 100


@dataclass(slots=True)
class Shard:
    """Devices ``number``, ``number + shards``, ... of the fleet, in this event loop.

    Attributes:
        config: the run.
        model: the model's name in the URL.
        schedule: what this shard's devices owe.
        workload: what they ask.
        number: which shard.
        shards: of how many.
        clock: seconds, the same in every process of this machine.
        offline: in the mode split, where the workload has its masks from; else None.
    """

    config: FleetConfig
    model: str
    schedule: Schedule
    workload: Workload
    number: int = 0
    shards: int = 1
    clock: Callable[[], float] = time.monotonic
    offline: Offline | None = None
    counters: Counters = field(init=False)
    _devices: list[FleetDevice] = field(init=False)
    _book: Book = field(init=False)
    _flights: dict[str, Flight] = field(init=False, default_factory=dict)
    _deadlines: deque[Flight] = field(init=False, default_factory=deque)
    _streams: Streams = field(init=False)
    _timers: Timers = field(init=False)
    _random: random.Random = field(init=False)
    _done: asyncio.Future[None] = field(init=False)
    _start_cpu_s: float = field(init=False, default=0.0)
    _busy_ratio: float = field(init=False, default=0.0)
    _next: int = field(init=False, default=0)
    _under_way: int = field(init=False, default=0)
    _granted: int = field(init=False, default=0)
    _distinct: int = field(init=False)
    _turns: Turns | None = field(init=False, default=None)
    _own_time: OwnTime = field(init=False)

    def __post_init__(self) -> None:
        """Allocate everything the run writes to."""
        config = self.config
        owned = range(self.number, config.devices, self.shards)
        self._devices = [FleetDevice(number, self) for number in owned]
        self._book = Book(self.schedule, self.workload.rows, config)
        self.counters = self._book.counters
        self._random = random.Random(config.seed * self.shards + self.number)
        self._timers = Timers(self.clock, self.on_crash)
        self._streams = Streams(
            config,
            self.model,
            self._devices,
            self.shards,
            self.counters,
            self._timers,
            self.clock,
            self._random,
            self._give_up,
            self.on_crash,
        )
        self._own_time = OwnTime(self, self._timers, self.clock)
        if self.schedule.closed is not None:
            law = self.schedule.closed
            self._turns = Turns(law, config, self._timers, self.clock, self)
        self._distinct = max(1, self.schedule.distinct)
        self._charge()
        self._done = asyncio.get_running_loop().create_future()

    def _charge(self) -> None:
        """Give each device its profile."""
        profiles, seed = self.config.profiles, self.config.seed
        if not profiles:
            return
        numbers = np.array([device.number for device in self._devices])
        places = assign(profiles, numbers, seed)
        for device, place in zip(self._devices, places.tolist(), strict=True):
            link = profiles[place].link
            device.profile = place
            device.times = profiles[place].times
            device.traffic = None if link is None else Traffic(link, seed)
        self._book.column["profile"][:] = places[self.table["device"] // self.shards]

    # --- streams ------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open the stream of every device that is there, a few at a time; fetch masks, if needed.

        Raises:
            Unavailable: not all of them are open within ``connect_timeout_s``.
            DataMixError: operator B could not be made to answer.
        """
        await self._streams.connect()
        if self.offline is not None:
            await self.offline.fill()

    def on_connected(self, device: FleetDevice) -> None:
        """Send what waited for the stream."""
        if not self._streams.on_connected(device):
            return
        waiting, device.waiting = device.waiting, []
        for flight in waiting:
            if flight.inference is not None:
                self._send(flight)

    def on_lost(self, device: FleetDevice) -> None:
        """Keep the unanswered messages for the next stream, as far as the retry budget goes."""
        if not self._streams.on_lost(device):
            return
        for flight in list(device.flights):
            if flight.sent and self._flights.pop(flight.request_id, None) is not None:
                if device.moved:
                    flight.moved = True
                    device.waiting.append(flight)
                    continue
                flight.status = result.CONNECTION
                if self._may_retry(flight):
                    device.waiting.append(flight)
                else:
                    self._end(flight, result.CONNECTION)
        self._streams.reopen(device)

    def _give_up(self, device: FleetDevice) -> None:
        """End what a device has under way: it goes."""
        device.waiting.clear()
        for flight in list(device.flights):
            self._end(flight, result.CANCELLED)

    # --- the run ------------------------------------------------------------------------------

    async def run(self, start_s: float) -> ShardResult:
        """Send every inference when it is due, counted from ``start_s``; return when all ended."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        self._book.start_s = start_s
        await asyncio.sleep(max(0.0, start_s - self.clock()))
        self._start_cpu_s = time.process_time()
        self._streams.start(start_s)
        if self._turns is None:
            self._pump()
        else:
            self._next = len(self.schedule)
            self._turns.start(start_s, self.schedule.due_s.tolist())
            self._timers.at(start_s + self.config.duration_s, self._measure_cpu)
            self._finish_if_over()
        self._sweep()
        self._listen()
        try:
            await self._done
        finally:
            elapsed_s = self.clock() - start_s
            cpu_s = time.process_time() - self._start_cpu_s
            self._timers.close()
            await self._streams.close()
            if self.offline is not None:
                await self.offline.close()
        return ShardResult(
            self._book.due(),
            self._book.answered(),
            self.counters,
            cpu_s,
            self._busy_ratio,
            self._book.window_s,
            elapsed_s,
            None if self.offline is None else self.offline.traffic(),
        )

    def stop(self) -> None:
        """Interrupt the run: nothing more falls due, what is under way is given up."""
        if self._done.done():
            return
        if np.isfinite(self._book.start_s):
            self._book.window_s = min(
                self._book.window_s, max(0.0, self.clock() - self._book.start_s)
            )
        for flight in list(self._deadlines):
            if flight.inference is not None:
                self._end(flight, result.STOPPED)
        if self._next < len(self.schedule):
            due = int(np.searchsorted(self.schedule.due_s, self._book.window_s, side="left"))
            self._book.column["status"][self._next : due] = result.STOPPED
            self._next = len(self.schedule)
            self._measure_cpu()
        if self._turns is not None:
            self._book.column["status"][self._turns.stop()] = result.STOPPED
            if self._book.window_s < self.config.duration_s:
                self._measure_cpu()
        self._finish_if_over()

    def _measure_cpu(self) -> None:
        cpu_s = time.process_time() - self._start_cpu_s
        self._busy_ratio = cpu_s / max(1e-9, self.clock() - self._book.start_s)

    def progress(self) -> Progress:
        """Say what was done so far; hands over the latencies since the last call."""
        started = self.clock() >= self._book.start_s
        return Progress(
            self.number,
            max(0.0, self.clock() - self._book.start_s) if started else 0.0,
            self._streams.connected,
            self._under_way,
            self.counters,
            self._book.take_latencies(),
            time.process_time() - self._start_cpu_s if started else 0.0,
            self._settle(),
        )

    def _settle(self) -> Settled:
        """Tell of the rows up to the oldest inference under way, since the last call."""
        under_way = (flight for flight in self._deadlines if flight.inference is not None)
        oldest = next(under_way, None)
        return self._book.settle(self._next if oldest is None else oldest.position)

    @property
    def elapsed_s(self) -> float:
        """Since the common start; 0 before it."""
        return max(0.0, self.clock() - self._book.start_s)

    @property
    def begun(self) -> int:
        """The place of the table from which on no row has begun."""
        return self._next if self.schedule.closed is None else self._book.rows

    def on_crash(self, error: Exception) -> None:
        """End the run: the simulator itself failed, and a report would be made up."""
        if not self._done.done():
            self._done.set_exception(error)

    def _on_loop_error(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError):
            return  # a broken socket: its stream reports itself lost
        self.on_crash(error if isinstance(error, Exception) else RuntimeError(context["message"]))

    def _pump(self) -> None:
        """Begin what is due, then sleep until the next is."""
        due_s, loop = self.schedule.due_s, asyncio.get_running_loop()
        for _ in range(_AT_ONCE):
            if self._next >= len(due_s):
                self._finish_if_over()
                return
            wait_s = self._book.start_s + due_s[self._next] - self.clock()
            if wait_s > 0:
                loop.call_later(max(wait_s, TICK_S), self._pump)
                return
            position, self._next = self._next, self._next + 1
            self._begin(position)
            if self._next == len(due_s):
                self._measure_cpu()
        loop.call_soon(self._pump)

    def _begin(self, position: int) -> None:
        column, config = self._book.column, self.config
        due_s = self._book.start_s + float(column["scheduled_s"][position])
        index = int(column["index"][position])
        device = self._devices[int(column["device"][position]) // self.shards]
        flight = Flight(position, index, device, due_s + config.timeout_s)
        device.flights.add(flight)
        self._deadlines.append(flight)
        self._under_way += 1
        self.counters.begun += 1
        if device.away and device.toggle_s > due_s:  # it has gone between the two
            column["lag_s"][position] = self.clock() - due_s
            self._end(flight, result.CANCELLED)
            return
        if config.cancel is not None and config.cancel.has(config.seed, index):
            self._timers.at(due_s + config.cancel.after_s, self._cancel, flight)
        flight.inference = self.workload.start(index % self._distinct)
        if self.offline is not None and not self.offline.ready:
            column["lag_s"][position] = self.clock() - due_s
            flight.status = result.MASKS
            self._streams.spawn(self._wait_for_masks(flight, self.offline))
            return
        self._ask_first(flight, flight.inference, due_s)

    async def _wait_for_masks(self, flight: Flight, offline: Offline) -> None:
        """Begin an inference when operator B has answered; nothing of it has left until then."""
        try:
            await offline.wait()
        except DataMixError:
            if flight.inference is not None:
                self._end(flight, result.MASKS)
            return
        if flight.inference is not None:
            # The wait was operator B's, and is no lag of the generator's; what was before it is.
            lag_s = float(self._book.column["lag_s"][flight.position])
            self._ask_first(flight, flight.inference, self.clock())
            self._book.column["lag_s"][flight.position] += lag_s

    def _ask_first(self, flight: Flight, inference: Inference, due_s: float) -> None:
        column, position, device = self._book.column, flight.position, flight.device
        stages = self.workload.stages
        if stages is not None:
            stages.clear()
        question = next(inference)
        if device.times is not None:
            column["lag_s"][position] = self.clock() - due_s  # until it has left
            column["stem_s"][position] = stem_s = device.times.stem_s or 0.0
            self._own_time.prepare(flight, question, due_s + stem_s, device.times)
            return
        if stages is not None:
            column["mix_s"][position] = stages.mix_s
        column["encode_s"][position] = self._ask(flight, question, None)
        column["lag_s"][position] = self.clock() - due_s
        self._hand_over(flight)

    def _ask(self, flight: Flight, question: Question, at_s: float | None) -> float:
        """Make a message, at a device's own time where it has one; return what that took."""
        begun_s = self.clock()
        left_s = flight.deadline_s - (begun_s if at_s is None else at_s)
        flight.block = block = question.block
        flight.request_id = self._book.request_id(flight.position, block)
        flight.sent = False
        flight.status = 0
        if isinstance(question, Sealed):
            flight.message = question.seal(flight.request_id, left_s)
        else:
            flight.message = wire.encode_request(
                question.features,
                request_id=flight.request_id,
                dtype=self.workload.dtype,
                block=block,
                deadline_s=left_s,
                step=question.step,
            )
        return self.clock() - begun_s

    def _send(self, flight: Flight) -> None:
        """Send a message, again or late: from now on, where the device has a link to go by."""
        if flight.device.times is None:
            self._hand_over(flight)
        else:
            self._own_time.set_out(flight, max(flight.ready_s, self.clock()))

    def _hand_over(self, flight: Flight) -> None:
        device = flight.device
        if device.transport is None:
            device.waiting.append(flight)
            return
        position, column = flight.position, self._book.column
        if flight.status:
            flight.attempts += 1
            column["retries"][position] += 1
            self.counters.retries += 1
        elif flight.moved:
            self.counters.moved += 1
        elif flight.block == 0:
            column["sent_s"][position] = self.clock() - self._book.start_s
        flight.sent = True
        flight.sent_s = self.clock()
        flight.moved = False
        self._flights[flight.request_id] = flight
        self.counters.requests_sent += 1
        column["bytes_up"][position] += len(flight.message)
        device.send(flight.message)

    def on_message(self, device: FleetDevice, body: bytes) -> None:
        """Match an answer to its question, and go on with that inference."""
        device.heard_s = self.clock()
        if device.slow:
            self._streams.on_read(device)
        try:
            response = wire.decode_response(body)
        except (WireError, TooLarge):
            self.counters.unreadable += 1
            return
        flight = self._flights.get(response.request_id)
        if flight is None:
            self._book.count_stray(response.request_id)
            return
        if flight.device is not device:
            self.counters.misrouted += 1
            return
        del self._flights[response.request_id]
        self._book.column["bytes_down"][flight.position] += len(body)
        if device.times is None:
            self._react(flight, response, 0.0)
            return
        there_s = self._own_time.come_down(flight, len(body))
        if response.status == result.OK and flight.block == self.workload.rounds - 1:
            # Nothing more is sent, so one wait will do for the link and for the device's steps.
            self._answer(flight, response, there_s)
        else:
            self._own_time.wait(flight, there_s, self._arrive, flight, response, there_s)

    def _arrive(self, flight: Flight, response: wire.Response, at_s: float) -> None:
        """Let an answer out of the simulated link."""
        flight.held = False
        if flight.inference is None:
            self.counters.late += 1
        else:
            self._react(flight, response, at_s)

    def _react(self, flight: Flight, response: wire.Response, at_s: float) -> None:
        if response.status == result.OK:
            self._answer(flight, response, at_s)
        elif _is_retryable(response.status):
            self._retry(flight, response.status, response.retry_after_s)
        else:
            self._end(flight, response.status)

    def _answer(self, flight: Flight, response: wire.Response, at_s: float) -> None:
        position, column, inference = flight.position, self._book.column, flight.inference
        if inference is None:
            return
        stages, times = self.workload.stages, flight.device.times
        if stages is not None:
            stages.clear()
        try:
            if response.block != flight.block:
                raise AnswerError(f"block {response.block} answered, expected {flight.block}")
            question = inference.send(response)
        except StopIteration as end:
            self._book.count_answer(position, response, self.clock())
            column["correct"][position] = end.value.correct
            column["correct_local"][position] = end.value.correct_local
            status = result.WRONG if end.value.wrong else result.OK
            if stages is not None or times is not None:
                at_s = self._restored_s(flight, at_s, last=True)
            if times is None:
                self._end(flight, status)
            else:
                self._own_time.wait(flight, at_s, self._end, flight, status, at_s)
            return
        except AnswerError:
            if times is None:
                self._end(flight, result.ANSWER)
            else:
                self._own_time.wait(flight, at_s, self._end, flight, result.ANSWER, at_s)
            return
        self._book.count_answer(position, response, self.clock())
        if stages is not None or times is not None:
            at_s = self._restored_s(flight, at_s, last=False)
        if times is not None:
            self._own_time.prepare(flight, question, at_s, times)
            return
        if stages is not None:
            column["mix_s"][position] += stages.mix_s
        column["encode_s"][position] += self._ask(flight, question, None)
        self._hand_over(flight)

    def _restored_s(self, flight: Flight, at_s: float, *, last: bool) -> float:
        """Book de-mixing, and the head after the last round; return when they are done."""
        stages, times, column = self.stages, flight.device.times, self._book.column
        demix_s, head_s = (0.0, 0.0) if stages is None else (stages.demix_s, stages.head_s)
        if times is not None and times.demix_s is not None:
            demix_s = times.demix_s
        if times is not None and times.head_s is not None:
            head_s = times.head_s
        column["demix_s"][flight.position] += demix_s
        if last:
            column["head_s"][flight.position] = head_s
            return at_s + demix_s + head_s
        return at_s + demix_s

    # --- failures -----------------------------------------------------------------------------

    def _may_retry(self, flight: Flight) -> bool:
        """Take one retry out of the inference's and the shard's budget, if both have one left."""
        first_sends = self.counters.requests_sent - self.counters.retries
        budget = _RETRY_FLOOR + self.config.retry_ratio * first_sends
        if flight.attempts >= self.config.max_retries or self._granted >= budget:
            return False
        # Counted when granted: many may wait for their turn at once.
        self._granted += 1
        return True

    def _retry(self, flight: Flight, status: int, retry_after_s: float | None) -> None:
        """Send the message again after a while, or give up with the status that it got."""
        pause_s = max(retry_after_s or 0.0, backoff_s(flight.attempts + 1, self._random))
        if self.clock() + pause_s >= flight.deadline_s or not self._may_retry(flight):
            self._end(flight, status)
            return
        flight.status = status
        flight.sent = False
        asyncio.get_running_loop().call_later(pause_s, self._resend, flight)

    def _resend(self, flight: Flight) -> None:
        if flight.inference is not None:
            self._send(flight)

    def _sweep(self) -> None:
        """End what has passed its deadline; runs until the run is over."""
        now = self.clock()
        deadlines = self._deadlines
        while deadlines and (deadlines[0].inference is None or deadlines[0].deadline_s <= now):
            flight = deadlines.popleft()
            if flight.inference is not None:
                self._end(flight, self._why_late(flight))
        if not self._done.done():
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _listen(self) -> None:
        """Drop streams that seem to be dead, as a client does; runs until the run is over.

        A host that lost its power says no goodbye, and TCP waits for it for many minutes.
        """
        now = self.clock()
        for device in self._devices:
            if device.flights and device.is_silent(now, self.config.attempt_timeout_s):
                device.drop()
        if not self._done.done():
            asyncio.get_running_loop().call_later(_LISTEN_S, self._listen)

    def _why_late(self, flight: Flight) -> int:
        """Name what kept an inference from its answer until the deadline."""
        if flight.held or (flight.sent and flight.request_id in self._flights):
            return result.TIMEOUT
        if flight.status:
            return flight.status
        never = np.isnan(self._book.column["sent_s"][flight.position])
        return result.UNSENT if never else result.CONNECTION

    def _cancel(self, flight: Flight) -> None:
        if flight.inference is not None:
            self._end(flight, result.CANCELLED)

    def _end(self, flight: Flight, status: int, at_s: float | None = None) -> None:
        """Write down how an inference ended, now or at ``at_s``; nothing ends twice."""
        if flight.ended:
            return
        flight.ended = True
        position, device = flight.position, flight.device
        done_s = self._book.end(position, status, self.clock() if at_s is None else at_s)
        self._flights.pop(flight.request_id, None)
        device.flights.discard(flight)
        if flight.inference is not None:
            flight.inference.close()
            flight.inference = None
        flight.message = b""
        self._under_way -= 1
        if self._turns is not None:
            self._turns.think(device, done_s)
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        over = self._next >= len(self.schedule) and self._under_way == 0
        if self._turns is not None and self._turns.waiting:
            return
        if over and not self._done.done():
            self._done.set_result(None)

    # --- for closed loops and devices with a time of their own -------------------------------

    @property
    def column(self) -> dict[str, Any]:
        """The table's columns, as long as the table does not grow."""
        return self._book.column

    @property
    def table(self) -> result.Table:
        """A row per inference, some of them owed by nobody yet."""
        return self._book.table

    @property
    def stages(self) -> Stages | None:
        """What really ran in the workload since it was cleared; None where nothing does."""
        return self.workload.stages

    def ask(self, flight: Flight, question: Question, at_s: float) -> float:
        """Make a message at the device's time ``at_s``; return what that really took."""
        return self._ask(flight, question, at_s)

    def hand_over(self, flight: Flight) -> None:
        """Send a message by the real stream."""
        self._hand_over(flight)

    def begin(self, position: int) -> None:
        """Begin the inference of a row, which is due."""
        self._begin(position)

    def add_row(self, device: FleetDevice, due_s: float) -> int:
        """Make a row for what a device owes next; return its position."""
        return self._book.add(device, due_s)

    def move_row(self, position: int, due_s: float) -> None:
        """Let a row fall due at another time, or never at infinity."""
        self._book.column["scheduled_s"][position] = due_s

    def owner(self, position: int) -> FleetDevice:
        """The device that owes a row."""
        return self._devices[int(self._book.column["device"][position]) // self.shards]

    def on_nothing_due(self) -> None:
        """A row fell away; maybe it was the last."""
        self._finish_if_over()


def _is_retryable(status: int) -> bool:
    return from_status(status, "").retryable
