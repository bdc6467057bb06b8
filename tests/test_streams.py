"""Open streams: what is in flight, who is cut off and when, and that goodbyes lose nothing."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from picows import WSCloseCode, WSMsgType
from picows.picows import _make_test_ws_frame
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from datamix import wire
from datamix.bundle import BlockShape
from datamix.errors import ConfigError
from datamix.tokens import authorization, digest
from deployments import streams as module
from deployments.config import Config
from deployments.metrics import Traffic
from deployments.streams import REASONS, Stream, Streams
from deployments.tokens import Tokens
from deployments.waiting import Job
from deployments.websocket import MAX_MESSAGE_BYTES, Messages, _Listener
from edge.client import Client
from tests.fake_device import SHAPES, FakeDevice, raw_inputs
from tests.real_cloud import (
    PATIENCE_S,
    SHAPE,
    Cloud,
    answer,
    ask,
    assert_echoes,
    message_of,
    rows_of,
    serving,
)

CONFIG = Config(
    engine="null",
    echo_shape=SHAPE,
    stream_idle_timeout_s=60,
    slow_reader_timeout_s=5,
    max_stream_buffer_bytes=1 << 20,
    max_stream_requests=3,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Socket:
    """picows' transport and the socket below it, as far as a stream looks at them."""

    def __init__(self) -> None:
        self.underlying_transport = self
        self.is_disconnected = False
        self.close_handshake: Any = None
        self.buffered = 0
        self.said: list[Any] = []  # everything, in order
        self.pongs = 0

    @property
    def reads(self) -> bool:
        """Whether it was last told to read."""
        flow = [word for word in self.said if word in ("pause", "resume")]
        return not flow or flow[-1] == "resume"

    def goodbye(self) -> Any:
        """The code of the close frame, None if none was sent."""
        return next((word for word in self.said if isinstance(word, WSCloseCode)), None)

    def aborted(self) -> bool:
        return "abort" in self.said

    def send_reuse_external_bytearray(self, kind: WSMsgType, frame: bytearray, at: int) -> None:
        assert not self.aborted(), "what is written after that is only complained about"
        self.said.append(bytes(frame[at:]))

    def send_close(self, code: WSCloseCode) -> None:
        self.said.append(code)

    def disconnect(self, graceful: bool = True) -> None:
        self.said.append("close" if graceful else "abort")

    def pause_reading(self) -> None:
        self.said.append("pause")

    def resume_reading(self) -> None:
        self.said.append("resume")

    def notify_user_specific_pong_received(self) -> None:
        self.pongs += 1

    def get_write_buffer_size(self) -> int:
        return self.buffered


class House:
    """Streams without a server, and without time passing."""

    def __init__(self, config: Config = CONFIG, tokens: Tokens | None = None) -> None:
        self.clock = Clock()
        self.traffic = Traffic()
        self.streams = Streams(config, self.traffic, tokens, self.clock)

    def open(self, token: bytes | None = None) -> tuple[Stream, Socket]:
        messages, socket = Messages(), Socket()
        messages.transport = socket  # type: ignore[assignment]
        stream = self.streams.open(messages, token)
        messages.on_message = lambda body: stream.enter()
        return stream, socket

    def after(self, seconds: float) -> float:
        """Let time pass and sweep."""
        self.clock.now += seconds
        return self.streams.sweep()


# --- idle ---------------------------------------------------------------------------------------


def test_a_stream_without_messages_is_told_goodbye() -> None:
    house = House()
    _, socket = house.open()
    house.after(59)
    assert not socket.said
    house.after(1)
    assert socket.goodbye() == WSCloseCode.GOING_AWAY
    assert socket.reads and not socket.aborted()


def test_messages_keep_a_stream_open_and_so_do_owed_answers() -> None:
    house = House()
    stream, socket = house.open()
    for _ in range(3):
        house.after(50)
        stream.messages.receive(b"one")
        stream.answer([b"answer"])
    stream.messages.receive(b"two")
    for _ in range(10):
        house.after(50)  # the engine takes its time
    stream.answer([b"late"])
    house.after(59)
    assert socket.goodbye() is None
    house.after(1)
    assert socket.goodbye() == WSCloseCode.GOING_AWAY


