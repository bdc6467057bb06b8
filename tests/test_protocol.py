"""The endpoints over real sockets: every fault gets its status and touches nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from websockets.exceptions import InvalidStatus

from datamix import wire
from deployments.config import Config
from deployments.engine import Settled
from deployments.waiting import Job
from deployments.websocket import EXTENSION, Messages
from tests.real_cloud import (
    PATIENCE_S,
    SHAPE,
    Cloud,
    HttpPeer,
    Reply,
    answer,
    ask,
    assert_echoes,
    http,
    message_of,
    replica,
    rows_of,
    serving,
)

CONFIG = Config(
    engine="null",
    echo_shape=SHAPE,
    max_request_bytes=16384,
    max_request_rows=8,
    max_batch_rows=16,
    max_queue_rows=32,
)


def run(test: Callable[[Cloud], Awaitable[None]], config: Config = CONFIG) -> None:
    """Run ``test`` against a replica behind a server."""

    async def go() -> None:
        async with serving(config) as cloud:
            await test(cloud)

    asyncio.run(go())


def assert_plain(sentence: str | None) -> None:
    """One sentence that tells nothing of the replica's inside."""
    assert sentence
    assert len(sentence) < 300
    assert not re.search(r"Traceback|\n|\.py|Error\b|0x[0-9a-f]{6}|object at|/work|/home", sentence)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines a test expects in the log; no others of any weight may be there."""
    caplog.set_level(logging.INFO)
    expected: list[str] = []
    yield expected
    # Uvicorn tells of starts, stops and connections; that is not ours. Nor is it ours that it
    # takes a refused WebSocket for one that was forgotten.
    forgotten = "ASGI callable returned without completing handshake."
    records = [r for r in caplog.get_records("call") if r.getMessage() != forgotten]
    # One more line names the request (tests/test_logs.py); only where the replica is to blame.
    named = [r for r in records if r.getMessage() == "request was not answered"]
    assert all(record.__dict__["status"] in (500, 503) for record in named)
    records = [record for record in records if record not in named]
    ours = [r.getMessage() for r in records if not r.name.startswith("uvicorn")]
    heavy = [r.getMessage() for r in records if r.levelno >= logging.WARNING]
    assert ours == heavy == expected
    assert not any(record.exc_info for record in records)


# --- what bad input gets ------------------------------------------------------------------------

GOOD = message_of(0)
METADATA = {"datamix.protocol": "1", "datamix.request_id": "bad"}


def arrow(
    *batches: pa.RecordBatch, schema: pa.Schema | None = None, codec: str | None = None
) -> bytes:
    """An Arrow stream as pyarrow writes it."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, schema or batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def batch_of(
    columns: dict[str, pa.Array], metadata: dict[str, str] | None = None
) -> pa.RecordBatch:
    batch = pa.RecordBatch.from_pydict(columns)
    return batch.replace_schema_metadata(METADATA if metadata is None else metadata)


def tensor(
    values: np.ndarray[Any, Any], value_type: pa.DataType | None = None, mask: Any = None
) -> pa.Array:
    """A fixed-shape-tensor column."""
    flat = pa.array(values.reshape(-1), value_type)
    size = int(np.prod(values.shape[1:]))
    storage = pa.FixedSizeListArray.from_arrays(flat, size, mask=mask)
    kind = pa.fixed_shape_tensor(flat.type, values.shape[1:])
    return pa.ExtensionArray.from_storage(kind, storage)


def with_metadata(**changes: str | None) -> bytes:
    metadata = METADATA | {f"datamix.{key}": value for key, value in changes.items()}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return arrow(batch_of({"features": tensor(rows_of(0))}, kept))


def features_of(values: np.ndarray[Any, Any]) -> bytes:
    return arrow(batch_of({"features": tensor(values)}))


def spoiled(value: float, dtype: str = "float16") -> bytes:
    values = rows_of(0).astype(dtype)
    values[1, 1, 2, 0] = value
    return features_of(values)


ROWS = batch_of({"features": tensor(rows_of(0))})
INT8 = tensor(np.ones((2, *SHAPE), np.int8))
SCALE = pa.array(np.ones(2, np.float32))
LARGE = np.zeros((8, 64, 8, 8), np.float16)  # 64 kB, more than max_request_bytes


class Fault(NamedTuple):
    """A bad message and what it gets."""

    message: bytes
    status: int
    sentence: str  # a regular expression for its beginning
    request_id: str = "bad"  # in the answer on a stream


