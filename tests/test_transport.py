"""One attempt at one request: answers find their request, and every fault has its error."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
from picows import WSCloseCode, WSMsgType

from datamix import wire
from datamix.errors import (
    AnswerError,
    ConfigError,
    DataMixError,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthorized,
    Unavailable,
    WireError,
)
from edge import transport as transport_module
from edge.transport import (
    InProcessTransport,
    StreamTransport,
    Transport,
    UnaryTransport,
    check_url,
)
from tests.asynchronous import asynchronous
from tests.fake_cloud import SHAPE, Connection, FakeCloud, echo, polite
from tests.fake_http import FakeHttp, Received, Reply


def message(request_id: str, fill: float = 1.0) -> bytes:
    return wire.encode_request(np.full((2, *SHAPE), fill, np.float32), request_id=request_id)


def error_of(response: wire.Response | BaseException) -> BaseException:
    assert isinstance(response, BaseException)
    return response


async def send_all(transport: Transport, count: int, timeout_s: float = 5.0) -> list[Any]:
    """``count`` requests at once, request i filled with i; answers or errors, in order."""
    sends = [transport.send(message(f"r-{i}", i), f"r-{i}", timeout_s) for i in range(count)]
    return await asyncio.gather(*sends, return_exceptions=True)


def under_way(transport: StreamTransport) -> list[str]:
    """Ids of the requests that the transport still remembers."""
    return [request_id for connection in transport._open for request_id in connection.waiting]


# --- URLs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://cloud.example", "https://cloud.example"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_a_base_url_loses_its_slash(url: str, base: str) -> None:
    assert check_url(url) == base


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "localhost",
        "ws://host:1",
        "ftp://host",
        "http://",
        "http://:80",
        "http:host",
        "http://[::1",
        "http://host:port",
        "http://host:99999",
        "http://host:-1",
    ],
)
def test_what_is_no_base_url_is_refused(url: str) -> None:
    for build in (
        check_url,
        lambda url: StreamTransport(url, "m"),
        lambda u: UnaryTransport(u, "m"),
    ):
        with pytest.raises(ConfigError, match="expected http"):
            build(url)


# --- the stream ---------------------------------------------------------------------------------


@asynchronous
async def test_one_connection_carries_many_requests() -> None:
    cloud = FakeCloud()
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        assert transport.connections == 0  # nothing is contacted before it is needed
        answers = await send_all(transport, 100)
        for i, answer in enumerate(answers):
            assert (answer.request_id, answer.status) == (f"r-{i}", 200)
            assert np.all(answer.values() == i)
        assert (transport.connections, cloud.streams, transport.unmatched) == (1, 1, 0)
        assert under_way(transport) == []
        await transport.close()


@asynchronous
async def test_answers_in_any_order_find_their_request() -> None:
    held: list[tuple[Connection, wire.Request]] = []

    def backwards(connection: Connection, request: wire.Request) -> None:
        held.append((connection, request))
        if len(held) == 20:
            for waiting, old in reversed(held):
                waiting.send(echo(old))

    cloud = FakeCloud(backwards)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        answers = await send_all(transport, 20)
        assert [int(answer.values()[0, 0, 0, 0]) for answer in answers] == list(range(20))
        await transport.close()


@asynchronous
async def test_answers_nobody_waits_for_are_counted_and_dropped() -> None:
    def chatty(connection: Connection, request: wire.Request) -> None:
        connection.send(echo(request, request_id="stranger"))
        connection.send(wire.encode_error("", 400, "which request?"))
        connection.send(b"no message at all")
        connection.send(echo(request))
        connection.send(echo(request, features=request.features * 0))  # too late to change it

    cloud = FakeCloud(chatty)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        first = await transport.send(message("a", 7), "a", 5)
        assert np.all(first.values() == 7)
        second = await transport.send(message("b", 8), "b", 5)
        assert np.all(second.values() == 8)
        async with asyncio.timeout(5):
            while transport.unmatched < 8:
                await asyncio.sleep(0.001)
        assert transport.connections == 1
        await transport.close()


@asynchronous
async def test_an_answer_in_fragments_is_put_together() -> None:
    def fragmented(connection: Connection, request: wire.Request) -> None:
        body, stream = echo(request), connection.transport
        stream.send(WSMsgType.BINARY, body[:100], fin=False)
        stream.send_ping(b"between the fragments")
        stream.send(WSMsgType.CONTINUATION, body[100:101], fin=False)
        stream.send(WSMsgType.CONTINUATION, body[101:], fin=True)

    cloud = FakeCloud(fragmented)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        for name in "ab":
            answer = await transport.send(message(name, 3), name, 5)
            assert np.array_equal(answer.values(), np.full((2, *SHAPE), 3))
        await transport.close()


@asynchronous
async def test_text_is_not_an_answer() -> None:
    def texting(connection: Connection, request: wire.Request) -> None:
        connection.transport.send(WSMsgType.TEXT, b"hello")
        connection.send(echo(request))

    cloud = FakeCloud(texting)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        assert (await transport.send(message("a"), "a", 5)).status == 200
        await transport.close()


@asynchronous
async def test_an_error_status_is_returned_not_raised() -> None:
    def full(connection: Connection, request: wire.Request) -> None:
        connection.send(
            wire.encode_error(request.request_id, 429, "the queue is full", retry_after_s=0.5)
        )

    cloud = FakeCloud(full)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        answer = await transport.send(message("a"), "a", 5)
        assert (answer.status, answer.error) == (429, "the queue is full")
        assert answer.retry_after_s == 0.5
        await transport.close()


@asynchronous
async def test_a_broken_answer_fails_its_request_only() -> None:
    def broken_for_a(connection: Connection, request: wire.Request) -> None:
        body = echo(request)
        if request.request_id == "r-1":
            body = body[:-40] + bytes(32)  # the id can still be read, the columns cannot
        connection.send(body)

    cloud = FakeCloud(broken_for_a)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        answers = await send_all(transport, 3)
        assert type(error_of(answers[1])) is AnswerError
        assert (answers[0].status, answers[2].status) == (200, 200)
        assert transport.connections == 1
        await transport.close()


@asynchronous
async def test_an_answer_with_too_many_rows_fails_its_request_only() -> None:
    def endless(connection: Connection, request: wire.Request) -> None:
        if request.request_id == "r-0":
            rows = np.zeros((20_000, 1), np.float32)  # more than any request asks for
            connection.send(echo(request, features=rows, dtype="int8"))
        else:
            connection.later(0.05, echo(request))

    cloud = FakeCloud(endless)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        answers = await send_all(transport, 2)
        assert type(error_of(answers[0])) is AnswerError
        assert answers[1].status == 200
        assert transport.connections == 1
        await transport.close()


@asynchronous
async def test_a_lost_connection_fails_what_was_under_way_and_is_opened_again() -> None:
    def drops_once(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.streams == 1:
            if connection.cloud.requests == 3:
                connection.drop()
        else:
            polite(connection, request)

    cloud = FakeCloud(drops_once)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        for answer in await send_all(transport, 3):
            assert type(error_of(answer)) is Unavailable
        answers = await send_all(transport, 3)
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert transport.connections == 2
        await transport.close()


@asynchronous
async def test_a_goodbye_for_another_reason_is_a_lost_connection() -> None:
    def leaving(connection: Connection, request: wire.Request) -> None:
        connection.transport.send_close(WSCloseCode.INTERNAL_ERROR)

    cloud = FakeCloud(leaving)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        with pytest.raises(Unavailable, match="lost"):
            await transport.send(message("a"), "a", 5)
        cloud.behaviour = polite
        assert (await transport.send(message("b"), "b", 5)).status == 200
        await transport.close()


@pytest.mark.parametrize("code", [WSCloseCode.GOING_AWAY, WSCloseCode.SERVICE_RESTART])
@asynchronous
async def test_a_moved_stream_is_opened_again_and_nothing_has_failed(code: WSCloseCode) -> None:
    """Half of what was sent is answered, the rest was not read."""

    def leaving(connection: Connection, request: wire.Request) -> None:
        cloud = connection.cloud
        if cloud.streams > 1 or cloud.requests <= 5:
            polite(connection, request)
        elif cloud.requests == 6:
            connection.transport.send_close(code)

    cloud = FakeCloud(leaving)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        answers = await send_all(transport, 10)
        for i, answer in enumerate(answers):
            assert (answer.request_id, answer.status) == (f"r-{i}", 200)
            assert np.all(answer.values() == i)
        assert (transport.connections, transport.moved, transport.unmatched) == (2, 5, 0)
        assert under_way(transport) == []
        assert (await transport.send(message("b"), "b", 5)).status == 200
        await transport.close()
    assert len(cloud.open) == 0


@asynchronous
async def test_a_cloud_that_sends_everybody_away_is_unavailable() -> None:
    def leaving(connection: Connection, request: wire.Request) -> None:
        connection.transport.send_close(WSCloseCode.SERVICE_RESTART)

    cloud = FakeCloud(leaving)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        with pytest.raises(Unavailable, match="moved the stream 4 times in a row"):
            await transport.send(message("a"), "a", 5)
        assert cloud.streams == 4
        await transport.close()


@asynchronous
async def test_a_stream_whose_token_is_gone_is_unauthorized() -> None:
    def leaving(connection: Connection, request: wire.Request) -> None:
        connection.transport.send_close(WSCloseCode.POLICY_VIOLATION)

    cloud = FakeCloud(leaving)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        for answer in await send_all(transport, 3):
            assert type(error_of(answer)) is Unauthorized
        await transport.close()


@asynchronous
async def test_closing_does_not_wait_for_a_cloud_that_moved_the_stream_and_hangs() -> None:
    def hang(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.streams == 1:
            connection.transport.send_close(WSCloseCode.SERVICE_RESTART)
            connection.transport.underlying_transport.pause_reading()
        else:
            polite(connection, request)

    cloud = FakeCloud(hang)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        large = wire.encode_request(np.zeros((2, 1 << 21), np.float32), request_id="large")
        sends = [transport.send(message("a"), "a", 5), transport.send(large, "large", 5)]
        assert [answer.status for answer in await asyncio.gather(*sends)] == [200, 200]
        (hanging, _) = sorted(transport._open, key=lambda connection: connection.is_open)
        assert not hanging.is_gone  # it has 8 MB to send to nobody
        async with asyncio.timeout(2):
            await transport.close()
        assert hanging.is_gone


@asynchronous
async def test_bytes_that_are_no_websocket_frames_are_a_lost_connection() -> None:
    def raw(connection: Connection, request: wire.Request) -> None:
        connection.transport.underlying_transport.write(b"\xff" * 64)

    cloud = FakeCloud(raw)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        with pytest.raises(Unavailable):
            await transport.send(message("a"), "a", 5)
        await transport.close()


@asynchronous
async def test_a_cloud_that_is_not_there_is_unavailable_at_once() -> None:
    cloud = FakeCloud()
    async with cloud.serve():
        pass
    started = time.monotonic()
    for transport in (StreamTransport(cloud.url, "echo"), UnaryTransport(cloud.url, "echo")):
        with pytest.raises(Unavailable):
            await transport.send(message("a"), "a", 20)
        await transport.close()
    assert time.monotonic() - started < 5


@asynchronous
async def test_a_cloud_that_does_not_shake_hands_is_unavailable_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "_CONNECT_S", 0.4)  # close waits for the handshake
    async with FakeHttp(lambda _: Reply(delay_s=60)).serve() as mute:
        transport = StreamTransport(mute.url, "echo")
        for answer in await send_all(transport, 3, timeout_s=0.05):
            assert type(error_of(answer)) is Unavailable
        assert under_way(transport) == []
        await transport.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFound), (401, Unauthorized), (503, Unavailable), (500, Unavailable)],
)
@asynchronous
async def test_a_refused_stream_says_why(status: int, kind: type[DataMixError]) -> None:
    body = json.dumps({"error": "model is 'echo', expected 'other'"}).encode()
    async with FakeHttp(lambda _: Reply(status, body)).serve() as server:
        transport = StreamTransport(server.url, "echo")
        with pytest.raises(DataMixError) as caught:
            await transport.send(message("a"), "a", 5)
        assert type(caught.value) is kind
        assert str(status) in str(caught.value) or "expected 'other'" in str(caught.value)
        assert server.received[0].path == "/v2/models/echo/stream"
        await transport.close()


@asynchronous
async def test_a_refusal_of_the_stream_may_say_when_to_come_back() -> None:
    async with FakeHttp(lambda _: Reply(503, b"", {"retry-after": "2"})).serve() as server:
        transport = StreamTransport(server.url, "echo")
        with pytest.raises(Unavailable, match="503") as caught:
            await transport.send(message("a"), "a", 5)
        assert caught.value.retry_after_s == 2
        await transport.close()


@pytest.mark.parametrize("status", [200, 302, 307])
@asynchronous
async def test_a_stream_is_not_led_elsewhere(status: int) -> None:
    cloud = FakeCloud()
    async with cloud.serve():
        elsewhere = Reply(status, b"", {"location": f"{cloud.url}/v2/models/echo/stream"})
        async with FakeHttp(lambda _: elsewhere).serve() as server:
            transport = StreamTransport(server.url, "echo")
            with pytest.raises(DataMixError, match=str(status)) as caught:
                await transport.send(message("a"), "a", 5)
            assert not caught.value.retryable
            await transport.close()
        assert cloud.streams == 0


@asynchronous
async def test_a_cloud_that_hangs_up_during_the_handshake_is_unavailable_at_once() -> None:
    async with FakeHttp(lambda _: Reply(body=None)).serve() as server:
        transport = StreamTransport(server.url, "echo")
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await transport.send(message("a"), "a", 20)
        assert time.monotonic() - started < 5
        await transport.close()


@asynchronous
async def test_a_late_answer_is_dropped_and_the_stream_goes_on() -> None:
    def late_for_a(connection: Connection, request: wire.Request) -> None:
        delay_s = 0.15 if request.request_id == "a" else 0.02
        connection.later(delay_s, echo(request))

    cloud = FakeCloud(late_for_a)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        first = asyncio.create_task(transport.send(message("a"), "a", 0.1))
        assert (await transport.send(message("b"), "b", 5)).status == 200
        with pytest.raises(Unavailable, match=r"no answer within 0\.1 s"):
            await first
        assert under_way(transport) == []
        assert (await transport.send(message("c"), "c", 5)).status == 200
        await asyncio.sleep(0.1)
        assert (transport.unmatched, transport.connections) == (1, 1)
        await transport.close()


@asynchronous
async def test_a_connection_that_stays_silent_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "_SILENCE_S", 0.05)
    cloud = FakeCloud(lambda connection, request: None)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        with pytest.raises(Unavailable, match="no answer"):
            await transport.send(message("a"), "a", 0.1)
        cloud.behaviour = polite
        assert (await transport.send(message("b"), "b", 5)).status == 200
        assert transport.connections == 2
        await transport.close()


@asynchronous
async def test_an_impatient_request_does_not_take_the_others_down() -> None:
    cloud = FakeCloud(lambda connection, request: connection.later(0.1, echo(request)))
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        patient = asyncio.create_task(transport.send(message("a"), "a", 5))
        await asyncio.sleep(0.03)
        with pytest.raises(Unavailable):  # what is left of a group's time may be a millisecond
            await transport.send(message("b"), "b", 0.001)
        assert (await patient).status == 200
        assert transport.connections == 1
        await transport.close()


@asynchronous
async def test_a_cancelled_request_leaves_nothing_behind() -> None:
    cloud = FakeCloud(lambda connection, request: connection.later(0.02, echo(request)))
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        task = asyncio.create_task(transport.send(message("a"), "a", 5))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert under_way(transport) == []
        assert (await transport.send(message("b"), "b", 5)).status == 200
        await transport.close()


@asynchronous
async def test_closing_fails_what_is_under_way() -> None:
    cloud = FakeCloud(lambda connection, request: None)
    async with cloud.serve():
        transport = StreamTransport(cloud.url, "echo")
        task = asyncio.create_task(transport.send(message("a"), "a", 20))
        while not cloud.requests:
            await asyncio.sleep(0.001)
        await transport.close()
        with pytest.raises(Unavailable):
            await task


@pytest.mark.parametrize("kind", [StreamTransport, UnaryTransport])
@pytest.mark.parametrize("used", [False, True])
@asynchronous
async def test_a_closed_transport_stays_closed(used: bool, kind: Any) -> None:
    cloud = FakeCloud()
    async with cloud.serve():
        transport = kind(cloud.url, "echo")
        if used and kind is StreamTransport:
            await transport.send(message("a"), "a", 5)
        await transport.close()
        await transport.close()
        with pytest.raises(ConfigError, match="closed"):
            await transport.send(message("b"), "b", 5)
        assert cloud.streams == (used and kind is StreamTransport)


# --- one POST per request -----------------------------------------------------------------------


def answering(received: Received) -> Reply:
    return Reply(body=echo(wire.decode_request(received.body)))


@asynchronous
async def test_a_post_per_request_over_kept_connections() -> None:
    async with FakeHttp(answering).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        for i in range(5):
            answer = await transport.send(message(f"r-{i}", i), f"r-{i}", 5)
            assert np.all(answer.values() == i)
        await transport.close()
    assert server.connections == 1
    first = server.received[0]
    assert (first.method, first.path) == ("POST", "/v2/models/echo/infer")
    assert first.headers["content-type"] == wire.MEDIA_TYPE
    assert wire.decode_request(first.body).request_id == "r-0"


@asynchronous
async def test_posts_at_once_do_not_mix() -> None:
    def slow_when_early(received: Received) -> Reply:
        request = wire.decode_request(received.body)
        return Reply(body=echo(request), delay_s=0.02 * (int(request.request_id[2:]) % 3))

    async with FakeHttp(slow_when_early).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        answers = await send_all(transport, 12)
        assert [int(answer.values()[0, 0, 0, 0]) for answer in answers] == list(range(12))
        await transport.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, WireError),
        (401, Unauthorized),
        (404, NotFound),
        (408, DeadlineExceeded),
        (413, TooLarge),
        (429, Overloaded),
        (503, Unavailable),
    ],
)
@asynchronous
async def test_our_own_errors_come_back_as_they_were(status: int, kind: type[DataMixError]) -> None:
    reply = Reply(status, json.dumps({"error": "one sentence"}).encode(), {"retry-after": "3"})
    async with FakeHttp(lambda _: reply).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        with pytest.raises(DataMixError, match="one sentence") as caught:
            await transport.send(message("a"), "a", 5)
        assert type(caught.value) is kind
        assert caught.value.retry_after_s == 3
        await transport.close()


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize(
    "body",
    [
        b"<html><body><h1>503 Service Unavailable</h1>\nNo server is available.\n</body></html>",
        b"Internal Server Error",
        b"",
        b"\xff\xfe not UTF-8",
        b"[1, 2]",
        b"null",
        b'"error"',
        b'{"message": "PASSPORT"}',
        b'{"error": ',
    ],
)
@asynchronous
async def test_what_a_proxy_says_is_retryable_whatever_its_words(status: int, body: bytes) -> None:
    async with FakeHttp(lambda _: Reply(status, body, {"content-type": "text/html"})).serve() as s:
        transport = UnaryTransport(s.url, "echo")
        with pytest.raises(Unavailable, match=str(status)) as caught:
            await transport.send(message("a"), "a", 5)
        assert "<" not in str(caught.value)
        assert "PASSPORT" not in str(caught.value)
        await transport.close()


@pytest.mark.parametrize("retry_after", ["", "soon", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "²"])
@asynchronous
async def test_a_wait_that_is_no_number_is_no_wait(retry_after: str) -> None:
    headers = {"retry-after": retry_after} if retry_after else {}
    async with FakeHttp(lambda _: Reply(429, b"{}", headers)).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        with pytest.raises(Overloaded) as caught:
            await transport.send(message("a"), "a", 5)
        assert caught.value.retry_after_s is None
        await transport.close()


@pytest.mark.parametrize("status", [204, 301, 302, 418])
@asynchronous
async def test_an_odd_status_is_an_error_that_is_not_retried(status: int) -> None:
    reply = Reply(status, b"", {"location": "http://127.0.0.1:1/"})
    async with FakeHttp(lambda _: reply).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        with pytest.raises(DataMixError, match=str(status)) as caught:
            await transport.send(message("a"), "a", 5)
        assert not caught.value.retryable
        assert len(server.received) == 1  # no redirect takes the mixtures elsewhere
        await transport.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        message("a")[:-1],
        echo(wire.decode_request(message("other"))),
        wire.encode_response(
            np.zeros((20_000, 1), np.float32),
            dtype="int8",
            request_id="a",
            model="m",
            model_version="1",
            block=0,
            queue_s=0,
            compute_s=0,
            batch_rows=1,
            close_reason="full",
        ),
    ],
    ids=["empty", "garbage", "cut", "another request's", "too many rows"],
)
@asynchronous
async def test_an_answer_that_is_none_is_an_answer_error(body: bytes) -> None:
    async def in_process(_: bytes) -> bytes:
        return body

    async with FakeHttp(lambda _: Reply(body=body)).serve() as server:
        for transport in (UnaryTransport(server.url, "echo"), InProcessTransport(in_process)):
            with pytest.raises(AnswerError) as caught:
                await transport.send(message("a"), "a", 5)
            assert not caught.value.retryable
            await transport.close()


@asynchronous
async def test_a_dropped_post_is_unavailable() -> None:
    async with FakeHttp(lambda _: Reply(body=None)).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        with pytest.raises(Unavailable):
            await transport.send(message("a"), "a", 5)
        assert len(server.received) == 1  # one attempt: trying again is the client's business
        await transport.close()


@asynchronous
async def test_a_slow_post_is_unavailable_in_time() -> None:
    async with FakeHttp(lambda _: Reply(delay_s=60)).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        with pytest.raises(Unavailable, match=r"no answer within 0\.05 s"):
            await transport.send(message("a"), "a", 0.05)
        await transport.close()


@asynchronous
async def test_the_environments_proxy_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with FakeHttp(answering).serve() as server:
        transport = UnaryTransport(server.url, "echo")
        assert (await transport.send(message("a"), "a", 5)).status == 200
        await transport.close()


# --- in this process ----------------------------------------------------------------------------


@asynchronous
async def test_in_process_there_is_no_socket() -> None:
    async def answer(body: bytes) -> bytes:
        return echo(wire.decode_request(body))

    transport = InProcessTransport(answer)
    answers = await send_all(transport, 5)
    assert [int(a.values()[0, 0, 0, 0]) for a in answers] == list(range(5))
    await transport.close()


@asynchronous
async def test_in_process_there_is_a_timeout_too() -> None:
    async def never(body: bytes) -> bytes:
        await asyncio.sleep(60)
        return body

    with pytest.raises(Unavailable, match="no answer within"):
        await InProcessTransport(never).send(message("a"), "a", 0.02)
