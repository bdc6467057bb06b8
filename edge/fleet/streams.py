"""The streams of one shard's devices: opened, opened again when lost, and dropped in storms.

Here too are the devices that come and go, and those that read slowly: all of it is about streams
and nothing about inferences.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from picows import WSError, ws_connect

from datamix.errors import Unavailable
from edge.fleet.behaviour import Storm
from edge.fleet.config import FleetConfig
from edge.fleet.counters import Counters
from edge.fleet.device import FleetDevice, backoff_s
from edge.fleet.timers import Timers

_HANDSHAKE_S = 10.0
_SHORT_S = 0.1  # for a stream
_READ_BUFFER_BYTES = 1 << 16  # one answer in one read, without growing

# picows would write each handshake into a log that is verbose enough, and the token stands in it.
_quiet = logging.getLogger("picows.datamix")
_quiet.setLevel(logging.WARNING)


class Streams:
    """Keeps every device that is there connected.

    Attributes:
        connected: devices with an open stream.
        closing: the run is over, and what is lost now is not opened again.
    """

    def __init__(
        self,
        config: FleetConfig,
        model: str,
        devices: Sequence[FleetDevice],
        shards: int,
        counters: Counters,
        timers: Timers,
        clock: Callable[[], float],
        generator: random.Random,
        give_up: Callable[[FleetDevice], None],
        on_crash: Callable[[Exception], None],
    ) -> None:
        """Take what the shard has; ``give_up`` ends a device's inferences when it goes."""
        self.connected = 0
        self.closing = False
        self._config = config
        self._model = model
        self._devices = devices
        self._counters = counters
        self._timers = timers
        self._clock = clock
        self._random = generator
        self._give_up = give_up
        self._on_crash = on_crash
        self._gate = asyncio.Semaphore(max(1, config.connect_at_once // shards))
        self._headers = config.access.headers
        self._ssl = config.access.context(config.url)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start_s = 0.0
        seed, law, slow = config.seed, config.churn, config.slow_readers
        for device in devices:
            if law is not None:
                device.away = not law.starts_on(seed, device.number)
                device.toggles = law.toggles(seed, device.number)
            device.slow = slow is not None and slow.has(seed, device.number)

    async def connect(self) -> None:
        """Open the stream of every device that is there, a bounded number at a time.

        Raises:
            Unavailable: not all of them are open within ``connect_timeout_s``.
        """
        config = self._config
        deadline_s = self._clock() + config.connect_timeout_s
        there = [device for device in self._devices if not device.away]
        outcomes = await asyncio.gather(*(self._open(device, deadline_s) for device in there))
        refused = [outcome for outcome in outcomes if outcome is not None]
        if refused:
            raise Unavailable(
                f"{len(refused)} of {len(there)} devices got no stream from "
                f"{config.base_url} within {config.connect_timeout_s:g} s: {refused[0]}"
            )

    def start(self, start_s: float) -> None:
        """Let devices come and go, and storms break out, counted from ``start_s``."""
        self._start_s = start_s
        if self._config.churn is not None:
            for device in self._devices:
                device.toggle_s = start_s + next(device.toggles)
                self._timers.at(device.toggle_s, self._toggle, device)
        for number, storm in enumerate(self._config.storms):
            self._timers.at(start_s + storm.at_s, self._break_out, number, storm)

    async def close(self) -> None:
        """Close every stream and end every task."""
        self.closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for device in self._devices:
            device.leave()
        for _ in range(100):  # a second is enough for sockets that still work
            if self.connected <= 0:
                break
            await asyncio.sleep(0.01)

    def on_connected(self, device: FleetDevice) -> bool:
        """Count a stream; return whether its device still wants it."""
        self.connected += 1
        device.opened_s = self._clock()
        if device.away:
            device.leave()
        return not device.away

    def on_lost(self, device: FleetDevice) -> bool:
        """Count a stream that is gone; return whether its device wants another."""
        self.connected -= 1
        if device.traffic is not None:
            device.traffic.reset()
        return not (self.closing or device.away)

    def reopen(self, device: FleetDevice) -> None:
        """Give a device another stream."""
        self.spawn(self._reopen(device))

    def on_read(self, device: FleetDevice) -> None:
        """Let a slow device read nothing for a while."""
        slow = self._config.slow_readers
        if slow is not None and device.pause():
            until_s = self._clock() + slow.pause_s
            self._timers.at(until_s, device.resume, device.number_of_stream)

    async def _open(self, device: FleetDevice, deadline_s: float, gated: bool = True) -> str | None:
        """Open one stream, with back-off; say why if it can't be done by then."""
        attempt = 0
        device.opening += 1
        try:
            while not device.away:
                if gated:
                    async with self._gate:
                        reason = await self._try(device)
                else:
                    reason = await self._try(device)
                attempt += 1
                pause_s = backoff_s(attempt, self._random)
                if reason is None or self.closing or self._clock() + pause_s > deadline_s:
                    return reason
                await asyncio.sleep(pause_s)
        finally:
            device.opening -= 1
        return "the device has gone"

    async def _try(self, device: FleetDevice) -> str | None:
        count = device.number_of_stream
        try:
            await ws_connect(
                lambda: device,
                self._config.stream_url(self._model, device.number),
                ssl_context=self._ssl,
                extra_headers=self._headers,
                logger_name=_quiet,
                websocket_handshake_timeout=_HANDSHAKE_S,
                max_frame_size=1 << 26,
                read_buffer_init_size=_READ_BUFFER_BYTES,
            )
        except (TimeoutError, OSError, WSError) as error:
            return str(error) or type(error).__name__
        if device.number_of_stream == count:  # picows says so nowhere else
            return "the cloud hung up instead of opening a stream"
        return None

    async def _reopen(self, device: FleetDevice) -> None:
        device.opening += 1
        try:
            # A cloud that sends a device away as soon as it comes is not asked again at once.
            short = self._clock() - device.opened_s < _SHORT_S
            if not device.hurried and (not device.moved or short):
                await asyncio.sleep(backoff_s(1, self._random))
            if await self._open(device, float("inf"), gated=not device.hurried) is None:
                self._counters.reconnects += 1
        finally:
            device.opening -= 1

    def _toggle(self, device: FleetDevice) -> None:
        """Let a device go or come, and say when it will do so next."""
        device.toggle_s = self._start_s + next(device.toggles)
        self._timers.at(device.toggle_s, self._toggle, device)
        device.away = not device.away
        if device.away:
            self._counters.left += 1
            self._give_up(device)
            device.leave()
            return
        self._counters.came += 1
        # Otherwise a stream is closing or a task is at it, and will see that the device is back.
        if device.transport is None and not device.opening:
            self.spawn(self._open(device, float("inf")))

    def _break_out(self, number: int, storm: Storm) -> None:
        for device in self._devices:
            hit = storm.hits(self._config.seed, device.number, number)
            if hit and device.transport is not None:
                self._counters.dropped += 1
                device.hurried = True
                device.drop()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Let a task run until the streams are closed; if it fails, the run has failed."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._on_crash(error)
