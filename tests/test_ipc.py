"""Arrow messages without pyarrow: the same answers to good messages and to bad ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamix import framing, ipc, wire
from datamix.bundle import read_manifest
from datamix.errors import BundleError, DataMixError, WireError
from datamix.unframing import _open
from tests.test_wire import GOLDEN, HOSTILE, check_harmless, check_sentence, plain, secret_values

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
FILES = sorted(GOLDEN.glob("*.arrow"))
fixture_is_fine = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def forget() -> None:
    """Nothing that the other way wrote or read is to be remembered."""
    framing.template.cache_clear()
    wire._response_template.cache_clear()
    wire.requests.forget()
    wire.responses.forget()


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if pyarrow were not installed."""
    forget()
    monkeypatch.setattr(ipc, "arrow", None)
    yield
    forget()


@given(
    dtype=st.sampled_from(wire.DTYPES),
    shape=SHAPES,
    rows=st.integers(0, 4),
    metadata=st.dictionaries(st.text(max_size=12), st.binary(max_size=20), max_size=12),
)
def test_pyarrow_reads_what_is_written_without_it(
    dtype: wire.Dtype, shape: tuple[int, ...], rows: int, metadata: dict[str, bytes]
) -> None:
    features = np.arange(rows * int(np.prod(shape))).astype(dtype).reshape(rows, *shape)
    scale = np.arange(rows, dtype=np.float32) if dtype in framing.STEPS else None
    start = ipc.schema_message(dtype, shape, metadata) + ipc.batch_header(dtype, shape, rows)
    body = b"".join(framing.Template((start,), ()).fill((), features, scale))
    with pa.ipc.open_stream(body) as reader:
        found = reader.schema.metadata or {}
        assert found == {key.encode(): value for key, value in metadata.items()}
        (batch,) = list(reader)
    batch.validate(full=True)
    assert isinstance(batch.schema.field(0).type, pa.FixedShapeTensorType)
    assert not batch.schema.field(0).nullable
    if rows:
        np.testing.assert_array_equal(batch.column(0).to_numpy_ndarray(), features)
    if scale is not None:
        np.testing.assert_array_equal(batch.column(1).to_numpy(), scale)
    assert alike(ipc.open_stream(body), _open(body))


def alike(ours: ipc.Opened, theirs: ipc.Opened) -> bool:
    """Whether two readers found the same; the body is compared by its bytes."""
    same = ours._replace(body=theirs.body) == theirs
    return same and bytes(ours.body) == bytes(theirs.body)


def test_of_a_key_that_comes_twice_everybody_takes_the_first() -> None:
    pairs = [
        ("datamix.protocol", "1"),
        ("datamix.request_id", "one"),
        ("datamix.request_id", "two"),
    ]
    twice = pa.KeyValueMetadata([(key.encode(), value.encode()) for key, value in pairs])
    with pa.ipc.open_stream(plain()) as reader:
        batch = reader.read_next_batch()
    sink = pa.BufferOutputStream()
    schema = batch.schema.with_metadata(twice)
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    body = sink.getvalue().to_pybytes()
    assert alike(ipc.open_stream(body), _open(body))
    assert wire.decode_request(body).request_id == wire.peek_request_id(body) == "one"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_both_readers_find_the_same_in_golden_files(file: Path) -> None:
    body = file.read_bytes()
    assert alike(ipc.open_stream(body), _open(body))


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_both_readers_find_the_same_in_what_pyarrow_writes(dtype: str) -> None:
    for rows in (1, 4):
        body = plain(dtype, rows=rows)
        assert alike(ipc.open_stream(body), _open(body))


@pytest.mark.usefixtures("lean")
@fixture_is_fine
@given(
    dtype=st.sampled_from(wire.DTYPES),
    shape=SHAPES,
    rows=st.integers(1, 4),
    block=st.integers(0, 3),
    deadline_s=st.none() | st.floats(0, 100),
)
def test_requests_and_responses_go_round(
    dtype: wire.Dtype, shape: tuple[int, ...], rows: int, block: int, deadline_s: float | None
) -> None:
    features = np.random.default_rng(0).standard_normal((rows, *shape)).astype(np.float32)
    options: dict[str, Any] = {"dtype": dtype, "request_id": "r-1", "model": "m", "block": block}
    body = wire.encode_request(features, deadline_s=deadline_s, **options)
    request = wire.decode_request(body)
    assert (request.model, request.block, request.dtype) == ("m", block, dtype)
    assert (request.deadline_s is None) == (deadline_s is None)
    found = wire.dequantise(request.features, request.scale)
    np.testing.assert_allclose(found, features, atol=0.04)
    times = {"queue_s": 0.1, "compute_s": 0.2, "batch_rows": 4, "close_reason": "full"}
    answer = wire.encode_response(features, model_version="1", **options, **times)
    response = wire.decode_response(answer)
    np.testing.assert_allclose(response.values(), features, atol=0.04)
    assert (response.status, response.batch_rows) == (200, 4)


COMPRESSED = {name for name in HOSTILE if "bomb" in name}


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("name", HOSTILE)
def test_bad_input_gets_the_same_error(name: str) -> None:
    make, expected = HOSTILE[name]
    body = make()
    for dtype in wire.DTYPES:  # so that the layouts of good messages are remembered
        wire.decode_request(plain(dtype))
    with pytest.raises(DataMixError) as caught:
        wire.decode_request(body, max_bytes=4096, max_rows=4)
    assert type(caught.value) is (WireError if name in COMPRESSED else expected)
    check_sentence(caught.value)
    check_harmless(body)


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_messages_take_pyarrow(codec: str) -> None:
    with pytest.raises(WireError, match="message is compressed, which takes pyarrow to read"):
        wire.decode_request(plain(codec=codec))


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_every_byte_flipped_and_every_length(dtype: str) -> None:
    body = plain(dtype)
    for at in range(len(body)):
        flipped = bytearray(body)
        flipped[at] ^= 0xFF
        for damaged in (bytes(flipped), body[:at]):
            try:
                wire.decode_request(damaged)
            except DataMixError as error:
                check_sentence(error)
            else:
                assert damaged is not body[:at]


@pytest.mark.usefixtures("lean")
@settings(parent=fixture_is_fine, max_examples=300)
@given(
    file=st.sampled_from(FILES),
    changes=st.lists(
        st.tuples(st.integers(0, 2000), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])), max_size=6
    ),
)
def test_damaged_messages_never_escape_the_error_tree(
    file: Path, changes: list[tuple[int, int]]
) -> None:
    body = bytearray(file.read_bytes())
    for at, value in changes:
        body[at % len(body)] = value
    check_harmless(bytes(body))


@pytest.mark.usefixtures("lean")
@given(noise=st.binary(max_size=400), prefix=st.integers(0, 700))
@fixture_is_fine
def test_noise_never_escapes_the_error_tree(noise: bytes, prefix: int) -> None:
    check_harmless(plain()[:prefix] + noise)


@pytest.mark.usefixtures("lean")
def test_a_decoded_message_is_a_view() -> None:
    body = plain()
    found = wire.decode_request(body).features
    assert np.shares_memory(found, np.frombuffer(body, np.uint8))
    np.testing.assert_array_equal(found, secret_values())


def test_a_uri_takes_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    with pytest.raises(BundleError, match="is a URI, which takes pyarrow to read"):
        read_manifest("s3://bucket/bundle")