def test_no_timeout_no_goodbye() -> None:
    house = House(CONFIG.model_copy(update={"stream_idle_timeout_s": None}))
    _, socket = house.open()
    house.after(1e9)
    assert not socket.said


def test_what_comes_after_the_goodbye_is_dropped() -> None:
    house = House()
    stream, _ = house.open()
    house.after(60)
    stream.messages.receive(b"too late")
    assert stream.unanswered == 0


def test_a_peer_that_does_not_say_goodbye_is_cut_off() -> None:
    house = House()
    _, socket = house.open()
    house.after(60)
    for _ in range(3):
        house.after(module._DRAIN_S / 2)
    assert socket.aborted()
    assert [w for w in socket.said if isinstance(w, WSCloseCode)] == [WSCloseCode.GOING_AWAY]


def test_a_peer_that_says_goodbye_and_stays_is_cut_off() -> None:
    house = House()
    stream, socket = house.open()
    stream.messages.is_closing = True
    house.after(1)
    house.after(module._GOODBYE_S - 0.1)
    assert not socket.aborted()
    house.after(0.2)
    assert socket.aborted()
    house.streams.close(stream)
    assert house.traffic.streams_closed == {"peer": 1}


# --- slow readers -------------------------------------------------------------------------------


def test_a_peer_that_does_not_read_is_cut_off() -> None:
    house = House()
    stream, socket = house.open()
    stream.messages.full(True)
    assert not socket.reads
    house.after(1)
    house.after(4.9)
    assert not socket.aborted()
    house.after(0.1)
    assert socket.aborted()
    assert socket.goodbye() is None  # it would not be read
    house.streams.close(stream)
    assert house.traffic.streams_closed == {"slow_reader": 1}
    assert house.traffic.open_streams == len(house.streams) == 0


def test_a_peer_that_reads_in_time_stays() -> None:
    house = House()
    stream, socket = house.open()
    for _ in range(10):
        stream.messages.full(True)
        house.after(4)
        stream.messages.full(False)
        house.after(0.1)
    assert not socket.aborted() and socket.reads


def test_answers_beyond_the_bound_end_the_stream_at_once() -> None:
    house = House(CONFIG.model_copy(update={"max_stream_requests": 100}))
    stream, socket = house.open()
    job = Job(block=0, rows=None, done=print, deadline=None, priority=0)  # type: ignore[arg-type]
    stream.watch(job)
    for _ in range(50):
        stream.messages.receive(b"request")
    for number in range(1, 51):
        socket.buffered += 100_000
        if number == 2:
            stream.messages.full(True)
        stream.answer([bytes(100_000)])
        assert socket.aborted() == (number >= 11), number
    written = sum(len(word) for word in socket.said if isinstance(word, bytes))
    assert written == 11 * 100_000  # the bound of a MiB and one answer
    house.streams.close(stream)
    assert job.cancelled
    assert house.traffic.streams_closed == {"slow_reader": 1}


def test_a_peer_that_is_not_read_from_is_not_taken_for_dead() -> None:
    house = House()
    stream, socket = house.open()
    house.after(1)
    assert socket.pongs == 0  # it can be heard, so it has to answer pings itself
    for _ in range(3):
        stream.messages.receive(b"up to the limit")
    house.after(1)
    assert socket.pongs == 1
    for _ in range(3):
        stream.answer([b"answer"])
    house.after(1)
    assert socket.pongs == 1


# --- the end of a token --------------------------------------------------------------------------