BAD_INPUT = {
    "nothing": Fault(b"", 400, "body is not a complete Arrow", "-"),
    "not Arrow": Fault(b"hello, cloud", 400, "body is not a complete Arrow", "-"),
    "JSON": Fault(b'{"inputs": []}', 400, "body is not a complete Arrow", "-"),
    "zeros": Fault(bytes(4096), 400, "body is not|message does not", "-"),
    "truncated in the schema": Fault(GOOD[:200], 400, "body is not a complete Arrow", "-"),
    "truncated in the rows": Fault(GOOD[:-20], 400, "body is not a complete Arrow", "r0"),
    "truncated in the end": Fault(GOOD[:-1], 400, "record batch is not followed by", "r0"),
    "trailing bytes": Fault(GOOD + b"\0", 400, "record batch is not followed by", "r0"),
    "two messages in one": Fault(GOOD + GOOD, 400, "record batch is not followed by", "r0"),
    "no batch": Fault(arrow(schema=ROWS.schema), 400, "body is not a complete Arrow|message holds"),
    "two batches": Fault(arrow(ROWS, ROWS), 400, "record batch is not followed by"),
    "no rows": Fault(features_of(rows_of(0)[:0]), 400, "request has no rows"),
    "null row": Fault(
        arrow(batch_of({"features": tensor(rows_of(0), mask=pa.array([False, True]))})),
        400,
        "columns disagree about the number of rows, or hold nulls",
    ),
    "null value": Fault(
        arrow(
            batch_of(
                {
                    "features": pa.ExtensionArray.from_storage(
                        pa.fixed_shape_tensor(pa.float32(), SHAPE),
                        pa.FixedSizeListArray.from_arrays(
                            pa.array([None, *[1.0] * 35], pa.float32()), 18
                        ),
                    )
                }
            )
        ),
        400,
        "columns disagree about the number of rows, or hold nulls",
    ),
    "wrong column": Fault(
        arrow(batch_of({"pixels": tensor(rows_of(0))})), 400, "message has 1 columns"
    ),
    "one column too many": Fault(
        arrow(batch_of({"features": INT8, "scale": SCALE, "label": SCALE})),
        400,
        "message has 3 columns",
    ),
    "scale beside float16": Fault(
        arrow(batch_of({"features": tensor(rows_of(0)), "scale": SCALE})),
        400,
        "a scale column belongs to int8 and int16 features",
    ),
    "int8 without scale": Fault(
        arrow(batch_of({"features": INT8})),
        400,
        "a scale column belongs to int8 and int16 features",
    ),
    "scale of another type": Fault(
        arrow(batch_of({"features": INT8, "scale": SCALE.cast(pa.float64())})),
        400,
        "column scale has the wrong type",
    ),
    "float64": Fault(features_of(rows_of(0).astype(np.float64)), 400, "features have the"),
    "not a tensor": Fault(
        arrow(batch_of({"features": pa.array([1.0, 2.0])})), 400, "column features has the wrong"
    ),
    "wrong row shape": Fault(features_of(rows_of(0, 2, (3, 3, 2))), 400, "rows have shape"),
    "wrong row rank": Fault(features_of(rows_of(0, 2, (18,))), 400, "rows have shape"),
    "no metadata": Fault(
        arrow(batch_of({"features": tensor(rows_of(0))}, {})), 400, "datamix.protocol is", "-"
    ),
    "protocol of tomorrow": Fault(with_metadata(protocol="2"), 400, "datamix.protocol is"),
    "no id": Fault(with_metadata(request_id=None), 400, "datamix.request_id is missing", "-"),
    "empty id": Fault(with_metadata(request_id=""), 400, "datamix.request_id is not", "-"),
    "long id": Fault(with_metadata(request_id="x" * 65), 400, "datamix.request_id is not", "-"),
    "strange id": Fault(with_metadata(request_id="../é\n"), 400, "datamix.request_id is not", "-"),
    "priority": Fault(with_metadata(priority="2"), 400, "datamix.priority is 2"),
    "deadline": Fault(with_metadata(deadline_ms="soon"), 400, "datamix.deadline_ms is not"),
    "negative deadline": Fault(with_metadata(deadline_ms="-1"), 400, "datamix.deadline_ms is not"),
    "block name": Fault(with_metadata(block="first"), 400, "datamix.block is not"),
    "model name": Fault(with_metadata(model="../../etc"), 400, "datamix.model is not"),
    "unknown model": Fault(
        with_metadata(model="other"), 404, "model of the message is 'other', expected 'echo'"
    ),
    "unknown version": Fault(with_metadata(model_version="2"), 404, "version of 'echo' is '2'"),
    "unknown block": Fault(with_metadata(block="1"), 404, "block is 1, expected 0 to 0"),
    "no time left": Fault(with_metadata(deadline_ms="0"), 408, "the deadline passed before"),
    "too many rows": Fault(message_of(0, 9, request_id="bad"), 413, "message has 9 rows"),
    "too many bytes": Fault(features_of(LARGE), 413, "(message|body) has (66|more)"),
    "too many bytes inflated": Fault(
        arrow(batch_of({"features": tensor(LARGE)}), codec="zstd"),
        413,
        "message inflates to more than 16384 bytes",
    ),
    "NaN": Fault(spoiled(float("nan")), 422, "features hold NaN or Inf"),
    "Inf": Fault(spoiled(float("inf"), "float32"), 422, "features hold NaN or Inf"),
    "NaN in the scale": Fault(
        arrow(batch_of({"features": INT8, "scale": pa.array([1, np.nan], pa.float32())})),
        422,
        "features hold NaN or Inf",
    ),
}


