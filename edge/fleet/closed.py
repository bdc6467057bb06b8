"""A closed loop: the next query leaves when the last is answered.

What it measures is how fast a cloud answers those who wait for it, and never how long a queue gets:
a cloud that stalls is asked nothing meanwhile, and one late answer stands for all that would have
been late (coordinated omission). So it says nothing about latency under load, and everything made
of it is labelled as closed loop. Its devices are as fast as this machine, in one process and loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from picows import WSCloseCode, WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from datamix import wire
from datamix.errors import AnswerError, ConfigError, DataMixError, Unavailable
from datamix.limits import raise_descriptor_limit
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.process import load
from edge.fleet.run import discover
from edge.fleet.terms import ECHO, agree
from edge.fleet.workload import Question, Sealed, Workload
from edge.promises import sentence

_PAUSE_S = 0.05  # after a failure: a cloud that refuses is not asked as fast as it can refuse
_SPARE_DESCRIPTORS = 64
_INPUTS = 1 << 16  # inferences that ask something of their own; later ones repeat them

Floats = npt.NDArray[np.float64]
Enough = Callable[[int, float], bool]
"""(queries answered, seconds since the start) -> whether the run may end."""


@dataclass(frozen=True, slots=True)
class Query:
    """One query as its device lived it; times in seconds since the start.

    Attributes:
        begun_s: when it was ready to leave.
        done_s: when the last of its inferences had ended.
        failed: whether any of them had no right answer.
    """

    begun_s: float
    done_s: float
    failed: bool

    @property
    def latency_s(self) -> float:
        """From the moment it left: there is no schedule that it could be late for."""
        return self.done_s - self.begun_s


@dataclass(slots=True)
class ClosedRun:
    """What a closed loop recorded.

    Attributes:
        model: the model's name.
        rows: rows per inference and round.
        lanes: queries under way at once.
        per_query: inferences per query.
        queries: in the order they ended.
        failed: inferences without a right answer, by HTTP status, or ``timeout``, ``connection``,
            ``answer``, ``wrong``.
        elapsed_s: from the start to the last answer.
        cpu_ratio: share of a core that this process used meanwhile.
        interrupted: Ctrl-C ended it.
        privacy: what the mode is worth, in one sentence.
    """

    model: str
    rows: int
    lanes: int
    per_query: int
    queries: list[Query] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0
    cpu_ratio: float = 0.0
    interrupted: bool = False
    privacy: str = ECHO

    @property
    def latencies_s(self) -> Floats:
        """(n,) of the queries that were answered right."""
        return np.array([query.latency_s for query in self.queries if not query.failed])


class _Stream(WSListener):
    """One device's stream: a message goes out, and its answer is a future."""

    def __init__(self) -> None:
        self._transport: WSTransport | None = None
        self._waiting: tuple[str, asyncio.Future[wire.Response]] | None = None
        self._parts: list[bytes] = []

    async def ask(self, message: bytes, request_id: str) -> wire.Response:
        """Send a message and wait for its answer.

        Raises:
            Unavailable: there is no stream, or it was lost.
            WireError: what came is no response.
        """
        if self._transport is None:
            raise Unavailable("the stream is closed, expected an open one")
        answer: asyncio.Future[wire.Response] = asyncio.get_running_loop().create_future()
        self._waiting = request_id, answer
        try:
            self._transport.send(WSMsgType.BINARY, message)
            return await answer
        finally:
            self._waiting = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.send_close(WSCloseCode.OK)
            self._transport.disconnect()

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._transport = None
        if self._waiting is not None and not self._waiting[1].done():
            self._waiting[1].set_exception(Unavailable("the stream was lost"))

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(WSCloseCode.OK)
            transport.disconnect()
        elif frame.msg_type in (WSMsgType.BINARY, WSMsgType.CONTINUATION):
            self._parts.append(frame.get_payload_as_bytes())
            if frame.fin:
                body, self._parts = b"".join(self._parts), []
                self._hear(body)

    def _hear(self, body: bytes) -> None:
        if self._waiting is None or self._waiting[1].done():
            return  # nobody waits any more: its time is over
        request_id, answer = self._waiting
        try:
            response = wire.decode_response(body)
        except DataMixError as error:
            answer.set_exception(error)
            return
        if response.request_id == request_id:
            answer.set_result(response)