def test_streams_end_with_their_token(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", Clock()
    path.write_text("alice-alice-alice\nbob-bob-bob-bob-bob\n")
    house = House(tokens=Tokens(str(path), clock))
    alice, bob = (digest(name.encode()) for name in ("alice-alice-alice", "bob-bob-bob-bob-bob"))
    stays, goes, known = house.open(alice)[1], house.open(bob)[1], house.open(None)[1]
    house.after(1)
    (tmp_path / "new").write_text("alice-alice-alice\n")
    (tmp_path / "new").rename(path)
    clock.now += 1.1
    house.after(1)
    assert goes.goodbye() == WSCloseCode.POLICY_VIOLATION
    assert not stays.said and not known.said
    for stream in list(house.streams):
        house.streams.close(stream)
    assert house.traffic.streams_closed == {"unauthorized": 1, "peer": 2}


# --- goodbyes that lose nothing -------------------------------------------------------------------


def test_a_stopping_server_answers_what_is_in_flight() -> None:
    async def go() -> None:
        house = House()
        stream, socket = house.open()
        stream.messages.receive(b"one")
        stream.messages.receive(b"two")
        stream.messages.on_stop()
        house.after(0.01)
        assert not socket.reads and socket.goodbye() is None
        stream.messages.receive(b"three")  # came in the same read
        stream.answer([b"1"])
        assert socket.goodbye() is None
        stream.answer([b"2"])
        assert socket.said == ["pause", b"1", b"2", WSCloseCode.SERVICE_RESTART, "resume"]
        house.streams.close(stream)
        assert house.traffic.streams_closed == {"stopped": 1}
        house.streams.stop()

    asyncio.run(go())


def test_an_engine_that_does_not_answer_does_not_hold_up_the_end() -> None:
    async def go() -> None:
        house = House()
        stream, socket = house.open()
        stream.messages.receive(b"one")
        stream.messages.on_stop()
        house.after(0.01)
        house.after(module._DRAIN_S - 0.1)
        assert socket.goodbye() is None
        house.after(0.2)
        assert socket.goodbye() == WSCloseCode.SERVICE_RESTART
        house.after(module._GOODBYE_S + 0.1)
        assert socket.aborted()
        house.streams.stop()

    asyncio.run(go())


def test_thousands_of_streams_do_not_stop_at_the_same_moment() -> None:
    async def go() -> None:
        house = House()
        sockets = [house.open() for _ in range(2000)]
        for stream, _ in sockets:
            stream.messages.on_stop()
            stream.messages.on_stop()  # who is told twice goes once
        gone = [0]
        while gone[-1] < 2000:
            assert house.after(0.1) <= 1
            gone.append(sum(socket.goodbye() is not None for _, socket in sockets))
        steps = [after - before for before, after in zip(gone, gone[1:], strict=False)]
        assert max(steps) <= 110 and len(steps) < 45
        house.streams.stop()

    asyncio.run(go())


def test_a_sweep_that_fails_is_told_and_swept_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    swept = 0

    def sweep() -> float:
        nonlocal swept
        swept += 1
        raise RuntimeError("secret")

    async def go() -> None:
        monkeypatch.setattr(module, "_SWEEP_S", 0.001)
        house = House()
        monkeypatch.setattr(house.streams, "sweep", sweep)
        house.streams.start()
        async with asyncio.timeout(PATIENCE_S):
            while swept < 3:
                await asyncio.sleep(0.001)
        house.streams.stop()

    asyncio.run(go())
    assert "a sweep over the streams failed: RuntimeError" in caplog.text
    assert "secret" not in caplog.text


# --- over sockets --------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep often."""
    monkeypatch.setattr(module, "_SWEEP_S", 0.01)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asyncio complains of writes to what is closed; nobody should have written."""
    yield
    assert "socket.send() raised exception" not in caplog.text


def run(test: Callable[[Cloud], Awaitable[None]], **changes: Any) -> None:
    async def go() -> None:
        async with serving(CONFIG.model_copy(update=changes)) as cloud:
            await test(cloud)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop that Ray uses
        runner.run(go())


async def goodbye_of(stream: ClientConnection) -> int | None:
    """Wait for the end of a stream; the code that the cloud gave, None for none."""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionClosed) as raised:
            while True:
                await stream.recv()
    return None if raised.value.rcvd is None else raised.value.rcvd.code


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_an_idle_stream_ends_properly(quick: None) -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            for seed in range(20):
                assert_echoes(await ask(stream, message_of(seed)), seed)
                await asyncio.sleep(0.02)
            assert await goodbye_of(stream) == 1001
        await until(lambda: cloud.backbone.traffic.streams_closed == {"idle": 1})
        assert cloud.backbone.stats()["streams_closed"] == {"idle": 1}

    run(test, stream_idle_timeout_s=0.2)


def big(seed: int) -> bytes:
    """A request of 300 kB."""
    return wire.encode_request(rows_of(seed, 4, (64, 24, 24)), request_id=f"r{seed}")


BIG = {"echo_shape": (64, 24, 24), "max_batch_rows": 512, "max_stream_requests": 100}


def test_a_peer_that_never_reads_is_cut_off(quick: None) -> None:
    """Its answers fill the buffers of both kernels, then ours; that much and no more."""

    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream, cloud.stream() as good:
            cloud.gate.close()
            (opened, _) = cloud.backbone.streams
            for seed in range(60):  # 18 MB, more than the kernels take
                await stream.send(big(seed))
            await until(lambda: opened.unanswered == 60)
            stream.transport.pause_reading()
            cloud.gate.open()
            await until(lambda: opened.messages.is_full)
            assert 0 < opened.messages.buffered_bytes < 60 * 300_000
            assert (await ask(good, big(99))).status == 200  # the others notice nothing
            await until(lambda: cloud.backbone.traffic.streams_closed == {"slow_reader": 1})
            stream.transport.abort()

    run(test, slow_reader_timeout_s=0.2, max_stream_buffer_bytes=64 << 20, **BIG)


def test_a_peer_for_whom_too_much_waits_is_cut_off_at_once() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            cloud.gate.close()
            (opened,) = cloud.backbone.streams
            for seed in range(60):
                await stream.send(big(seed))
            await until(lambda: opened.unanswered == 60)
            stream.transport.pause_reading()
            cloud.gate.open()
            await until(lambda: cloud.backbone.traffic.streams_closed == {"slow_reader": 1})
            stream.transport.abort()

    run(test, **BIG)


def test_nothing_is_buffered_beyond_one_read_while_the_stream_is_held() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            cloud.gate.close()
            messages = [message_of(seed, rows=100) for seed in range(3000)]  # 12 MB
            sending = asyncio.create_task(flood(stream, messages))
            (held,) = cloud.backbone.streams
            await until(lambda: held.unanswered == 3)
            await asyncio.sleep(0.3)  # for more to come, if anybody took it
            kept = [body for body in held.messages._backlog if body is not None]
            assert sum(map(len, kept)) <= 1 << 16
            assert held.unanswered == 3
            assert not sending.done()  # the peer feels it
            cloud.gate.open()
            for seed in range(3000):
                assert (await answer(stream)).request_id == f"r{seed}"
            await sending
            assert_echoes(await ask(stream, message_of(1)), 1)

    run(test, max_batch_rows=512)


async def flood(stream: ClientConnection, messages: list[bytes]) -> None:
    for message in messages:
        await stream.send(message)


def test_an_open_stream_ends_with_its_token(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.tokens._PERIOD_S", 0.01)
    path = tmp_path / "tokens"
    path.write_text("alice-alice-alice\nbob-bob-bob-bob-bob\n")

    def stream_of(cloud: Cloud, token: str) -> connect:
        url = f"ws://127.0.0.1:{cloud.port}/v2/models/echo/stream"
        return connect(url, additional_headers={"Authorization": authorization(token)}, proxy=None)

    async def test(cloud: Cloud) -> None:
        async with (
            stream_of(cloud, "alice-alice-alice") as alice,
            stream_of(cloud, "bob-bob-bob-bob-bob") as bob,
        ):
            assert_echoes(await ask(bob, message_of(0)), 0)
            (tmp_path / "new").write_text("alice-alice-alice\n")
            (tmp_path / "new").rename(path)
            assert await goodbye_of(bob) == 1008
            assert_echoes(await ask(alice, message_of(1)), 1)
            assert cloud.backbone.traffic.streams_closed == {"unauthorized": 1}

    run(test, tokens_file=str(path))


def test_a_server_that_stops_answers_and_says_goodbye(quick: None) -> None:
    async def go() -> None:
        async with AsyncExitStack() as outer:
            async with serving(CONFIG) as cloud:
                stream = await outer.enter_async_context(cloud.stream())
                cloud.gate.close()
                for seed in range(3):
                    await stream.send(message_of(seed))
                (opened,) = cloud.backbone.streams
                await until(lambda: opened.unanswered == 3)
            # `serving` opens the gate and stops the server, in this order and at once.
            for seed in range(3):
                assert_echoes(await answer(stream), seed)
            assert await goodbye_of(stream) == 1012
            assert cloud.backbone.traffic.streams_closed == {"stopped": 1}

    asyncio.run(go())


def test_peers_that_break_the_protocol_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "picows.server")

    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            stream.transport.write(b"\xff\xff\xff\xff")  # no opcode of WebSocket's
            await goodbye_of(stream)
        await until(lambda: cloud.backbone.traffic.streams_closed == {"error": 1})
        async with cloud.stream() as stream:
            mask = bytes(4)
            stream.transport.write(b"\x88\x80" + mask)  # a close frame without a code
            assert await goodbye_of(stream) == 1000
        await until(lambda: cloud.backbone.traffic.streams_closed == {"error": 1, "peer": 1})
        async with cloud.stream() as stream:
            size = struct.pack("!BBQ", 0x82, 0xFF, MAX_MESSAGE_BYTES + 1)
            stream.transport.write(size + mask)
            assert await goodbye_of(stream) == 1009
        await until(lambda: cloud.backbone.traffic.streams_closed == {"error": 2, "peer": 1})
        assert set(cloud.backbone.traffic.streams_closed) <= set(REASONS)

    run(test)


def test_a_message_of_many_fragments_costs_no_more_than_its_bytes() -> None:
    """A quarter of a million one-byte frames; to add their lengths up each time took hours."""
    received: list[bytes | None] = []
    messages, socket = Messages(), Socket()
    messages.on_message = received.append
    listener = _Listener(messages, lambda: None)
    first = _make_test_ws_frame(WSMsgType.BINARY, b"x", False, False)
    part = _make_test_ws_frame(WSMsgType.CONTINUATION, b"y", False, False)
    last = _make_test_ws_frame(WSMsgType.CONTINUATION, b"z", True, False)
    for frame in (first, *[part] * 250_000, last):
        listener.on_ws_frame(socket, frame)  # type: ignore[arg-type]
    assert received == [b"x" + b"y" * 250_000 + b"z"]
    whole = _make_test_ws_frame(WSMsgType.BINARY, bytes(MAX_MESSAGE_BYTES), False, False)
    listener.on_ws_frame(socket, whole)  # type: ignore[arg-type]
    assert socket.goodbye() is None
    listener.on_ws_frame(socket, part)  # type: ignore[arg-type]
    assert socket.goodbye() == WSCloseCode.MESSAGE_TOO_BIG


# --- rotation ------------------------------------------------------------------------------------


def test_the_oldest_share_goes_evenly_spread() -> None:
    async def go() -> None:
        house = House()
        sockets = [house.open()[1] for _ in range(10)]
        assert house.streams.rotate(0.5, 10) == 5
        gone = []
        for _ in range(11):
            house.after(0)
            gone.append(sum(socket.goodbye() is not None for socket in sockets))
            house.clock.now += 1
        assert gone == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
        codes = [socket.goodbye() for socket in sockets]
        assert codes == [WSCloseCode.SERVICE_RESTART] * 5 + [None] * 5
        for stream in list(house.streams):
            house.streams.close(stream)
        assert house.traffic.streams_closed == {"rotated": 5, "peer": 5}
        house.streams.stop()

    asyncio.run(go())


def test_the_next_sweep_comes_when_the_next_stream_goes() -> None:
    async def go() -> None:
        house = House()
        for _ in range(10):
            house.open()
        assert house.after(0) == module._SWEEP_S
        house.streams.rotate(1, 2)
        assert house.after(0) == pytest.approx(0.2)
        assert house.after(0.15) == pytest.approx(0.05)
        assert house.after(10) == module._SWEEP_S
        house.streams.stop()

    asyncio.run(go())


def test_a_stream_goes_once_at_its_earliest_turn_and_new_ones_stay() -> None:
    async def go() -> None:
        house = House()
        old = [house.open() for _ in range(4)]

        def gone() -> int:
            house.after(0)
            return sum(socket.goodbye() is not None for _, socket in old)

        for _ in range(3):
            assert house.streams.rotate(0.5, 10) == 2  # the same two
        _, new = house.open()
        house.clock.now += 4
        assert gone() == 1
        assert house.streams.rotate(1, 8) == 4  # who has said goodbye is not asked again
        house.clock.now += 1.5
        assert gone() == 2  # the second keeps its turn, which comes before that of the new plan
        house.clock.now += 8
        assert gone() == 4
        assert new.goodbye() is not None
        assert all(socket.said.count(WSCloseCode.SERVICE_RESTART) == 1 for _, socket in old)
        house.streams.stop()

    asyncio.run(go())


def test_a_server_that_stops_during_a_rotation() -> None:
    async def go() -> None:
        house = House()
        (busy, one), (waiting, two) = house.open(), house.open()
        busy.messages.receive(b"in flight")
        house.streams.rotate(0.5, 0)
        house.after(0)
        house.streams.rotate(1, 100)
        for stream in (busy, waiting):
            stream.messages.on_stop()
        house.after(0.01)
        assert (one.goodbye(), two.goodbye()) == (None, WSCloseCode.SERVICE_RESTART)
        busy.answer([b"answer"])
        assert one.said[-3:] == [b"answer", WSCloseCode.SERVICE_RESTART, "resume"]
        house.streams.stop()

    asyncio.run(go())


def test_who_leaves_before_its_turn_is_not_missed() -> None:
    async def go() -> None:
        house = House()
        (leaver, first), (_, second) = house.open(), house.open()
        house.streams.rotate(1, 10)
        house.streams.close(leaver)
        house.after(20)
        assert (first.goodbye(), second.goodbye()) == (None, WSCloseCode.SERVICE_RESTART)
        house.streams.stop()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("share", "within_s"),
    [(0, 1), (-0.1, 1), (1.1, 1), (float("nan"), 1), (1, -1), (1, float("inf")), (1, float("nan"))],
)
def test_rotations_that_make_no_sense(share: float, within_s: float) -> None:
    with pytest.raises(ConfigError):
        House().streams.rotate(share, within_s)


class EchoDevice(FakeDevice):
    """A device whose cloud echoes: de-mixing gives the features back."""

    def __init__(self) -> None:
        super().__init__(rounds=1)
        block = BlockShape(input_shape=SHAPES[0][0], output_shape=SHAPES[0][0])
        self.manifest = self.manifest.model_copy(update={"blocks": (block,)})

    def head(self, features: Any) -> Any:
        return features.reshape(len(features), -1)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_clients_survive_rotations_without_a_failure_or_a_retry(loop: str) -> None:
    """50 clients under constant load, a slow engine, all streams moved twice: nobody notices."""
    clients = 50
    device = EchoDevice()
    answered = 0

    async def load(client: Client, enough: asyncio.Event) -> None:
        nonlocal answered
        while not enough.is_set():
            inputs = raw_inputs(8, answered)
            outputs = await client.infer(inputs)
            expected = device.head(device.stem(device.preprocess(inputs)))
            assert np.abs(outputs - expected).max() < 0.01
            answered += 1

    async def go() -> None:
        config = Config(
            engine="emulated:0.004,0", echo_shape=SHAPES[0][0], max_batch_rows=128,
            max_stream_requests=4,
        )  # fmt: skip
        async with serving(config) as cloud, AsyncExitStack() as stack:
            some = [
                await stack.enter_async_context(Client(cloud.url, device)) for _ in range(clients)
            ]
            enough = asyncio.Event()
            busy = [asyncio.create_task(load(client, enough)) for client in some]
            traffic = cloud.backbone.traffic
            await until(lambda: traffic.open_streams == clients)
            own = cloud.backbone.stats()["replica"]
            assert await cloud.backbone.rotate_streams(1.0, 0.3, own) == 0
            assert await cloud.backbone.rotate_streams(1.0, 0.3) == clients
            await until(lambda: traffic.streams_closed["rotated"] == clients)
            await until(lambda: traffic.open_streams == clients)
            assert await cloud.backbone.rotate_streams(1.0, 0.0) == clients
            await until(lambda: traffic.streams_closed["rotated"] == 2 * clients)
            before = answered
            await until(lambda: answered > before + 2 * clients)
            enough.set()
            await asyncio.gather(*busy)
            assert [client.retries for client in some] == [0] * clients
            connections = [client.cloud.transport.connections for client in some]  # type: ignore[attr-defined]
            assert connections == [3] * clients
            # Each answer was asked for: nothing was computed twice.
            assert cloud.outcomes == {"ok": 2 * answered}

    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(go())
    assert answered > 3 * clients