def test_the_table_covers_every_status_that_a_message_can_earn() -> None:
    assert {fault.status for fault in BAD_INPUT.values()} == {400, 404, 408, 413, 422}


def test_bad_input_over_http_leaves_the_connection_alone() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for seed, (name, fault) in enumerate(BAD_INPUT.items()):
                for chunked in (False, True):
                    reply = await peer.post(fault.message, chunked=chunked)
                    assert reply.status == fault.status, name
                    assert reply.headers["content-type"] == "application/json"
                    assert re.match(fault.sentence, reply.error), (name, reply.error)
                    assert_plain(reply.error)
                    good = await peer.post(message_of(seed))
                    assert good.status == 200, name
                    assert_echoes(wire.decode_response(good.body), seed)

    run(test)


def test_bad_input_on_a_stream_leaves_the_connection_alone() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            for seed, (name, fault) in enumerate(BAD_INPUT.items()):
                response = await ask(stream, fault.message)
                assert response.status == fault.status, name
                assert response.request_id == fault.request_id, name
                assert response.error is not None
                assert re.match(fault.sentence, response.error), (name, response.error)
                assert_plain(response.error)
                assert len(response.features) == 0
                assert_echoes(await ask(stream, message_of(seed)), seed)
        assert len(cloud.gate.batches) == len(BAD_INPUT)  # no bad message got as far as the engine

    run(test)


def test_bad_input_does_not_touch_good_requests_in_flight() -> None:
    """Good ones wait in the queue while bad ones come by the same stream and are answered."""

    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            cloud.gate.close()
            await stream.send(message_of(0))
            await cloud.gate.batch()
            for seed in (1, 2):
                await stream.send(message_of(seed))
            await cloud.until_queued(2)
            bad = [fault for fault in BAD_INPUT.values() if fault.status != 408]
            for fault in bad:
                response = await ask(stream, fault.message)
                assert response.status == fault.status
            cloud.gate.open()
            for seed in range(3):
                assert_echoes(await answer(stream), seed)

    run(test)


def test_text_frames() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            await stream.send("hello")
            response = await answer(stream)
            assert (response.status, response.request_id) == (400, "-")
            assert response.error == "a text frame came on the stream, expected binary messages"
            assert_echoes(await ask(stream, message_of(1)), 1)

    run(test)


def test_fragmented_messages_are_put_together() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            message = message_of(1)
            await stream.send([message[:7], message[7:500], message[500:]])
            assert_echoes(await answer(stream), 1)

    run(test)


# --- paths, methods, media types ----------------------------------------------------------------

UNKNOWN_POSTS = [
    ("/v2/models/other/infer", "model is 'other', expected 'echo'"),
    ("/v2/models/echo/versions/2/infer", "version of 'echo' is '2', expected '1'"),
    ("/v2/models/echo/stream", "nothing is to be posted at '/v2/models/echo/stream'"),
    ("/v2/models/echo", "nothing is to be posted at '/v2/models/echo'"),
    ("/v2/models/echo/train", "nothing is at '/v2/models/echo/train'"),
    ("/v2/models//infer", "nothing is at '/v2/models//infer'"),
    ("/v1/models/echo/infer", "nothing is at '/v1/models/echo/infer'"),
    ("/", "nothing is at '/'"),
]


def test_unknown_paths() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for path, sentence in UNKNOWN_POSTS:
                reply = await peer.post(GOOD, path=path)
                assert (reply.status, reply.error) == (404, sentence)
                assert_echoes(wire.decode_response((await peer.post(GOOD)).body), 0)
            for path in ("/", "/v2/nothing", "/v2/models/echo/infer", "/v2/models/other/ready"):
                assert (await peer.get(path)).status == 404
            long = await peer.get("/" + "x" * 5000)
            assert long.status == 404
            assert_plain(long.error)

    run(test)


