"""The SDK against clouds that answer right, late, twice, wrong or not at all."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from datamix import wire
from datamix.errors import (
    AnswerError,
    BundleError,
    ConfigError,
    DataMixError,
    DeadlineExceeded,
    NonFinite,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    WireError,
)
from edge import client as client_module
from edge import requester as requester_module
from edge.client import Client, ClientConfig, RetryBudget, SyncClient
from edge.transport import InProcessTransport, StreamTransport, Transport
from tests.asynchronous import asynchronous
from tests.fake_cloud import Connection, FakeCloud, echo, running
from tests.fake_device import CLASSES, GROUP, INPUT, SHAPES, FakeDevice, compute, raw_inputs
from tests.fake_http import FakeHttp, Received, Reply

Array = npt.NDArray[Any]

COUNTS = [0, 1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 2]


def answer(request: wire.Request) -> bytes:
    """What an honest cloud answers."""
    rows = wire.dequantise(request.features, request.scale)
    return echo(request, features=compute(request.block, rows))


def honest(connection: Connection, request: wire.Request) -> None:
    connection.send(answer(request))


async def in_process(message: bytes) -> bytes:
    return answer(wire.decode_request(message))


def close_to(outputs: Array, expected: Array) -> bool:
    """Equal but for the rounding of two trips in float16."""
    return outputs.shape == expected.shape and bool(np.all(np.abs(outputs - expected) < 0.01))


class Scripted:
    """A transport whose answers are a function of the attempt, and that remembers what it sent.

    ``script(request, attempt)`` gives a message, or raises; attempts count from 1 per request id.
    """

    def __init__(self, script: Callable[[wire.Request, int], bytes]) -> None:
        self._script = script
        self.sent: dict[str, list[bytes]] = {}
        self.timeouts: list[float] = []
        self.under_way = self.most_under_way = 0

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        attempts = self.sent.setdefault(request_id, [])
        attempts.append(message)
        self.timeouts.append(timeout_s)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(0)
            request = wire.decode_request(message)
            return wire.decode_response(self._script(request, len(attempts)))
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        pass

    @property
    def attempts(self) -> int:
        return sum(map(len, self.sent.values()))


def refusing(status: int, *, retry_after_s: float | None = None) -> Callable[..., bytes]:
    return lambda request, attempt: wire.encode_error(
        request.request_id, status, "the cloud's own words", retry_after_s=retry_after_s
    )


class Clock:
    """Stands in for the client's ``time`` and ``asyncio``: sleep takes no time, and is noted."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    for module in (client_module, requester_module):
        monkeypatch.setattr(module, "time", stand_in)
        monkeypatch.setattr(module, "asyncio", stand_in)
    return stand_in


