"""What a replica writes down: bounded, with the request's id, and without what was sent."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from datamix import wire
from deployments import logs
from deployments.config import Config
from deployments.logs import RateLimit
from tests.real_cloud import SHAPE, serving


def record(text: str, *arguments: object, name: str = "deployments.x") -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, __file__, 1, text, arguments, None)


def test_the_same_message_is_written_a_few_times_a_second() -> None:
    now_s = 0.0
    limit = RateLimit(2.0, lambda: now_s)
    assert [limit.filter(record("failed: %s", n)) for n in range(5)] == [True] * 2 + [False] * 3
    assert limit.filter(record("another"))
    assert limit.filter(record("failed: %s", 0, name="deployments.y"))
    now_s = 0.5
    late = record("failed: %s", 5)
    assert limit.filter(late)
    assert late.getMessage() == "failed: 5 (3 more were left out)"
    now_s = 10.0
    last = record("failed: %s", 6)
    assert limit.filter(last)
    assert last.getMessage() == "failed: 6"


def test_messages_without_end_do_not_fill_memory() -> None:
    limit = RateLimit(1.0, lambda: 0.0)
    for number in range(3000):
        assert limit.filter(record(f"message {number}"))
    assert len(limit._known) <= 1000


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    found = [logging.getLogger(name) for name in logs._LOGGERS]
    kept = [(list(one.handlers), one.level, one.propagate) for one in found]
    yield
    for logger, (handlers, level, propagate) in zip(found, kept, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def fail_one(request_id: str, secret: float) -> int:
    """Let the engine of a real replica raise on one request; return the answer's status."""

    async def go() -> int:
        async with serving(Config(engine="null", echo_shape=SHAPE)) as cloud:
            cloud.gate.fails_on = secret
            rows = np.full((1, *SHAPE), secret, np.float32)
            async with cloud.stream() as stream:
                await stream.send(wire.encode_request(rows, request_id=request_id))
                received = await stream.recv()
                assert isinstance(received, bytes)
                return wire.decode_response(received).status

    return asyncio.run(go())


def test_a_failed_request_is_written_as_an_object_with_its_id(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.install("json")
    logs.install("json")  # replaces the first: no line comes twice
    status = fail_one("device-7.request-9", 12345.0)
    assert status == 503
    written = capsys.readouterr().err
    lines = [json.loads(line) for line in written.splitlines()]
    (line,) = [one for one in lines if one["message"] == "request was not answered"]
    assert line["request_id"] == "device-7.request-9"
    assert (line["status"], line["model"], line["level"]) == (503, "echo", "WARNING")
    assert line["logger"] == "deployments.admission" and line["time"]
    # The engine's own words held the input.
    assert "12345" not in written and "/some/path" not in written


def test_as_text_the_id_stands_behind_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.install("text")
    fail_one("request-9", 12345.0)
    written = capsys.readouterr().err
    (line,) = [one for one in written.splitlines() if "not answered" in one]
    assert "request_id=request-9 status=503 model=echo" in line
    assert "12345" not in written