def test_a_stream_through_a_server_that_has_none_of_ours_is_refused() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def test(cloud: Cloud) -> None:
        scope = {"type": "websocket", "path": "/v2/models/echo/stream", "extensions": {}}
        await cloud.app(scope, receive, send)
        assert [m["type"] for m in sent] == [
            "websocket.http.response.start",
            "websocket.http.response.body",
        ]
        assert sent[0]["status"] == 503
        assert json.loads(sent[1]["body"])["error"].startswith("no replica takes streams")

    run(test)


def test_paths_with_the_version() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            reply = await peer.post(GOOD, path="/v2/models/echo/versions/1/infer")
            assert_echoes(wire.decode_response(reply.body), 0)
        async with cloud.stream("/v2/models/echo/versions/1/stream") as stream:
            assert_echoes(await ask(stream, GOOD), 0)
            named = message_of(1, model="echo", model_version="1")
            assert_echoes(await ask(stream, named), 1)

    run(test)


def test_streams_that_are_refused() -> None:
    async def test(cloud: Cloud) -> None:
        for path in (
            "/v2/models/other/stream",
            "/v2/models/echo/versions/7/stream",
            "/v2/models/echo/infer",
            "/nowhere",
        ):
            with pytest.raises(InvalidStatus) as raised:
                async with cloud.stream(path):
                    pass
            response = raised.value.response
            assert response.status_code == 404
            assert_plain(json.loads(response.body)["error"])
        assert cloud.backbone.traffic.open_streams == 0

    run(test)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_methods_nobody_knows(method: str) -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            reply = await peer.request(method, "/v2/models/echo/infer")
            assert reply.status == 405
            assert reply.error == f"method is {method}, expected GET or POST"
            assert (await peer.post(GOOD)).status == 200

    run(test)


def test_media_types() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for media in ("application/arrow", "text/html", "application/json" * 20):
                reply = await peer.post(GOOD, media=media)
                assert reply.status == 415
                assert reply.error.startswith("content type is ")
                assert_plain(reply.error)
                for known in (wire.MEDIA_TYPE, wire.MEDIA_TYPE.title() + "; version=1"):
                    assert (await peer.post(GOOD, media=known)).status == 200

    run(test)


def test_a_declared_length_is_refused_before_the_body_comes() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            peer.writer.write(
                b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 16385\r\n"
                b"content-type: application/vnd.apache.arrow.stream\r\n\r\n"
            )
            reply = await peer.reply()
            assert (reply.status, reply.error) == (
                413,
                "body has 16385 bytes, expected at most 16384",
            )
            peer.writer.write(bytes(16385))
            assert_echoes(wire.decode_response((await peer.post(GOOD)).body), 0)

    run(test)


def test_an_endless_body_is_cut_off() -> None:
    """Without content-length, what is read stays within a chunk of the limit."""
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1000
        assert read < 20_000
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def go() -> None:
        async with replica(CONFIG) as cloud:
            reply = await call(cloud, receive)
            assert reply.status == 413
            assert reply.error == "body has more than 16384 bytes, the most that is accepted"

    asyncio.run(go())


def test_a_peer_that_leaves_inside_its_body() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            peer.writer.write(
                b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
                b"content-type: application/vnd.apache.arrow.stream\r\n\r\n" + GOOD[:400]
            )
            await peer.writer.drain()
        async with http(cloud) as peer:
            assert (await peer.post(GOOD)).status == 200
        assert len(cloud.gate.batches) == 1

    run(test)


# --- calling the application without a server ---------------------------------------------------


def http_scope(path: str = "/v2/models/echo/infer") -> dict[str, Any]:
    headers = [(b"content-type", wire.MEDIA_TYPE.encode())]
    return {"type": "http", "method": "POST", "path": path, "headers": headers}