# --- any number of inputs -----------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
@asynchronous
async def test_any_number_of_inputs_gives_as_many_outputs(count: int) -> None:
    device, transport = FakeDevice(), Scripted(lambda request, attempt: answer(request))
    async with Client(transport, device) as client:
        outputs = await client.infer(raw_inputs(count))
    assert outputs.dtype == np.float32
    assert outputs.shape == (count, CLASSES)
    assert close_to(outputs, device.local(raw_inputs(count)))
    groups = -(-count // GROUP)
    assert transport.attempts == 2 * groups
    requests = [wire.decode_request(m) for sent in transport.sent.values() for m in sent]
    assert all(request.rows == GROUP for request in requests)  # the last group is filled up
    assert (client.retries, client.bytes_up) == (
        0,
        sum(len(m) for sent in transport.sent.values() for m in sent),
    )


@pytest.mark.parametrize("count", COUNTS)
@asynchronous
async def test_any_number_of_inputs_over_a_stream(count: int) -> None:
    cloud, device = FakeCloud(honest), FakeDevice()
    async with cloud.serve(), Client(cloud.url, device) as client:
        assert close_to(await client.infer(raw_inputs(count)), device.local(raw_inputs(count)))
    assert cloud.streams == (1 if count else 0)


@pytest.mark.parametrize("dtype", wire.DTYPES)
@asynchronous
async def test_every_value_type_of_the_wire_will_do(dtype: wire.Dtype) -> None:
    device, seen = FakeDevice(), []

    def script(request: wire.Request, attempt: int) -> bytes:
        seen.append(request.dtype)
        return answer(request)

    client = Client(Scripted(script), device, config=ClientConfig(wire_dtype=dtype))
    outputs = await client.infer(raw_inputs(6))
    assert np.abs(outputs - device.local(raw_inputs(6))).max() < 0.05
    assert set(seen) == {dtype}


@asynchronous
async def test_a_request_says_what_it_is_about_and_no_more() -> None:
    transport = Scripted(lambda request, attempt: answer(request))
    await Client(transport, FakeDevice(), config=ClientConfig(timeout_s=7)).infer(raw_inputs(9))
    assert len(transport.sent) == 6  # every round has an id of its own
    blocks = []
    for request_id, (message,) in transport.sent.items():
        request = wire.decode_request(message)
        assert request.request_id == request_id
        assert (request.model, request.model_version) == ("echo", "1")
        assert request.deadline_s is not None
        assert 6 < request.deadline_s <= 7
        assert request.features.shape == (GROUP, *SHAPES[request.block][0])
        blocks.append(request.block)
        schema = pa.ipc.open_stream(message).schema
        assert {key.decode() for key in schema.metadata} <= {
            f"datamix.{key}"
            for key in ("protocol", "request_id", "model", "model_version", "block", "deadline_ms")
        }
    assert sorted(blocks) == [0, 0, 0, 1, 1, 1]


@asynchronous
async def test_the_same_inputs_twice_never_send_the_same_values() -> None:
    transport = Scripted(lambda request, attempt: answer(request))
    client = Client(transport, FakeDevice())
    for _ in range(2):
        await client.infer(raw_inputs(1))
    first = [m for sent in transport.sent.values() for m in sent]
    values = {wire.decode_request(m).features.tobytes() for m in first}
    assert len(values) == len(first) == 4


@asynchronous
async def test_groups_that_finish_in_any_order_come_out_in_order() -> None:
    held: list[tuple[Connection, bytes]] = []

    def backwards(connection: Connection, request: wire.Request) -> None:
        held.append((connection, answer(request)))
        if len(held) % 4 == 0:  # four groups, each in the same round
            for waiting, message in reversed(held[-4:]):
                waiting.send(message)

    cloud, device = FakeCloud(backwards), FakeDevice()
    async with cloud.serve(), Client(cloud.url, device) as client:
        inputs = raw_inputs(4 * GROUP)
        assert close_to(await client.infer(inputs), device.local(inputs))


@asynchronous
async def test_two_inferences_at_once_on_one_client() -> None:
    def shuffled(connection: Connection, request: wire.Request) -> None:
        delay_s = 0.001 * (connection.cloud.requests * 7 % 5)
        connection.later(delay_s, answer(request))

    cloud, device = FakeCloud(shuffled), FakeDevice()
    async with cloud.serve(), Client(cloud.url, device) as client:
        inputs = [raw_inputs(10, seed) for seed in range(5)]
        outputs = await asyncio.gather(*[client.infer(i) for i in inputs])
        for given, got in zip(inputs, outputs, strict=True):
            assert close_to(got, device.local(given))
    assert cloud.streams == 1


@asynchronous
async def test_duplicates_and_strangers_change_nothing() -> None:
    def chatty(connection: Connection, request: wire.Request) -> None:
        connection.send(echo(request, request_id="stranger"))
        connection.send(answer(request))
        connection.send(echo(request, features=np.zeros((GROUP, *SHAPES[request.block][1]))))

    cloud, device = FakeCloud(chatty), FakeDevice()
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        async with Client(transport, device) as client:
            assert close_to(await client.infer(raw_inputs(9)), device.local(raw_inputs(9)))
            async with asyncio.timeout(5):
                while transport.unmatched < 12:  # two of them for each of six requests
                    await asyncio.sleep(0.001)
    assert transport.unmatched == 12


@asynchronous
async def test_no_more_groups_are_under_way_than_allowed() -> None:
    transport = Scripted(lambda request, attempt: answer(request))
    client = Client(transport, FakeDevice(), config=ClientConfig(max_groups=3))
    await asyncio.gather(client.infer(raw_inputs(40)), client.infer(raw_inputs(40)))
    assert transport.most_under_way == 3


# --- retries ------------------------------------------------------------------------------------


@asynchronous
async def test_a_dropped_connection_is_opened_again_and_the_same_request_sent() -> None:
    dropped: set[int] = set()

    def drops_twice(connection: Connection, request: wire.Request) -> None:
        if request.block not in dropped:
            dropped.add(request.block)
            connection.drop()
        else:
            honest(connection, request)

    cloud, device = FakeCloud(drops_twice), FakeDevice()
    async with cloud.serve():
        inner, sent = StreamTransport(cloud.url, "echo"), []

        class Recording:
            async def send(self, message: bytes, request_id: str, timeout_s: float) -> Any:
                sent.append((request_id, message))
                return await inner.send(message, request_id, timeout_s)

            async def close(self) -> None:
                await inner.close()

        config = ClientConfig(first_backoff_s=0.01)
        async with Client(Recording(), device, config=config) as client:
            assert close_to(await client.infer(raw_inputs(3)), device.local(raw_inputs(3)))
    assert client.retries == 2
    assert inner.connections == 3
    assert len(sent) == 4
    assert all(one[0] == other[0] for one, other in (sent[0:2], sent[2:4]))
    assert_same_but_for_the_deadline([sent[0][1], sent[1][1]])
    assert_same_but_for_the_deadline([sent[2][1], sent[3][1]])
    assert sent[0][0] != sent[2][0]


@asynchronous
async def test_a_cloud_that_is_gone_is_unavailable_in_time() -> None:
    cloud = FakeCloud(honest)
    async with cloud.serve():
        pass
    for transport in ("stream", "unary"):
        options: dict[str, Any] = {"transport": transport}
        config = ClientConfig(timeout_s=0.4, first_backoff_s=0.02)
        started = time.monotonic()
        async with Client(cloud.url, FakeDevice(), config=config, **options) as client:
            with pytest.raises(Unavailable, match=r"gave up after 0\.4 s; the last attempt: ") as e:
                await client.infer(raw_inputs(1))
        assert time.monotonic() - started < 3
        assert client.retries > 0
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("status", [429, 503, 500, 502, 504])
@asynchronous
async def test_a_busy_cloud_is_asked_again(status: int, clock: Clock) -> None:
    def busy_at_first(request: wire.Request, attempt: int) -> bytes:
        return refusing(status)(request, attempt) if attempt < 3 else answer(request)

    device, transport = FakeDevice(), Scripted(busy_at_first)
    client = Client(transport, device)
    assert close_to(await client.infer(raw_inputs(4)), device.local(raw_inputs(4)))
    assert client.retries == 4
    for attempts in transport.sent.values():
        assert len(attempts) == 3
        assert_same_but_for_the_deadline(attempts)


@asynchronous
async def test_the_wait_that_the_cloud_asks_for_is_kept(clock: Clock) -> None:
    def full_at_first(request: wire.Request, attempt: int) -> bytes:
        return (
            refusing(429, retry_after_s=3.5)(request, attempt) if attempt == 1 else answer(request)
        )

    await Client(Scripted(full_at_first), FakeDevice()).infer(raw_inputs(1))
    assert len(clock.slept) == 2  # one for each round
    assert all(3.5 <= slept <= 3.85 for slept in clock.slept)
    assert clock.slept[0] != clock.slept[1]  # not all devices at the same moment


@asynchronous
async def test_the_wait_in_an_http_header_is_kept(clock: Clock) -> None:
    def full_at_first(received: Received) -> Reply:
        if len(http.received) % 2:
            return Reply(429, b'{"error": "full"}', {"Retry-After": "4"})
        return Reply(200, answer(wire.decode_request(received.body)))

    http, device = FakeHttp(full_at_first), FakeDevice()
    async with http.serve(), Client(http.url, device, transport="unary") as client:
        assert close_to(await client.infer(raw_inputs(4)), device.local(raw_inputs(4)))
    assert client.retries == len(clock.slept) == 2
    assert all(4 <= slept <= 4.4 for slept in clock.slept)


@asynchronous
async def test_a_retry_tells_what_is_left_of_the_deadline(clock: Clock) -> None:
    def busy_at_first(request: wire.Request, attempt: int) -> bytes:
        return refusing(503)(request, attempt) if attempt < 4 else answer(request)

    transport = Scripted(busy_at_first)
    config = ClientConfig(timeout_s=20, first_backoff_s=1)
    await Client(transport, FakeDevice(rounds=1), config=config).infer(raw_inputs(1))
    (attempts,) = transport.sent.values()
    left = [wire.decode_request(message).deadline_s for message in attempts]
    waited = [0.0, *np.cumsum(clock.slept)]
    assert left == pytest.approx([20 - passed for passed in waited], abs=0.002)
    assert_same_but_for_the_deadline(attempts)


def assert_same_but_for_the_deadline(messages: Sequence[bytes]) -> None:
    """The cloud learns nothing from a second attempt that it did not know from the first."""
    requests = [wire.decode_request(message) for message in messages]
    assert len({request.features.tobytes() for request in requests}) == 1
    nothing = np.empty(0)
    fixed = [request._replace(features=nothing, deadline_s=None)[1:] for request in requests]
    assert all(request == fixed[0] for request in fixed)
    left = [request.deadline_s or 0 for request in requests]
    assert sorted(left, reverse=True) == left


@asynchronous
async def test_waits_double_with_jitter_up_to_two_seconds(clock: Clock) -> None:
    config = ClientConfig(timeout_s=30, first_backoff_s=0.1)
    with pytest.raises(Unavailable, match="gave up after 30 s"):
        await Client(Scripted(refusing(503)), FakeDevice(), config=config).infer(raw_inputs(1))
    for index, slept in enumerate(clock.slept):
        full = min(0.1 * 2**index, 2.0)
        assert full / 2 <= slept <= full
    assert len(set(clock.slept)) == len(clock.slept) > 10
    assert clock.now < 1030


@asynchronous
async def test_a_wait_past_the_deadline_is_not_waited(clock: Clock) -> None:
    transport = Scripted(refusing(429, retry_after_s=60))
    with pytest.raises(Unavailable, match="gave up after 30 s; the last attempt: the cloud's own"):
        await Client(transport, FakeDevice()).infer(raw_inputs(1))
    assert clock.slept == []
    assert transport.attempts == 1


@asynchronous
async def test_the_retry_budget_ends_a_retry_storm(clock: Clock) -> None:
    transport = Scripted(refusing(503))
    config = ClientConfig(timeout_s=1e6, retry_ratio=0.5, retry_reserve=3)
    client = Client(transport, FakeDevice(), config=config)
    for expected in (3, 0, 1, 0, 1):  # the reserve, then half a retry per request
        before = client.retries
        with pytest.raises(Unavailable) as caught:
            await client.infer(raw_inputs(1))
        assert str(caught.value) == (
            "the retry budget is spent; the last attempt: the cloud's own words"
        )
        assert client.retries - before == expected
    assert transport.attempts == 5 + 3 + 1 + 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, WireError),
        (401, Unauthorized),
        (404, NotFound),
        (408, DeadlineExceeded),
        (413, TooLarge),
        (422, NonFinite),
        (418, DataMixError),
        (0, DataMixError),
    ],
)
@asynchronous
async def test_what_will_not_change_is_raised_at_once(
    status: int, kind: type[DataMixError], clock: Clock
) -> None:
    transport = Scripted(refusing(status, retry_after_s=0.1))
    with pytest.raises(DataMixError, match="the cloud's own words") as caught:
        await Client(transport, FakeDevice()).infer(raw_inputs(1))
    assert type(caught.value) is kind
    assert (transport.attempts, clock.slept) == (1, [])