class _Loop:
    """Lanes of queries over streams."""

    def __init__(self, config: FleetConfig, workload: Workload, run: ClosedRun, path: str) -> None:
        self._config = config
        self._workload = workload
        self._run = run
        self._path = path
        self._nonce = secrets.token_hex(4)
        self._index = 0
        self._start_s = 0.0

    async def drive(self, enough: Enough, on_query: Callable[[ClosedRun], None]) -> None:
        """Open all streams, then let every lane go on until it is enough."""
        run = self._run
        streams = [_Stream() for _ in range(run.lanes * run.per_query)]
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await asyncio.gather(*map(self._open, streams))
        except (TimeoutError, OSError, WSError) as error:
            raise Unavailable(
                f"not all of {len(streams)} streams were opened by {self._config.base_url}: "
                f"{error or 'too slow'}"
            ) from error
        self._start_s, cpu_s = time.monotonic(), time.process_time()
        lanes = [streams[first :: run.lanes] for first in range(run.lanes)]
        tasks = [asyncio.ensure_future(self._lane(lane, enough, on_query)) for lane in lanes]
        with _interruptible(tasks, run):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        run.elapsed_s = max(self._now(), 1e-9)
        run.cpu_ratio = (time.process_time() - cpu_s) / run.elapsed_s
        for stream in streams:
            stream.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def _now(self) -> float:
        return time.monotonic() - self._start_s

    async def _open(self, stream: _Stream) -> None:
        config = self._config
        await ws_connect(
            lambda: stream,
            config.stream_url(self._path),
            ssl_context=config.access.context(config.url),
            extra_headers=config.access.headers,
            max_frame_size=1 << 26,
        )

    async def _lane(
        self, streams: list[_Stream], enough: Enough, on_query: Callable[[ClosedRun], None]
    ) -> None:
        while not enough(len(self._run.queries), self._now()):
            begun_s = self._now()
            if len(streams) == 1:
                statuses = [await self._infer(streams[0])]
            else:
                statuses = await asyncio.gather(*map(self._infer, streams))
            failures = [status for status in statuses if status is not None]
            self._run.failed.update(failures)
            self._run.queries.append(Query(begun_s, self._now(), bool(failures)))
            on_query(self._run)
            if failures:
                await asyncio.sleep(_PAUSE_S)

    async def _infer(self, stream: _Stream) -> str | None:
        """One inference; None if it was answered right, else what became of it."""
        index, self._index = self._index, self._index + 1
        try:
            async with asyncio.timeout(self._config.timeout_s):
                if not stream.is_open:
                    await self._open(stream)
                return await self._rounds(stream, index)
        except TimeoutError:
            return "timeout"
        except AnswerError:
            return "answer"
        except (Unavailable, OSError, WSError):
            return "connection"
        except DataMixError:
            return "answer"

    async def _rounds(self, stream: _Stream, index: int) -> str | None:
        inference = self._workload.start(index % _INPUTS)
        question = next(inference)
        while True:
            request_id = f"{self._nonce}-{index:08x}-{question.block:x}"
            message = self._encode(question, request_id)
            response = await stream.ask(message, request_id)
            if response.status != result.OK:
                return str(response.status)
            if response.block != question.block:
                raise AnswerError(f"block {response.block}, expected {question.block}")
            try:
                question = inference.send(response)
            except StopIteration as end:
                return "wrong" if end.value.wrong else None

    def _encode(self, question: Question, request_id: str) -> bytes:
        deadline_s = self._config.timeout_s
        if isinstance(question, Sealed):
            return question.seal(request_id, deadline_s)
        return wire.encode_request(
            question.features,
            request_id=request_id,
            dtype=self._workload.dtype,
            block=question.block,
            deadline_s=deadline_s,
            step=question.step,
        )


@contextmanager
def _interruptible(tasks: Sequence[asyncio.Future[None]], run: ClosedRun) -> Iterator[None]:
    """Let Ctrl-C end the lanes, where this thread is the one that hears of it."""

    def stop() -> None:
        run.interrupted = True
        for task in tasks:
            task.cancel()

    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except (ValueError, RuntimeError, NotImplementedError):  # not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def closed_loop(
    config: FleetConfig,
    *,
    lanes: int,
    per_query: int,
    enough: Enough,
    on_query: Callable[[ClosedRun], None] = lambda run: None,
) -> ClosedRun:
    """Ask a cloud as fast as it answers; no message is sent twice.

    Args:
        config: the cloud and the workload; its rate, duration and number of devices are not read.
        lanes: queries under way at once.
        per_query: inferences per query, each on a stream of its own; all leave at once.
        enough: asked before each query whether the run may end.
        on_query: called after each query.

    Raises:
        ConfigError: the settings don't fit the cloud, the bundle or this machine, or the mode is
            split, whose masks nobody fetches ahead here.
        Unavailable: nobody answers, or not every stream was opened.
    """
    terms = agree(config)
    if terms is not None and terms.promise.mode == "split":
        raise ConfigError("a closed loop got the mode split, expected mix or bounded")
    config = dataclasses.replace(config, devices=lanes * per_query, processes=1)
    allowed = raise_descriptor_limit() - _SPARE_DESCRIPTORS
    if config.devices > allowed:
        raise ConfigError(
            f"{config.devices} streams were asked for, expected at most {allowed} in one process"
        )
    target = discover(config)
    workload = load(config, target, _INPUTS)
    run = ClosedRun(target.model, workload.rows, lanes, per_query)
    if terms is not None:
        run.privacy = sentence(terms.promise.text, terms.promise.known_break, terms.not_private)
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform == "linux":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_Loop(config, workload, run, target.path).drive(enough, on_query))
    return run