async def call(cloud: Cloud, receive: Callable[[], Awaitable[dict[str, Any]]]) -> Reply:
    """POST what ``receive`` gives to the application itself."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await cloud.app(http_scope(), receive, send)
    start, body = sent
    headers = {key.decode(): value.decode() for key, value in start["headers"]}
    return Reply(start["status"], headers, body["body"])


def body_of(message: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": message}

    return receive


class FakePeer:
    """The other side of a stream, without a socket."""

    def __init__(self) -> None:
        self.messages = Messages()
        self.messages.send = self.read  # type: ignore[method-assign]
        self.answers: list[wire.Response] = []
        self.left = asyncio.Event()
        self.events: list[dict[str, Any]] = [{"type": "websocket.connect"}]

    @property
    def scope(self) -> dict[str, Any]:
        path, extensions = "/v2/models/echo/stream", {EXTENSION: self.messages}
        return {"type": "websocket", "path": path, "headers": [], "extensions": extensions}

    def read(self, parts: list[Any]) -> int:
        message = b"".join(parts)
        self.answers.append(wire.decode_response(message))
        return len(message)

    async def receive(self) -> dict[str, Any]:
        if self.events:
            return self.events.pop()
        await self.left.wait()
        return {"type": "websocket.disconnect", "code": 1000}

    async def send(self, message: Any) -> None:
        assert message == {"type": "websocket.accept"}

    async def until_answered(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.answers) < count:
                await asyncio.sleep(0.001)


class FakeTransport:
    """What a stream needs of picows to stop reading."""

    is_disconnected = False
    close_handshake = None

    def __init__(self) -> None:
        self.underlying_transport = self
        self.calls: list[str] = []

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")


async def turn() -> None:
    """Let everything that is ready on the event loop happen."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_stream_stops_reading_at_its_bound() -> None:
    async def go() -> None:
        config = CONFIG.model_copy(update={"max_stream_requests": 2})
        async with replica(config) as cloud:
            cloud.gate.close()
            peer, transport = FakePeer(), FakeTransport()
            peer.messages.transport = transport  # type: ignore[assignment]
            task = asyncio.create_task(cloud.app(peer.scope, peer.receive, peer.send))
            await turn()
            for seed in range(10):  # as if one read had brought them all
                peer.messages.receive(message_of(seed))
            await cloud.gate.batch()
            await turn()
            assert len(cloud.queued) + sum(len(batch) for batch in cloud.gate.batches) == 2
            assert transport.calls == ["pause"]
            cloud.gate.open()
            await peer.until_answered(10)
            for seed, response in enumerate(peer.answers):
                assert_echoes(response, seed)
            assert transport.calls[-1] == "resume"
            peer.left.set()
            await task

    asyncio.run(go())


def test_a_flood_of_junk_at_the_bound_is_answered_message_by_message() -> None:
    """Each error makes room for the next at once; that must not nest thousands of calls deep."""

    async def go() -> None:
        config = CONFIG.model_copy(update={"max_stream_requests": 2})
        async with replica(config) as cloud:
            cloud.gate.close()
            peer = FakePeer()
            task = asyncio.create_task(cloud.app(peer.scope, peer.receive, peer.send))
            await turn()
            for seed in range(2):
                peer.messages.receive(message_of(seed))
            for _ in range(5000):  # kept, as two are under way
                peer.messages.receive(b"junk")
            peer.messages.receive(message_of(2))
            cloud.gate.open()
            await peer.until_answered(5003)
            assert [answer.status for answer in peer.answers].count(400) == 5000
            good = {a.request_id: a for a in peer.answers if a.status == 200}
            for seed in range(3):
                assert_echoes(good[f"r{seed}"], seed)
            peer.left.set()
            await task

    asyncio.run(go())


def test_a_peer_that_does_not_read_is_not_read_from() -> None:
    messages, transport = Messages(), FakeTransport()
    messages.transport = transport  # type: ignore[assignment]
    messages.full(True)
    messages.hold(True)
    messages.full(False)  # one of two reasons is left
    assert set(transport.calls) == {"pause"}
    messages.hold(False)
    assert transport.calls[-1] == "resume"


def test_an_answered_request_leaves_no_memory_behind() -> None:
    """A stream that held its last requests would hold megabytes, times thousands of streams."""

    def jobs() -> int:
        return sum(type(thing) is Job for thing in gc.get_objects())

    async def go() -> None:
        gc.collect()
        gc.disable()  # what only the collector would free does not count as freed
        try:
            async with replica(CONFIG) as cloud:
                peer = FakePeer()
                task = asyncio.create_task(cloud.app(peer.scope, peer.receive, peer.send))
                await turn()
                for seed in range(20):
                    peer.messages.receive(message_of(seed))
                await peer.until_answered(20)
                await turn()
                last = len(cloud.gate.batches[-1])
                cloud.gate.batches.clear()
                assert jobs() <= last <= 8  # the engine's thread may still hold the last batch
                peer.left.set()
                await task
        finally:
            gc.enable()

    asyncio.run(go())