@asynchronous
async def test_an_attempt_gets_its_own_time_and_never_more_than_is_left(clock: Clock) -> None:
    def slow(request: wire.Request, attempt: int) -> bytes:
        clock.now += 2.0
        raise Unavailable("no answer within 2 s")

    transport = Scripted(slow)
    config = ClientConfig(timeout_s=9, attempt_timeout_s=4, first_backoff_s=1)
    with pytest.raises(Unavailable, match="gave up after 9 s; the last attempt: no answer within"):
        await Client(transport, FakeDevice(), config=config).infer(raw_inputs(1))
    assert transport.timeouts[0] == 4
    assert 0 < transport.timeouts[-1] < 4
    assert sorted(transport.timeouts, reverse=True) == transport.timeouts


@asynchronous
async def test_an_answer_that_never_comes_is_asked_for_again() -> None:
    def loses_the_first(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.requests > 1:
            honest(connection, request)

    cloud, device = FakeCloud(loses_the_first), FakeDevice()
    config = ClientConfig(attempt_timeout_s=0.05, first_backoff_s=0.01)
    async with cloud.serve(), Client(cloud.url, device, config=config) as client:
        assert close_to(await client.infer(raw_inputs(2)), device.local(raw_inputs(2)))
    assert client.retries == 1


@pytest.mark.parametrize(
    ("ratio", "reserve", "requests", "granted"),
    [
        (0.1, 2, 0, 2),
        (0.1, 2, 9, 2),
        (0, 0, 100, 0),
        (0.5, 1, 1, 1),
        (1.0, 5, 3, 5),
        (0.1, 0.5, 9, 0),
    ],
)
def test_the_reserve_is_the_most_that_is_saved_up(
    ratio: float, reserve: float, requests: int, granted: int
) -> None:
    budget = RetryBudget(ratio, reserve)
    for _ in range(requests):
        budget.earn()
    assert [budget.spend() for _ in range(granted + 1)] == [True] * granted + [False]


def test_requests_pay_for_retries() -> None:
    budget = RetryBudget(0.25, 1)
    assert budget.spend()
    for _ in range(3):
        budget.earn()
        assert not budget.spend()
    budget.earn()
    assert budget.spend()


# --- wrong answers ------------------------------------------------------------------------------


def garbage(request: wire.Request) -> bytes:
    return b"\xff" * 100


def poisoned(request: wire.Request) -> bytes:
    rows = compute(request.block, request.features.astype(np.float32))
    rows[1, 0, 0, 0] = np.nan
    return echo(request, features=rows)


def too_few_rows(request: wire.Request) -> bytes:
    return echo(request, features=compute(request.block, request.features[1:]))


def other_shape(request: wire.Request) -> bytes:
    return echo(request, features=np.zeros((GROUP, 1, 1, 1), np.float32))


def of_a_stranger(request: wire.Request) -> bytes:
    return echo(request, request_id="stranger")


def nothing(request: wire.Request) -> bytes:
    return echo(request, features=np.empty((0, *SHAPES[request.block][1]), np.float32))


@pytest.mark.parametrize(
    "wrong", [garbage, poisoned, too_few_rows, other_shape, of_a_stranger, nothing]
)
@pytest.mark.parametrize("block", [0, 1])
@asynchronous
async def test_a_wrong_answer_is_an_answer_error_and_not_asked_for_again(
    block: int, wrong: Callable[[wire.Request], bytes]
) -> None:
    asked = []

    async def cloud(message: bytes) -> bytes:
        request = wire.decode_request(message)
        asked.append(request.block)
        return wrong(request) if request.block == block else answer(request)

    with pytest.raises(AnswerError):
        await Client(InProcessTransport(cloud), FakeDevice()).infer(raw_inputs(2))
    assert asked == list(range(block + 1))


@pytest.mark.parametrize("wrong", [poisoned, too_few_rows, other_shape, nothing])
@asynchronous
async def test_a_wrong_answer_on_a_stream_leaves_the_stream_in_order(
    wrong: Callable[[wire.Request], bytes],
) -> None:
    cloud, device = FakeCloud(lambda c, request: c.send(wrong(request))), FakeDevice()
    async with cloud.serve(), Client(cloud.url, device) as client:
        with pytest.raises(AnswerError):
            await client.infer(raw_inputs(2))
        cloud.behaviour = honest
        assert close_to(await client.infer(raw_inputs(2)), device.local(raw_inputs(2)))
    assert cloud.streams == 1


# --- several groups -----------------------------------------------------------------------------


@asynchronous
async def test_the_error_of_one_group_comes_out_as_it_is_and_stops_the_others() -> None:
    ended: list[str] = []

    class OneFails:
        async def send(self, message: bytes, request_id: str, timeout_s: float) -> Any:
            try:
                if not ended:
                    ended.append("failed")
                    raise NotFound("model is gone")
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        async def close(self) -> None:
            pass

    with pytest.raises(NotFound, match="model is gone") as caught:
        await Client(OneFails(), FakeDevice()).infer(raw_inputs(4 * GROUP))
    assert type(caught.value) is NotFound
    assert ended.count("failed") == 1
    assert set(ended) <= {"failed", "cancelled"}


@asynchronous
async def test_a_cancelled_inference_leaves_nothing_behind() -> None:
    cloud = FakeCloud(lambda connection, request: None)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        async with Client(transport, FakeDevice()) as client:
            task = asyncio.create_task(client.infer(raw_inputs(12)))
            while cloud.requests < 3:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not any(connection.waiting for connection in transport._open)


@asynchronous
async def test_closing_ends_an_inference_under_way() -> None:
    cloud = FakeCloud(lambda connection, request: None)
    async with cloud.serve():
        client = Client(cloud.url, FakeDevice(), config=ClientConfig(first_backoff_s=0.01))
        task = asyncio.create_task(client.infer(raw_inputs(1)))
        while not cloud.requests:
            await asyncio.sleep(0.001)
        await client.close()
        with pytest.raises(ConfigError, match="closed"):  # no retry opens it again
            await task
    assert cloud.streams == 1


# --- unary --------------------------------------------------------------------------------------


def posted(received: Received) -> Reply:
    return Reply(body=answer(wire.decode_request(received.body)))


@asynchronous
async def test_unary_gives_the_same() -> None:
    device = FakeDevice()
    async with FakeHttp(posted).serve() as server:
        async with Client(server.url, device, transport="unary") as client:
            assert close_to(await client.infer(raw_inputs(9)), device.local(raw_inputs(9)))
        assert len(server.received) == 6


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@asynchronous
async def test_unary_outlives_a_proxy_without_a_server(status: int) -> None:
    def absent_at_first(received: Received) -> Reply:
        if len(server.received) < 3:
            page = b"<html><body><h1>503 Service Unavailable</h1></body></html>\n"
            return Reply(status, page, {"content-type": "text/html"})
        return posted(received)

    device = FakeDevice()
    async with FakeHttp(absent_at_first).serve() as server:
        config = ClientConfig(first_backoff_s=0.01)
        async with Client(server.url, device, transport="unary", config=config) as client:
            assert close_to(await client.infer(raw_inputs(2)), device.local(raw_inputs(2)))
        assert client.retries == 2
        assert_same_but_for_the_deadline([received.body for received in server.received[:3]])


@asynchronous
async def test_unary_raises_our_own_errors_at_once() -> None:
    reply = Reply(404, json.dumps({"error": "model is 'echo', expected 'other'"}).encode())
    async with (
        FakeHttp(lambda _: reply).serve() as server,
        Client(server.url, FakeDevice(), transport="unary") as client,
    ):
        with pytest.raises(NotFound, match="expected 'other'"):
            await client.infer(raw_inputs(2))
        assert len(server.received) == 1


# --- what is refused before anything is sent ----------------------------------------------------


def never() -> Transport:
    def script(request: wire.Request, attempt: int) -> bytes:
        raise AssertionError("something was sent")

    return Scripted(script)


@pytest.mark.parametrize("mode", ["bounded", "split", "plain", ""])
def test_a_mode_that_the_bundle_was_not_made_for_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="was made for mix"):
        Client(never(), FakeDevice(), mode=mode)
    assert Client(never(), FakeDevice(), mode="mix").device.manifest.mode == "mix"


