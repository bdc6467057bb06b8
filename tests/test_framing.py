"""The memory of layouts may make things faster, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix import flat, framing, wire
from datamix.errors import DataMixError, TooLarge, WireError

FEATURES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Start and end with nothing remembered."""
    wire.requests.forget()
    yield
    wire.requests.forget()


def request(request_id: str = "abcd", dtype: wire.Dtype = "float16", **extra: Any) -> bytes:
    return wire.encode_request(FEATURES, request_id=request_id, dtype=dtype, **extra)


def outcome(body: bytes) -> Any:
    """What decoding gives: comparable, the error's class and sentence included."""
    try:
        found = wire.decode_request(body)
    except DataMixError as error:
        return type(error), str(error)
    scale = None if found.scale is None else found.scale.tolist()
    return (
        found.features.tobytes(), found.features.shape, scale, found.request_id, found.deadline_s,
        found.model, found.model_version, found.block, found.priority,
    )  # fmt: skip


def without_memory(body: bytes) -> Any:
    kept = wire.requests
    wire.requests = framing.Reader(kept._variables, kept._parse)
    try:
        return outcome(body)
    finally:
        wire.requests = kept


def headers_known() -> int:
    """How many headers are remembered."""
    return sum(len(cuts.layouts) for found in wire.requests._known.values() for cuts in found)


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_a_layout_is_parsed_once(dtype: wire.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.decode_request(request("abcd", dtype, deadline_s=1.5))
    monkeypatch.setattr(pa.ipc, "read_message", lambda reader: pytest.fail("parsed again"))
    found = wire.decode_request(request("wxyz", dtype, deadline_s=2.5))
    assert (found.request_id, found.deadline_s, found.rows) == ("wxyz", 2.5, 2)
    np.testing.assert_allclose(wire.dequantise(found.features, found.scale), FEATURES, atol=0.1)


def test_a_layout_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = request("abcd")
    monkeypatch.setattr(framing, "_header", lambda *key: pytest.fail("written again"))
    assert request("wxyz") == first.replace(b"abcd", b"wxyz")


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_every_changed_byte_is_judged_as_without_memory(dtype: wire.Dtype) -> None:
    good = request("abcd", dtype, model="m", block=1)
    wire.decode_request(good)
    for position in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[position] ^= flip
            warm = outcome(bytes(bad))
            assert without_memory(bytes(bad)) == warm, f"byte {position} ^ {flip}"


@given(st.data())
def test_what_a_stranger_taught_changes_no_answer(data: st.DataObject) -> None:
    """Any mutant may be remembered first; a good message is then decoded all the same."""
    good = request("abcd", model="model", model_version="1")
    mutant = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        mutant[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    outcome(bytes(mutant))
    assert outcome(good) == without_memory(good)
    assert outcome(bytes(mutant)) == without_memory(bytes(mutant))


def test_values_that_lie_over_each_other_are_not_remembered() -> None:
    good = bytearray(request("abcd", model="efgh"))
    header = bytes(good[8 : 8 + int.from_bytes(good[4:8], "little")])
    at = {key: (start, stop) for key, start, stop in flat.metadata_values(header)}
    # The model's value is made to point at the request id's: find its reference and move it.
    id_at, model_at = at[b"datamix.request_id"][0] - 4, at[b"datamix.model"][0] - 4
    for position in range(0, model_at, 4):
        if position + int.from_bytes(header[position : position + 4], "little") == model_at:
            good[8 + position : 12 + position] = (id_at - position).to_bytes(4, "little")
            break
    else:
        pytest.skip("the id stands before the model here, and references only point forward")
    assert outcome(bytes(good))[3] == "abcd"
    assert not headers_known()


def test_a_message_that_names_its_values_otherwise_does_not_teach_that() -> None:
    """Two keys of the same padded length, so that values stand at the same places."""

    def written(key: str, value: str) -> bytes:
        metadata = {"datamix.protocol": "1", key: value}
        return framing.frame(FEATURES, None, metadata)

    good = written("datamix.request_id", "12345678")
    other = written("datamix.deadline_ms", "12345678")
    assert (len(good), good[4:8]) == (len(other), other[4:8])
    truth = without_memory(good)
    assert outcome(other)[0] is WireError  # no request id
    for _ in range(3):  # learned beside the other, then read by what was learned
        assert outcome(good) == truth


def test_limits_hold_for_remembered_layouts_too() -> None:
    body = request()
    wire.decode_request(body)
    with pytest.raises(TooLarge, match="2 rows, expected at most 1"):
        wire.decode_request(body, max_rows=1)
    with pytest.raises(TooLarge, match="bytes, expected at most 100"):
        wire.decode_request(body, max_bytes=100)


def test_memory_is_bounded() -> None:
    most = 0
    for number in range(1, 3 * framing._MAX_LAYOUTS):
        features = np.zeros((1, 1 + number % 99), np.float32)
        fields: dict[str, Any] = {"model": f"m{number}", "request_id": "a" * (1 + number % 64)}
        wire.decode_request(wire.encode_request(features, **fields))
        most = max(most, headers_known())
    assert most == framing._MAX_LAYOUTS


def test_a_stranger_cannot_make_every_message_a_search() -> None:
    """Messages of one length, the id at another place in each, are all compared with a good one."""
    for before in range(0, 200, 4):
        for length in (16, 17, 18, 19):
            fields = {
                "a": "x" * before,
                "datamix.request_id": "i" * length,
                "b": "x" * (200 - before),
            }
            wire.decode_request(framing.frame(FEATURES, None, {"datamix.protocol": "1"} | fields))
            (cuts,) = wire.requests._known.values()
            assert len(cuts) <= framing._MAX_CUTS
            assert wire.requests._layouts == headers_known() == sum(len(c.layouts) for c in cuts)


def test_models_versions_and_blocks_are_remembered_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Messages of the same length that differ in what they name do not drive each other out."""
    kinds: list[dict[str, Any]] = [
        {"model": m, "model_version": v, "block": b}
        for m in ("a", "b")
        for v in ("1", "2", "3")
        for b in range(4)
    ]
    for kind in kinds:
        wire.decode_request(request(**kind))
    monkeypatch.setattr(pa.ipc, "read_message", lambda reader: pytest.fail("parsed again"))
    for kind in kinds:
        found = wire.decode_request(request("wxyz", **kind))
        assert {key: getattr(found, key) for key in kind} == kind


def test_what_a_message_says_wrong_is_not_remembered() -> None:
    body = request(priority=1).replace(b"datamix.protocol", b"datamix.protocal")
    for _ in range(2):
        with pytest.raises(WireError, match=r"datamix.protocol is missing"):
            wire.decode_request(body)
    assert not headers_known()


def test_huge_headers_are_not_remembered() -> None:
    schema = pa.schema(
        [pa.field("features", pa.fixed_shape_tensor(pa.float32(), [4]))],
        {"datamix.protocol": "1", "datamix.request_id": "a", "padding": "x" * 10_000},
    )
    sink = pa.BufferOutputStream()
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, 4), np.float32))
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    assert wire.decode_request(sink.getvalue().to_pybytes()).request_id == "a"
    assert not headers_known()


def test_bytes_that_are_not_utf8_are_refused_by_memory_too() -> None:
    body = request("abcd", model="efgh")
    wire.decode_request(body)
    with pytest.raises(WireError):
        wire.decode_request(body.replace(b"efgh", b"ef\xff\xfe"))