def test_a_unary_request_that_is_abandoned_is_not_computed() -> None:
    """Ray cancels the call when its client disconnects."""

    async def go() -> None:
        async with replica(CONFIG) as cloud:
            cloud.gate.close()
            running = asyncio.create_task(call(cloud, body_of(message_of(1))))
            await cloud.gate.batch()
            abandoned = asyncio.create_task(call(cloud, body_of(message_of(2))))
            alive = asyncio.create_task(call(cloud, body_of(message_of(3))))
            await cloud.until_queued(2)
            abandoned.cancel()
            await turn()
            cloud.gate.open()
            assert_echoes(wire.decode_response((await running).body), 1)
            assert_echoes(wire.decode_response((await alive).body), 3)
            assert [len(batch) for batch in cloud.gate.batches] == [1, 1]
            assert cloud.outcomes == {"ok": 2}

    asyncio.run(go())


def test_a_fault_nobody_foresaw_is_answered_and_hurts_nobody(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    def broken(*args: Any, **options: Any) -> bytes:
        raise MemoryError("secret 0.1234 in /some/path")

    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer, cloud.stream() as stream:
            for name in ("response_parts", "decode_request"):
                with monkeypatch.context() as patch:
                    patch.setattr(wire, name, broken)
                    reply = await peer.post(message_of(1))
                    assert reply.status == 503
                    assert reply.error == "the replica failed on this request"
                    response = await ask(stream, message_of(2))
                    assert (response.status, response.request_id) == (503, "r2")
                    assert response.error == "the replica failed on this request"
                assert (await peer.post(message_of(3))).status == 200
                assert_echoes(await ask(stream, message_of(4)), 4)

    log += ["request failed: MemoryError"] * 4
    run(test)


# --- overload, faults, draining -----------------------------------------------------------------


def test_a_full_queue() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer, cloud.stream() as stream:
            cloud.gate.close()
            await stream.send(message_of(0))
            await cloud.gate.batch()
            for seed in range(1, 9):  # 32 rows
                await stream.send(message_of(seed, 4))
            await cloud.until_queued(8)
            reply = await peer.post(message_of(9))
            assert reply.status == 429
            assert reply.error == "the queue holds 32 rows of at most 32, try again later"
            assert int(reply.headers["retry-after"]) >= 1
            shed = await ask(stream, message_of(10))
            assert (shed.status, shed.request_id) == (429, "r10")
            assert shed.retry_after_s is not None
            assert shed.retry_after_s > 0
            cloud.gate.open()
            assert_echoes(await answer(stream), 0)
            for seed in range(1, 9):
                assert_echoes(await answer(stream), seed, 4)
            assert_echoes(wire.decode_response((await peer.post(message_of(9))).body), 9)
            assert cloud.outcomes == {"ok": 10, "429": 2}

    run(test)


def test_low_priority_waits_for_normal() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            cloud.gate.close()
            await stream.send(message_of(0))
            await cloud.gate.batch()
            await stream.send(message_of(1, priority=1))
            await stream.send(message_of(2))
            await cloud.until_queued(2)
            cloud.gate.open()
            for seed in (0, 2, 1):
                assert_echoes(await answer(stream), seed)

    run(test)


def test_an_engine_fault_hits_only_the_request_that_caused_it(log: list[str]) -> None:
    async def test(cloud: Cloud) -> None:
        cloud.gate.fails_on = 13.0
        poison = np.full((2, *SHAPE), 13.0, np.float16)
        async with http(cloud) as peer, cloud.stream() as stream:
            reply = await peer.post(wire.encode_request(poison, request_id="poison"))
            assert (reply.status, reply.error) == (503, "the engine failed on this request")
            cloud.gate.close()
            await stream.send(message_of(0))
            await stream.send(message_of(1))
            await stream.send(wire.encode_request(poison, request_id="poison"))
            await stream.send(message_of(2))
            cloud.gate.open()
            responses = {r.request_id: r for r in [await answer(stream) for _ in range(4)]}
            for seed in range(3):
                assert_echoes(responses[f"r{seed}"], seed)
            assert responses["poison"].status == 503
            assert_plain(responses["poison"].error)

    log += ["engine failed on a request: RuntimeError"] * 2
    run(test)


def test_an_output_that_int8_cannot_hold() -> None:
    """Float outputs travel as they are and the device judges them; int8 has no NaN."""

    async def test(cloud: Cloud) -> None:
        def overflow(block: int, requests: Any) -> Settled:
            return Settled([np.full(rows.features.shape, np.inf, np.float32) for rows in requests])

        cloud.model.engine.start = overflow  # type: ignore[method-assign]
        async with http(cloud) as peer:
            reply = await peer.post(message_of(0, dtype="int8"))
            assert reply.status == 422
            assert reply.error == "the output of block 0 holds NaN or Inf"
        assert cloud.outcomes == {"422": 1}

    run(test)


def test_value_types_travel_there_and_back() -> None:
    async def test(cloud: Cloud) -> None:
        values = rows_of(5).astype(np.float32)
        async with cloud.stream() as stream:
            for dtype in wire.DTYPES:
                message = wire.encode_request(values, request_id=dtype, dtype=dtype)
                response = await ask(stream, message)
                assert response.features.dtype.name == dtype
                sent = wire.dequantise(*wire.quantise(values, dtype))
                np.testing.assert_allclose(response.values(), sent, rtol=1e-6, atol=1e-6)

    run(test)


def test_draining() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer, cloud.stream() as stream:
            cloud.gate.close()
            await stream.send(message_of(0))
            await cloud.gate.batch()
            await stream.send(message_of(1))
            await cloud.until_queued(1)
            closing = asyncio.create_task(cloud.backbone.close())
            await turn()
            reply = await peer.post(message_of(2))
            assert reply.status == 503
            assert reply.error == "this replica is draining, send the request again"
            refused = await ask(stream, message_of(3))
            assert (refused.status, refused.request_id) == (503, "r3")
            assert (await peer.get("/v2/health/live")).status == 200
            for path in ("/v2/health/ready", "/v2/models/echo/ready"):
                not_ready = await peer.get(path)
                assert not_ready.status == 503
                assert_plain(not_ready.error)
            cloud.gate.open()
            assert_echoes(await answer(stream), 0)
            last = await answer(stream)
            assert_echoes(last, 1)
            assert last.close_reason == "drain"
            await closing

    run(test)


def test_the_server_drains_the_replica_when_it_stops() -> None:
    """Lifespan: uvicorn sends it, and so does Ray when it stops a replica."""

    async def go() -> None:
        async with replica(CONFIG) as cloud:
            inbox: asyncio.Queue[Any] = asyncio.Queue()
            outbox: asyncio.Queue[Any] = asyncio.Queue()
            life = asyncio.create_task(cloud.app({"type": "lifespan"}, inbox.get, outbox.put))
            await inbox.put({"type": "lifespan.startup"})
            assert await outbox.get() == {"type": "lifespan.startup.complete"}
            assert (await call(cloud, body_of(GOOD))).status == 200
            await inbox.put({"type": "lifespan.shutdown"})
            assert await outbox.get() == {"type": "lifespan.shutdown.complete"}
            assert not cloud.backbone.ready
            assert (await call(cloud, body_of(GOOD))).status == 503
            await life

    asyncio.run(go())


# --- peers that leave ---------------------------------------------------------------------------


def test_a_stream_that_closes_takes_its_waiting_requests_along() -> None:
    async def test(cloud: Cloud) -> None:
        cloud.gate.close()
        async with cloud.stream() as stream:
            for seed in range(4):
                await stream.send(message_of(seed))
                if seed == 0:
                    await cloud.gate.batch()
            await cloud.until_queued(3)
            stream.transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            while cloud.backbone.traffic.open_streams:
                await asyncio.sleep(0.001)
        assert all(job.cancelled for job in cloud.queued)
        cloud.gate.open()
        async with cloud.stream() as stream:
            assert_echoes(await ask(stream, message_of(9)), 9)
        assert [len(batch) for batch in cloud.gate.batches] == [1, 1]
        assert cloud.outcomes == {"ok": 1}

    run(test)


def test_a_unary_peer_that_leaves_gets_no_answer_and_nobody_minds() -> None:
    async def test(cloud: Cloud) -> None:
        cloud.gate.close()
        async with http(cloud) as peer:
            await peer.start(message_of(1))
            await cloud.gate.batch()
            peer.writer.transport.abort()
        await turn()
        cloud.gate.open()
        async with http(cloud) as peer:
            assert_echoes(wire.decode_response((await peer.post(message_of(2))).body), 2)

    run(test)


# --- many at once -------------------------------------------------------------------------------


def test_fifty_streams_get_their_own_answers() -> None:
    """Pipelined, with payloads no two of which are equal; ids repeat from stream to stream."""
    config = CONFIG.model_copy(update={"max_queue_rows": 100_000})
    messages = 20

    async def device(cloud: Cloud, number: int) -> None:
        async with cloud.stream() as stream:
            seeds = range(number * messages, (number + 1) * messages)
            for seed in seeds:
                await stream.send(message_of(seed, 1 + seed % 4, request_id=f"m{seed % messages}"))
            responses = [await answer(stream) for _ in seeds]
            assert len({response.request_id for response in responses}) == messages
            for response in responses:
                seed = seeds[int(response.request_id[1:])]
                expected = rows_of(seed, 1 + seed % 4)
                assert response.status == 200
                assert response.features.tobytes() == expected.tobytes()

    async def test(cloud: Cloud) -> None:
        await asyncio.gather(*(device(cloud, number) for number in range(50)))
        assert cloud.outcomes == {"ok": 50 * messages}
        assert max(len(batch) for batch in cloud.gate.batches) > 1  # they did share batches

    run(test, config)


def test_pipelined_http_requests_are_answered_in_order() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for seed in range(5):
                await peer.start(message_of(seed))
            for seed in range(5):
                assert_echoes(wire.decode_response((await peer.reply()).body), seed)

    run(test)


# --- what a client may read ---------------------------------------------------------------------


async def good_json(peer: HttpPeer, path: str) -> Any:
    reply = await peer.get(path)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    return reply.json()


def test_metadata_and_health() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            server = await good_json(peer, "/v2")
            assert server["name"] == "datamix"
            assert re.fullmatch(r"\d+\.\d+\.\d+", server["version"])
            assert await good_json(peer, "/v2/health/live") == {"live": True}
            assert await good_json(peer, "/v2/health/ready") == {"ready": True}
            model = await good_json(peer, "/v2/models/echo")
            assert model == await good_json(peer, "/v2/models/echo/versions/1")
            tensor = {"name": "features", "datatype": "FP32", "shape": [-1, *SHAPE]}
            assert (model["name"], model["versions"]) == ("echo", ["1"])
            assert model["inputs"] == model["outputs"] == [tensor]
            assert model["parameters"] == {
                "version": "1",
                "engine": "null",
                "blocks": [{"input_shape": list(SHAPE), "output_shape": list(SHAPE)}],
                "max_request_rows": 8,
                "max_request_bytes": 16384,
                "max_batch_rows": 16,
            }
            for path in ("/v2/models/echo/ready", "/v2/models/echo/versions/1/ready"):
                assert await good_json(peer, path) == {"name": "echo", "ready": True}

    run(test)


def test_response_metadata_tells_how_the_batch_went() -> None:
    a_s, b_s = 0.02, 0.001
    config = CONFIG.model_copy(update={"engine": f"emulated:{a_s},{b_s}"})

    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            await stream.send(message_of(0, 2))
            await cloud.gate.batch()
            sent = time.monotonic()
            for seed in (1, 2):
                await stream.send(message_of(seed, 3))
            first, *others = [await answer(stream) for _ in range(3)]
            elapsed = time.monotonic() - sent
        assert (first.model, first.model_version, first.block) == ("echo", "1", 0)
        assert (first.batch_rows, first.close_reason) == (2, "engine_free")
        assert first.queue_s < 0.02
        assert a_s + 2 * b_s <= first.compute_s + 1e-6
        for response in others:
            assert (response.batch_rows, response.close_reason) == (6, "engine_free")
            assert a_s + 6 * b_s <= response.compute_s + 1e-6
            # They waited for the rest of the first batch, and no longer than the test did.
            assert response.queue_s > 0
            assert response.queue_s + response.compute_s <= elapsed + 0.001

    run(test, config)


def test_a_route_prefix_of_serve_is_none_of_the_applications_business() -> None:
    """Serve leaves it in the path and names it as the root, in HTTP and in WebSockets."""

    async def go() -> None:
        async with replica(CONFIG) as cloud:
            for path, status in (("/b/v2", 200), ("/b/v2/models/echo", 200), ("/b/b/v2", 404)):
                sent: list[dict[str, Any]] = []
                await cloud.app(_scope("http", path), _nothing, _into(sent))
                assert sent[0]["status"] == status
            stream = "/b/v2/models/echo/stream"
            sent = []
            scope = {**_scope("websocket", stream), "extensions": {EXTENSION: Messages()}}
            await cloud.app(scope, _nothing, _into(sent))
            assert sent[0]["type"] == "websocket.accept"

    asyncio.run(go())


def _scope(kind: str, path: str) -> dict[str, Any]:
    return {"type": kind, "method": "GET", "path": path, "root_path": "/b", "headers": []}


async def _nothing() -> dict[str, Any]:
    return {"type": "nothing"}


def _into(sent: list[dict[str, Any]]) -> Any:
    async def send(message: Any) -> None:
        sent.append(message)

    return send
