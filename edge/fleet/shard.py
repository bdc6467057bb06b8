"""One process full of devices: sends what is due, takes what comes, writes it down.

The loop never waits for an answer before it sends the next inference (open loop). All inferences
have the same time to live, so their deadlines pass in the order they began, and one queue swept
every few milliseconds does for thousands of timers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from picows import WSError, ws_connect

from datamix import wire
from datamix.errors import AnswerError, TooLarge, Unavailable, WireError, from_status
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.device import FleetDevice, Flight, backoff_s
from edge.fleet.pacing import Schedule
from edge.fleet.settled import Settled, settled
from edge.fleet.workload import Workload
from edge.session import Round

_AT_ONCE = 16  # inferences begun in a row before answers get their turn
_SWEEP_S = 0.01
# uvloop's timers tick in milliseconds: asking for less would spin until the tick has come.
_TICK_S = 0.001
_RETRY_FLOOR = 100
_HANDSHAKE_S = 10.0
_SHORT_S = 0.1  # for a stream
_READ_BUFFER_BYTES = 1 << 16  # one answer in one read, without growing

# picows would write each handshake into a log that is verbose enough, and the token stands in it.
_quiet = logging.getLogger("picows.datamix")
_quiet.setLevel(logging.WARNING)


@dataclass(slots=True)
class Counters:
    """What does not belong to one inference, or is needed while the run goes on.

    Attributes:
        begun: inferences begun.
        ok: inferences answered right.
        failed: inferences that ended otherwise.
        requests_ok: messages answered with status 200 and what was asked.
        requests_in_window: of those, the ones before the last inference fell due.
        rows_in_window: their rows.
        requests_sent: messages sent, retries included.
        retries: messages sent again.
        reconnects: streams opened again.
        moved: messages sent again because the cloud had moved the stream unread, which is no retry.
        duplicates: second answers to a message that was answered.
        late: answers after the device had given up.
        misrouted: answers to a message that another device of this process sent.
        unmatched: answers to a message that nobody in this process sent.
        unreadable: messages that are no response at all.
    """

    begun: int = 0
    ok: int = 0
    failed: int = 0
    requests_ok: int = 0
    requests_in_window: int = 0
    rows_in_window: int = 0
    requests_sent: int = 0
    retries: int = 0
    reconnects: int = 0
    moved: int = 0
    duplicates: int = 0
    late: int = 0
    misrouted: int = 0
    unmatched: int = 0
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """What one shard did until now.

    Attributes:
        shard: which.
        elapsed_s: since the common start.
        connected: devices with an open stream.
        in_flight: inferences under way.
        counters: totals so far.
        latencies_s: of the inferences that were answered since the last progress.
        cpu_s: processor time since the common start.
        settled: the inferences that have ended since, in the order they were due.
    """

    shard: int
    elapsed_s: float
    connected: int
    in_flight: int
    counters: Counters
    latencies_s: list[float]
    cpu_s: float
    settled: Settled


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What one shard has to say at the end.

    Attributes:
        table: a row per inference that fell due (:mod:`edge.fleet.result`).
        answered: (seconds, 2) messages and rows answered in each second after the start.
        counters: totals.
        cpu_s: processor time from the common start to the end.
        busy_ratio: processor time per time, until the last inference had begun.
        window_s: for how long inferences fell due; shorter than asked for where interrupted.
        elapsed_s: until the last inference ended.
    """

    table: result.Table
    answered: npt.NDArray[np.int64]
    counters: Counters
    cpu_s: float
    busy_ratio: float
    window_s: float
    elapsed_s: float


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
    """

    config: FleetConfig
    model: str
    schedule: Schedule
    workload: Workload
    number: int = 0
    shards: int = 1
    clock: Callable[[], float] = time.monotonic
    table: result.Table = field(init=False)
    counters: Counters = field(init=False, default_factory=Counters)
    _devices: list[FleetDevice] = field(init=False)
    _column: dict[str, Any] = field(init=False)
    _answered: npt.NDArray[np.int64] = field(init=False)
    _flights: dict[str, Flight] = field(init=False, default_factory=dict)
    _deadlines: deque[Flight] = field(init=False, default_factory=deque)
    _latencies_s: list[float] = field(init=False, default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _nonce: str = field(init=False, default_factory=lambda: secrets.token_hex(4))
    _random: random.Random = field(init=False)
    _gate: asyncio.Semaphore = field(init=False)
    _done: asyncio.Future[None] = field(init=False)
    _start_s: float = field(init=False, default=float("inf"))
    _start_cpu_s: float = field(init=False, default=0.0)
    _headers: dict[str, str] = field(init=False, repr=False)
    _ssl: ssl.SSLContext | None = field(init=False)
    _window_s: float = field(init=False)
    _busy_ratio: float = field(init=False, default=0.0)
    _next: int = field(init=False, default=0)
    _under_way: int = field(init=False, default=0)
    _granted: int = field(init=False, default=0)
    _connected: int = field(init=False, default=0)
    _closing: bool = field(init=False, default=False)
    _settled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Allocate everything the run writes to."""
        config = self.config
        owned = range(self.number, config.devices, self.shards)
        self._devices = [FleetDevice(number, self) for number in owned]
        self.table = result.allocate(self.schedule, self.workload.rows)
        # Writing through a column's view costs half of writing through the row.
        self._column = {name: self.table[name] for name in result.COLUMNS.names or ()}
        self._answered = np.zeros((int(config.duration_s + config.timeout_s) + 2, 2), np.int64)
        self._random = random.Random(config.seed * self.shards + self.number)
        self._gate = asyncio.Semaphore(max(1, config.connect_at_once // self.shards))
        self._headers = config.access.headers
        self._ssl = config.access.context(config.url)
        self._window_s = config.duration_s
        self._done = asyncio.get_running_loop().create_future()

    # --- streams ------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open every device's stream, a bounded number at a time.

        Raises:
            Unavailable: not all of them are open within ``connect_timeout_s``.
        """
        deadline_s = self.clock() + self.config.connect_timeout_s
        outcomes = await asyncio.gather(
            *(self._open(device, deadline_s) for device in self._devices)
        )
        refused = [outcome for outcome in outcomes if outcome is not None]
        if refused:
            raise Unavailable(
                f"{len(refused)} of {len(self._devices)} devices got no stream from "
                f"{self.config.base_url} within {self.config.connect_timeout_s:g} s: {refused[0]}"
            )

    async def _open(self, device: FleetDevice, deadline_s: float) -> str | None:
        """Open one stream, with back-off; say why if it can't be done by then."""
        attempt = 0
        while True:
            async with self._gate:
                try:
                    await ws_connect(
                        lambda: device,
                        self.config.stream_url(self.model),
                        ssl_context=self._ssl,
                        extra_headers=self._headers,
                        logger_name=_quiet,
                        websocket_handshake_timeout=_HANDSHAKE_S,
                        max_frame_size=1 << 26,
                        read_buffer_init_size=_READ_BUFFER_BYTES,
                    )
                    return None
                except (TimeoutError, OSError, WSError) as error:
                    reason = str(error) or type(error).__name__
            attempt += 1
            pause_s = backoff_s(attempt, self._random)
            if self._closing or self.clock() + pause_s > deadline_s:
                return reason
            await asyncio.sleep(pause_s)

    async def _reopen(self, device: FleetDevice) -> None:
        # A cloud that sends a device away as soon as it comes is not asked again at once.
        if not device.moved or self.clock() - device.opened_s < _SHORT_S:
            await asyncio.sleep(backoff_s(1, self._random))
        if await self._open(device, float("inf")) is None:
            self.counters.reconnects += 1

    def on_connected(self, device: FleetDevice) -> None:
        """Send what waited for the stream."""
        self._connected += 1
        device.opened_s = self.clock()
        waiting, device.waiting = device.waiting, []
        for flight in waiting:
            if flight.inference is not None:
                self._send(flight)

    def on_lost(self, device: FleetDevice) -> None:
        """Keep the unanswered messages for the next stream, as far as the retry budget goes."""
        self._connected -= 1
        if self._closing:
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
        self._spawn(self._reopen(device))

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.on_crash(error)

    # --- the run ------------------------------------------------------------------------------

    async def run(self, start_s: float) -> ShardResult:
        """Send every inference when it is due, counted from ``start_s``; return when all ended."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        self._start_s = start_s
        await asyncio.sleep(max(0.0, start_s - self.clock()))
        self._start_cpu_s = time.process_time()
        self._pump()
        self._sweep()
        try:
            await self._done
        finally:
            elapsed_s = self.clock() - start_s
            cpu_s = time.process_time() - self._start_cpu_s
            await self._close()
        due = int(np.searchsorted(self.schedule.due_s, self._window_s, side="left"))
        return ShardResult(
            self.table[:due],
            self._answered,
            self.counters,
            cpu_s,
            self._busy_ratio,
            self._window_s,
            elapsed_s,
        )

    def stop(self) -> None:
        """Interrupt the run: nothing more falls due, what is under way is given up."""
        if self._done.done():
            return
        if np.isfinite(self._start_s):
            self._window_s = min(self._window_s, max(0.0, self.clock() - self._start_s))
        for flight in list(self._deadlines):
            if flight.inference is not None:
                self._end(flight, result.STOPPED)
        if self._next < len(self.schedule):
            due = int(np.searchsorted(self.schedule.due_s, self._window_s, side="left"))
            self._column["status"][self._next : due] = result.STOPPED
            self._next = len(self.schedule)
            self._measure_cpu()
        self._finish_if_over()

    def _measure_cpu(self) -> None:
        cpu_s = time.process_time() - self._start_cpu_s
        self._busy_ratio = cpu_s / max(1e-9, self.clock() - self._start_s)

    def progress(self) -> Progress:
        """Say what was done so far; hands over the latencies since the last call."""
        latencies_s, self._latencies_s = self._latencies_s, []
        started = self.clock() >= self._start_s
        return Progress(
            self.number,
            max(0.0, self.clock() - self._start_s) if started else 0.0,
            self._connected,
            self._under_way,
            self.counters,
            latencies_s,
            time.process_time() - self._start_cpu_s if started else 0.0,
            self._settle(),
        )

    def _settle(self) -> Settled:
        """Tell of the rows up to the oldest inference under way, since the last call."""
        due_s, end = self.schedule.due_s, self._next
        for flight in self._deadlines:
            if flight.inference is not None:
                end = flight.position
                break
        start, self._settled = self._settled, end
        until_s = float(due_s[end]) if end < len(due_s) else self._window_s
        return settled(self.table[start:end], until_s)

    def on_crash(self, error: Exception) -> None:
        """End the run: the simulator itself failed, and a report would be made up."""
        if not self._done.done():
            self._done.set_exception(error)

    def _on_loop_error(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError):
            return  # a broken socket: its stream reports itself lost
        self.on_crash(error if isinstance(error, Exception) else RuntimeError(context["message"]))

    async def _close(self) -> None:
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for device in self._devices:
            device.leave()
        for _ in range(100):  # a second is enough for sockets that still work
            if self._connected <= 0:
                break
            await asyncio.sleep(0.01)

    def _pump(self) -> None:
        """Begin what is due, then sleep until the next is."""
        due_s, loop = self.schedule.due_s, asyncio.get_running_loop()
        for _ in range(_AT_ONCE):
            if self._next >= len(due_s):
                self._finish_if_over()
                return
            wait_s = self._start_s + due_s[self._next] - self.clock()
            if wait_s > 0:
                loop.call_later(max(wait_s, _TICK_S), self._pump)
                return
            position, self._next = self._next, self._next + 1
            self._begin(position)
            if self._next == len(due_s):
                self._measure_cpu()
        loop.call_soon(self._pump)

    def _begin(self, position: int) -> None:
        due_s = self._start_s + self.schedule.due_s[position]
        device = self._devices[int(self.schedule.device[position]) // self.shards]
        flight = Flight(position, device, due_s + self.config.timeout_s)
        device.flights.add(flight)
        self._deadlines.append(flight)
        self._under_way += 1
        self.counters.begun += 1
        flight.inference = self.workload.start(int(self.schedule.index[position]))
        self._ask(flight, next(flight.inference))
        self._column["lag_s"][position] = self.clock() - due_s
        self._send(flight)

    def _ask(self, flight: Flight, question: Round) -> None:
        flight.block = question.block
        flight.request_id = f"{self._nonce}-{flight.position:x}-{question.block:x}"
        flight.sent = False
        flight.status = 0
        flight.message = wire.encode_request(
            question.features,
            request_id=flight.request_id,
            block=question.block,
            deadline_s=flight.deadline_s - self.clock(),
        )

    def _send(self, flight: Flight) -> None:
        device = flight.device
        if device.transport is None:
            device.waiting.append(flight)
            return
        position, column = flight.position, self._column
        if flight.status:
            flight.attempts += 1
            column["retries"][position] += 1
            self.counters.retries += 1
        elif flight.moved:
            self.counters.moved += 1
        elif flight.block == 0:
            column["sent_s"][position] = self.clock() - self._start_s
        flight.sent = True
        flight.moved = False
        self._flights[flight.request_id] = flight
        self.counters.requests_sent += 1
        column["bytes_up"][position] += len(flight.message)
        device.send(flight.message)

    def on_message(self, device: FleetDevice, body: bytes) -> None:
        """Match an answer to its question, and go on with that inference."""
        try:
            response = wire.decode_response(body)
        except (WireError, TooLarge):
            self.counters.unreadable += 1
            return
        flight = self._flights.get(response.request_id)
        if flight is None:
            self._count_stray(response.request_id)
            return
        if flight.device is not device:
            self.counters.misrouted += 1
            return
        del self._flights[response.request_id]
        self._column["bytes_down"][flight.position] += len(body)
        if response.status == result.OK:
            self._answer(flight, response)
        elif _is_retryable(response.status):
            self._retry(flight, response.status, response.retry_after_s)
        else:
            self._end(flight, response.status)

    def _answer(self, flight: Flight, response: wire.Response) -> None:
        position, column, inference = flight.position, self._column, flight.inference
        if inference is None:
            return
        try:
            if response.block != flight.block:
                raise AnswerError(f"block {response.block} answered, expected {flight.block}")
            question = inference.send(response)
        except StopIteration as end:
            self._count_answer(position, response)
            column["correct"][position] = end.value.correct
            column["correct_local"][position] = end.value.correct_local
            self._end(flight, result.WRONG if end.value.wrong else result.OK)
            return
        except AnswerError:
            self._end(flight, result.ANSWER)
            return
        self._count_answer(position, response)
        self._ask(flight, question)
        self._send(flight)

    def _count_answer(self, position: int, response: wire.Response) -> None:
        column, counters, rows = self._column, self.counters, len(response.features)
        column["rounds"][position] += 1
        column["queue_s"][position] += response.queue_s
        column["compute_s"][position] += response.compute_s
        column["batch_rows"][position] += response.batch_rows
        elapsed_s = self.clock() - self._start_s
        second = min(int(elapsed_s), len(self._answered) - 1)
        self._answered[second, 0] += 1
        self._answered[second, 1] += rows
        counters.requests_ok += 1
        if elapsed_s < self._window_s:
            counters.requests_in_window += 1
            counters.rows_in_window += rows

    def _count_stray(self, request_id: str) -> None:
        """An answer that nobody waits for: why?"""
        parts = request_id.split("-")
        if len(parts) != 3 or parts[0] != self._nonce:
            self.counters.unmatched += 1
            return
        try:
            status = self._column["status"][int(parts[1], 16)]
        except (ValueError, IndexError):
            self.counters.unmatched += 1
            return
        if status == result.TIMEOUT:
            self.counters.late += 1
        else:
            self.counters.duplicates += 1

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

    def _why_late(self, flight: Flight) -> int:
        """Name what kept an inference from its answer until the deadline."""
        if flight.sent and flight.request_id in self._flights:
            return result.TIMEOUT
        if flight.status:
            return flight.status
        never = np.isnan(self._column["sent_s"][flight.position])
        return result.UNSENT if never else result.CONNECTION

    def _end(self, flight: Flight, status: int) -> None:
        """Write down how an inference ended."""
        position = flight.position
        done_s = self.clock() - self._start_s
        self._column["done_s"][position] = done_s
        self._column["status"][position] = status
        if status == result.OK:
            self.counters.ok += 1
            self._latencies_s.append(done_s - float(self.schedule.due_s[position]))
        else:
            self.counters.failed += 1
        self._flights.pop(flight.request_id, None)
        flight.device.flights.discard(flight)
        if flight.inference is not None:
            flight.inference.close()
            flight.inference = None
        flight.message = b""
        self._under_way -= 1
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        over = self._next >= len(self.schedule) and self._under_way == 0
        if over and not self._done.done():
            self._done.set_result(None)


def _is_retryable(status: int) -> bool:
    return from_status(status, "").retryable