@pytest.mark.parametrize("url", ["", "host:1", "ws://host:1", "http://host:port"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        Client(url, FakeDevice())


def test_an_unknown_transport_is_refused() -> None:
    options: dict[str, Any] = {"transport": "pigeon"}
    with pytest.raises(ConfigError, match="pigeon"):
        Client("http://127.0.0.1:1", FakeDevice(), **options)


@pytest.mark.parametrize("kind", [str, os.fspath, lambda path: path])
def test_a_bundle_that_is_not_there_is_refused(kind: Any, tmp_path: Any) -> None:
    with pytest.raises(BundleError):
        Client("http://127.0.0.1:1", kind(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"attempt_timeout_s": 0},
        {"attempt_timeout_s": float("nan")},
        {"first_backoff_s": 0},
        {"max_groups": 0},
        {"retry_ratio": -0.1},
        {"retry_ratio": float("nan")},
        {"retry_reserve": -1},
        {"wire_dtype": "float64"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ClientConfig(**settings)


@asynchronous
async def test_inputs_that_the_device_refuses_are_not_sent() -> None:
    class Picky(FakeDevice):
        def preprocess(self, raw: Array) -> Any:
            raise ConfigError(f"inputs have shape {raw.shape}, expected {INPUT}")

    with pytest.raises(ConfigError, match="inputs have shape"):
        await Client(never(), Picky()).infer(np.zeros((2, 2), np.uint8))


# --- without an event loop ----------------------------------------------------------------------


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    with running(FakeCloud(honest)) as served:
        yield served


def client_threads() -> int:
    return sum(thread.name == "client" for thread in threading.enumerate())


def test_sync_is_the_same_without_await(cloud: FakeCloud) -> None:
    device = FakeDevice()
    with SyncClient(cloud.url, device) as client:
        for count in COUNTS:
            assert close_to(client.infer(raw_inputs(count)), device.local(raw_inputs(count)))
        assert client_threads() == 1
    assert client_threads() == 0


def test_sync_serves_several_threads_at_once(cloud: FakeCloud) -> None:
    device = FakeDevice()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for count in (1, 5, 9):
            inputs = raw_inputs(count, seed)
            if not close_to(client.infer(inputs), device.local(inputs)):
                wrong.append(seed)

    with SyncClient(cloud.url, device) as client:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert wrong == []
    assert cloud.requests == 6 * 2 * (1 + 2 + 3)
    assert cloud.streams == 1


def test_sync_may_be_closed_twice_and_is_closed_then(cloud: FakeCloud) -> None:
    client = SyncClient(cloud.url, FakeDevice())
    client.infer(raw_inputs(1))
    client.close()
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.infer(raw_inputs(1))
    assert client_threads() == 0


def test_sync_may_be_closed_unused() -> None:
    SyncClient("http://127.0.0.1:1", FakeDevice()).close()
    assert client_threads() == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "nonsense"},
        {"mode": "split"},
        {"transport": "pigeon"},
        {"bundle": "/no/such/bundle"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_sync_leaves_no_thread_where_it_cannot_be_built(arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {"url": "http://127.0.0.1:1", "bundle": FakeDevice()} | arguments
    with pytest.raises((DataMixError, TypeError)):
        SyncClient(**given)
    assert client_threads() == 0


def test_sync_raises_the_same_errors() -> None:
    with SyncClient(Scripted(refusing(404)), FakeDevice()) as client:
        with pytest.raises(NotFound, match="the cloud's own words"):
            client.infer(raw_inputs(1))
        with pytest.raises(NotFound):
            client.infer(raw_inputs(3 * GROUP))
    with SyncClient(InProcessTransport(in_process), FakeDevice()) as client:
        assert client.infer(raw_inputs(1)).shape == (1, CLASSES)


@asynchronous
async def test_sync_works_beside_a_running_loop() -> None:
    device = FakeDevice()
    with SyncClient(InProcessTransport(in_process), device) as client:
        assert close_to(client.infer(raw_inputs(5)), device.local(raw_inputs(5)))


def test_sync_closed_by_another_thread_ends_what_is_under_way() -> None:
    class Silent:
        started = threading.Event()

        async def send(self, message: bytes, request_id: str, timeout_s: float) -> Any:
            self.started.set()
            await asyncio.sleep(60)

        async def close(self) -> None:
            pass

    client, outcome = SyncClient(Silent(), FakeDevice()), []

    def work() -> None:
        try:
            client.infer(raw_inputs(1))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert Silent.started.wait(5)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert [type(error) for error in outcome] == [ConfigError]
    assert client_threads() == 0


def test_sync_stops_its_thread_even_where_closing_fails() -> None:
    class Clumsy(Scripted):
        async def close(self) -> None:
            raise OSError("the network is gone")

    client = SyncClient(Clumsy(refusing(404)), FakeDevice())
    with pytest.raises(OSError, match="network"):
        client.close()
    assert client_threads() == 0
