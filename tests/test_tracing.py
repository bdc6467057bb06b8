"""Traces: one from the device to the engine, and nothing unless asked for."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix import tracing, wire
from datamix.errors import ConfigError, DeadlineExceeded, WireError
from datamix.tracing import Parent
from deployments.allowance import Allowance
from deployments.config import Config
from edge.client import Client
from edge.data import sample_for
from edge.device import open_device
from edge.tracing import span
from edge.tracing import tracing as traced
from tests.collector import Collector, collecting
from tests.real_cloud import SHAPE, Cloud, serving

BUNDLE = Path(__file__).parents[1] / "bundles/fashion-mnist-mix"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# --- the field ----------------------------------------------------------------------------------


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_parent_is_read_as_it_was_written(trace_id: int, span_id: int, sampled: bool) -> None:
    parent = Parent(trace_id, span_id, sampled)
    assert Parent.parse(str(parent)) == parent
    assert len(str(parent)) == tracing.LENGTH


def test_a_parent_has_the_standards_form() -> None:
    parent = Parent.parse(PARENT)
    assert parent == Parent(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)
    assert str(parent) == PARENT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        PARENT[:-1],
        PARENT + "0",
        PARENT.upper(),
        PARENT.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        PARENT.replace("-01", "-02"),
        PARENT + "\n",
    ],
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="traceparent is .*, expected 00-<32 hex digits>"):
        Parent.parse(text)


def test_the_field_travels_and_is_checked() -> None:
    rows = np.ones((2, 3), np.float32)
    plain = wire.encode_request(rows, request_id="a")
    assert wire.decode_request(plain).traceparent is None
    assert b"traceparent" not in plain
    for number in range(1, 4):  # the later ones by a remembered layout
        parent = str(Parent(number, number, True))
        message = wire.encode_request(rows, request_id="a", deadline_s=1, traceparent=parent)
        assert wire.decode_request(message).traceparent == parent
    with pytest.raises(WireError, match="traceparent"):
        wire.decode_request(message.replace(parent.encode(), parent.upper().encode()[:-1] + b"7"))
    with pytest.raises(WireError, match="traceparent"):
        wire.encode_request(rows, request_id="a", traceparent="x")


# --- from the device to the engine --------------------------------------------------------------


def infer(collector: Collector, groups: int, ratio: float = 1.0, **settings: Any) -> Any:
    """Infer through a real replica that exports its traces, by a client that does."""
    device = open_device(BUNDLE)
    inputs = sample_for(device.manifest.preprocessing).inputs[: groups * device.manifest.group_size]

    async def go() -> Any:
        config = Config(bundle=str(BUNDLE), trace_endpoint=collector.endpoint, **settings)
        async with serving(config) as cloud:
            with traced(collector.endpoint, ratio) as tracer:
                async with Client(cloud.url, device, tracer=tracer) as client:
                    return await client.infer(inputs)

    return asyncio.run(go())


def test_one_trace_from_the_device_to_the_engine() -> None:
    groups, rounds = 3, len(open_device(BUNDLE).manifest.blocks)
    with collecting() as collector:
        infer(collector, groups)
    by_id = {one.span: one for one in collector.spans}
    (root,) = collector.named("infer")
    assert root.parent == "" and root.service == "datamix-device"
    assert root.attributes == {"datamix.inputs": 12, "datamix.mode": "mix"}
    assert len(collector.named("stem")) == 1
    assert [one.parent for one in collector.named("group")] == [root.span] * groups
    asked = collector.named("round")
    assert sorted(one.attributes["datamix.block"] for one in asked) == sorted(
        [*range(rounds)] * groups
    )
    requests = collector.named("request")
    assert len(requests) == len(asked) == groups * rounds
    for request in requests:
        parent = by_id[request.parent]
        assert request.service == "datamix-cloud" and request.trace == root.trace
        assert parent.name == "datamix.round"
        assert parent.attributes["datamix.block"] == request.attributes["datamix.block"]
        assert request.attributes["datamix.model"] == "fashion-mnist-mix"
        assert request.attributes["datamix.status"] == 200
        # One machine, one clock: the cloud's part lies within the device's.
        assert parent.start_ns <= request.start_ns <= request.end_ns <= parent.end_ns
    batches = collector.named("batch")
    assert 1 <= len(batches) <= len(requests)
    linked = [(one, request) for one in batches for request in one.links]
    assert sorted(request for _, request in linked) == sorted(one.span for one in requests)
    for batch, member in linked:
        assert by_id[member].links == (batch.span,)
        assert by_id[member].start_ns <= batch.start_ns <= batch.end_ns <= by_id[member].end_ns
        rows = sum(by_id[one].attributes["datamix.rows"] for one in batch.links)
        assert batch.attributes["datamix.batch_rows"] == rows


def test_spans_hold_no_values() -> None:
    with collecting() as collector:
        infer(collector, 1)
    known = {
        *("inputs", "mode", "block", "request_id", "model", "model_version", "rows", "status"),
        *("queue_seconds", "compute_seconds", "batch_rows", "close_reason"),
    }
    for one in collector.spans:
        assert {key.removeprefix("datamix.") for key in one.attributes} <= known
        assert all(not isinstance(value, bytes) for value in one.attributes.values())


def test_a_share_is_traced_and_outputs_stay_the_same() -> None:
    with collecting() as collector:
        outputs = infer(collector, 2, ratio=0.0)
        assert collector.spans == []
        again = infer(collector, 2)
    # Coefficients are fresh each time, so equal but for rounding.
    np.testing.assert_allclose(outputs, again, atol=0.05)


def test_no_more_requests_are_traced_than_allowed() -> None:
    with collecting() as collector:
        infer(collector, 8, traces_per_s=1.0)
    rounds = len(collector.named("round"))
    assert rounds == 8 * len(open_device(BUNDLE).manifest.blocks)
    assert 1 <= len(collector.named("request")) < rounds


def test_an_allowance_fills_up_to_a_second() -> None:
    now_s = 0.0
    allowance = Allowance(2.0, lambda: now_s)
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    now_s = 0.5
    assert [allowance.take() for _ in range(2)] == [True, False]
    now_s = 100.0
    assert [allowance.take() for _ in range(3)] == [True, True, False]


def message(parent: str | None, **fields: Any) -> bytes:
    return wire.encode_request(
        np.zeros((1, *SHAPE), np.float32), request_id="r", traceparent=parent, **fields
    )


def echo(collector: Collector | None, *messages: bytes) -> list[wire.Response]:
    endpoint = None if collector is None else collector.endpoint
    config = Config(engine="null", echo_shape=SHAPE, trace_endpoint=endpoint)

    async def go() -> list[wire.Response]:
        async with serving(config) as cloud:
            return await _exchange(cloud, messages)

    return asyncio.run(go())


async def _exchange(cloud: Cloud, messages: tuple[bytes, ...]) -> list[wire.Response]:
    answers = []
    async with cloud.stream() as stream:
        for one in messages:
            await stream.send(one)
            received = await stream.recv()
            assert isinstance(received, bytes)
            answers.append(wire.decode_response(received))
    return answers


def test_a_request_that_is_not_sampled_leaves_no_span() -> None:
    with collecting() as collector:
        answers = echo(collector, message(PARENT[:-1] + "0"), message(None))
    assert [one.status for one in answers] == [200, 200]
    assert collector.spans == []


def test_a_cloud_that_does_not_trace_answers_traced_requests() -> None:
    assert [one.status for one in echo(None, message(PARENT))] == [200]


def test_a_refused_request_has_a_span_with_its_status() -> None:
    with collecting() as collector:
        (answer,) = echo(collector, message(PARENT, deadline_s=0.0))
    assert answer.status == DeadlineExceeded.status
    (one,) = collector.named("request")
    assert one.error == "DeadlineExceeded"
    assert one.attributes["datamix.status"] == answer.status
    assert one.parent == "b7ad6b7169203331" and one.trace == PARENT[3:35]


def test_a_collector_that_hangs_does_not_keep_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.tracing._CLOSING_S", 0.1)
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        collector = Collector(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        begun_s = time.monotonic()
        (answer,) = echo(collector, message(PARENT))
    assert answer.status == 200
    assert time.monotonic() - begun_s < 5


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "ftp://host/v1/traces"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="trace endpoint is .*, expected a URL such as"):
        tracing.open_queue("test", endpoint)


def test_a_ratio_is_a_share() -> None:
    with pytest.raises(ConfigError, match="trace ratio is 2, expected 0 to 1"), traced(None, 2):
        pass


def test_what_a_span_is_told_of_an_error_is_its_type() -> None:
    with collecting() as collector, traced(collector.endpoint) as tracer:
        with pytest.raises(ValueError), span(tracer, "round", block=1):
            raise ValueError("pixel 17")
        with span(None, "round") as parent:
            assert parent is None
    (one,) = collector.spans
    assert one.error == "ValueError"
    assert "pixel" not in repr(one)
