"""The wire: golden files, the layout pyarrow writes, round trips, and hostile bytes of every kind.

Golden files pin the format. Where it changes on purpose, with a new protocol version, write them
again: ``PYTHONPATH=. python tests/test_wire.py``.
"""

from __future__ import annotations

import gc
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamix import flat, framing, wire
from datamix.errors import DataMixError, NonFinite, TooLarge, WireError

Array = npt.NDArray[Any]

GOLDEN = Path(__file__).parent / "golden"
ARROW: dict[str, Any] = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()} | {
    "int16": pa.int16()
}
# Every hostile message carries this word in its values and its metadata: no error may repeat it.
SECRET = "PASSPORT"
GOOD = {"datamix.protocol": "1", "datamix.request_id": "r-1", "datamix.note": SECRET}
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from(wire.DTYPES)
ids = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)


# --- messages as pyarrow alone writes them ------------------------------------------------------


def tensors(values: Array, kind: Any = None) -> Any:
    """``values`` (rows, *shape) as a column of tensors; ``kind`` overrides its type."""
    kind = kind or pa.fixed_shape_tensor(ARROW[values.dtype.name], values.shape[1:])
    size = kind.storage_type.list_size
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size)
    return pa.ExtensionArray.from_storage(kind, storage)


def stream(
    columns: dict[Any, Any],
    metadata: dict[Any, Any] | None = None,
    *,
    batches: int = 1,
    codec: str | None = None,
    nullable: bool = True,
) -> bytes:
    """One Arrow IPC stream; ``metadata`` defaults to a request's."""
    fields = [pa.field(name, column.type, nullable=nullable) for name, column in columns.items()]
    schema = pa.schema(fields, GOOD if metadata is None else metadata)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    body: bytes = sink.getvalue().to_pybytes()
    return body


def f32(*values: Any) -> Array:
    return np.array(values, np.float32)


def secret_values(rows: int = 2, dtype: str = "float16") -> Array:
    """Finite values of shape (rows, 2, 4) whose bytes spell the secret."""
    raw = np.frombuffer(SECRET.encode() * 64, dtype)
    return raw[: rows * 8].reshape(rows, 2, 4)


def plain(dtype: str = "float16", rows: int = 2, **options: Any) -> bytes:
    """A good request; with int8 it has a scale."""
    columns = {"features": tensors(secret_values(rows, dtype))}
    if dtype in framing.STEPS:
        columns["scale"] = pa.array(np.full(rows, 0.5, np.float32))
    return stream(columns, **options)


def with_metadata(**changes: str | bytes | None) -> bytes:
    """A good request whose ``datamix.`` metadata has ``changes``; None takes a key away."""
    metadata: dict[Any, Any] = dict(GOOD)
    for key, value in changes.items():
        metadata[f"datamix.{key}"] = value
    return plain(metadata={k: v for k, v in metadata.items() if v is not None})


# --- lies that pyarrow would not write ----------------------------------------------------------


class Parts:
    """Where the parts of a message lie: its two pieces of metadata, and its body."""

    def __init__(self, message: bytes) -> None:
        self.bytes = bytearray(message)
        self.schema = 8
        schema_size = struct.unpack_from("<i", message, 4)[0]
        self.batch = self.schema + schema_size + 8
        batch_size = struct.unpack_from("<i", message, self.batch - 4)[0]
        self.body = self.batch + batch_size
        self.metadata = message[self.batch : self.body]

    def field(self, number: int) -> int:
        """Position of a field of the record batch: 0 length, 1 nodes, 2 buffers, 3 compression."""
        return flat._field(self.metadata, flat._header(self.metadata), number)

    def vector(self, number: int) -> int:
        """Absolute position of the first entry of a vector of (int64, int64)."""
        start: int = self.batch + flat._follow(self.metadata, self.field(number)) + 4
        return start


def lie(message: bytes, what: str, index: int, value: int) -> bytes:
    """``message`` with one 64-bit number of its record batch replaced.

    ``what`` is ``rows``, ``length`` or ``null_count`` of node ``index``, ``offset`` or ``size`` of
    buffer ``index``, or ``inflated``: the declared size of compressed buffer ``index``.
    """
    parts = Parts(message)
    if what == "rows":
        position = parts.batch + parts.field(0)
    elif what in ("length", "null_count"):
        position = parts.vector(1) + 16 * index + 8 * (what == "null_count")
    elif what in ("offset", "size"):
        position = parts.vector(2) + 16 * index + 8 * (what == "size")
    else:
        start = parts.vector(2) + 16 * index
        position = parts.body + struct.unpack_from("<q", parts.bytes, start)[0]
    struct.pack_into("<q", parts.bytes, position, value)
    return bytes(parts.bytes)


def big_endian() -> bytes:
    """A good request whose schema says that its buffers are big-endian.

    Arrow leaves out a field that has its default. A vtable entry may point anywhere after the
    table, so it is made to point at a 16-bit 1 that is there for another reason.
    """
    parts = Parts(plain())
    metadata = bytes(parts.bytes[parts.schema : parts.batch - 8])
    table = flat._header(metadata)
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    for offset in range(8, len(metadata) - table - 1, 2):
        if metadata[table + offset : table + offset + 2] == b"\x01\x00":
            struct.pack_into("<H", parts.bytes, parts.schema + vtable + 4, offset)
            return bytes(parts.bytes)
    raise AssertionError("no 16-bit 1 in the schema")


def with_dictionary() -> bytes:
    """A good request with another stream's dictionary batch before its record batch."""
    column = pa.array(["a", "b"]).dictionary_encode()
    other = stream({"features": column})
    start = Parts(other).batch - 8
    messages = pa.ipc.MessageReader.open_stream(other)
    messages.read_next_message()
    dictionary = messages.read_next_message()
    assert dictionary.type == "dictionary"
    size = len(dictionary.serialize())
    message = plain()
    cut = Parts(message).batch - 8
    return message[:cut] + other[start : start + size] + message[cut:]


def renulled(values: list[Any], kind: Any) -> bytes:
    return stream({"features": pa.ExtensionArray.from_storage(kind, pa.array(values))})


F16 = pa.fixed_shape_tensor(pa.float16(), [2, 4])


def inner_nulls() -> bytes:
    child = pa.array([None, *[np.float16(1)] * 15], pa.float16())
    storage = pa.FixedSizeListArray.from_arrays(child, 8)
    return stream({"features": pa.ExtensionArray.from_storage(F16, storage)})


def outer_nulls() -> bytes:
    storage = pa.array([None, [np.float16(1)] * 8], F16.storage_type)
    return stream({"features": pa.ExtensionArray.from_storage(F16, storage)})


def scaled(scale: Any, dtype: str = "int8") -> bytes:
    return stream({"features": tensors(secret_values(2, dtype)), "scale": scale})


def typed(value_type: Any) -> bytes:
    """Tensors of a value type that is not ours, over zeros."""
    kind = pa.fixed_shape_tensor(value_type, [2])
    storage = pa.array([[None, None]], kind.storage_type)
    return stream({"features": pa.ExtensionArray.from_storage(kind, storage)})


def shaped(shape: list[int], rows: int = 1, **options: Any) -> bytes:
    kind = pa.fixed_shape_tensor(pa.float16(), shape, **options)
    values = [[np.float16(1)] * kind.storage_type.list_size for _ in range(rows)]
    storage = pa.array(values, kind.storage_type)
    return stream({"features": pa.ExtensionArray.from_storage(kind, storage)})


def not_finite(dtype: str, value: float) -> bytes:
    values = np.ones((2, 2, 4), dtype)
    values[1, 0, 3] = value
    return stream({"features": tensors(values)})


ONES = np.ones(2, np.float32)
SEED_ROWS = np.frombuffer(SECRET.encode() * 8, np.int8).reshape(2, 32)


def seeded(values: Array = SEED_ROWS, scale: Array | None = ONES, noise: str = "1") -> bytes:
    """A request for noise; good by default."""
    columns = {"features": tensors(values)}
    if scale is not None:
        columns["scale"] = pa.array(scale.astype(np.float32))
    return stream(columns, metadata=GOOD | {"datamix.noise": noise})


HOSTILE: dict[str, tuple[Callable[[], bytes], type[DataMixError]]] = {
    # not Arrow
    "empty": (lambda: b"", WireError),
    "zeros": (lambda: bytes(200), WireError),
    "0xff": (lambda: b"\xff" * 200, WireError),
    "text": (lambda: SECRET.encode() * 20, WireError),
    "JSON": (lambda: b'{"inputs": [{"data": "PASSPORT"}]}', WireError),
    "PNG": (lambda: b"\x89PNG\r\n\x1a\n" + SECRET.encode(), WireError),
    "an Arrow file": (lambda: b"ARROW1\0\0" + plain(), WireError),
    "only the end": (lambda: END, WireError),
    "huge metadata length": (lambda: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + plain(), WireError),
    "negative metadata length": (lambda: b"\xff\xff\xff\xff\xf8\xff\xff\xff" + plain(), WireError),
    # framing
    "trailing byte": (lambda: plain() + b"\0", WireError),
    "trailing end": (lambda: plain() + END, WireError),
    "two messages": (lambda: plain() * 2, WireError),
    "no end": (lambda: plain()[:-8], WireError),
    "no batch": (lambda: plain(batches=0), WireError),
    "two batches": (lambda: plain(batches=2), WireError),
    "batch without schema": (lambda: plain()[Parts(plain()).batch - 8 :], WireError),
    "two schemas": (lambda: plain()[: Parts(plain()).batch - 8] + plain(), WireError),
    "dictionary batch": (with_dictionary, WireError),
    "big-endian": (big_endian, WireError),
    # columns
    "wrong name": (lambda: stream({"feature": tensors(secret_values())}), WireError),
    "name not UTF-8": (lambda: stream({b"\xff" + SECRET.encode(): pa.array(ONES)}), WireError),
    "no columns": (lambda: stream({}), WireError),
    "extra column": (
        lambda: stream({"features": tensors(secret_values()), "labels": pa.array([1, 2])}),
        WireError,
    ),
    "third column": (
        lambda: stream(
            {
                "features": tensors(secret_values(2, "int8")),
                "scale": pa.array(ONES),
                "labels": pa.array([1, 2]),
            }
        ),
        WireError,
    ),
    "wrong order": (
        lambda: stream({"scale": pa.array(ONES), "features": tensors(secret_values(2, "int8"))}),
        WireError,
    ),
    "no tensors": (lambda: stream({"features": pa.array(ONES)}), WireError),
    "lists": (
        lambda: stream({"features": pa.FixedSizeListArray.from_arrays(pa.array(ONES), 1)}),
        WireError,
    ),
    "dictionary column": (
        lambda: stream({"features": pa.array([SECRET, SECRET]).dictionary_encode()}),
        WireError,
    ),
    "strings": (lambda: stream({"features": pa.array([SECRET])}), WireError),
    "float64": (lambda: typed(pa.float64()), WireError),
    "uint8": (lambda: typed(pa.uint8()), WireError),
    "int32": (lambda: typed(pa.int32()), WireError),
    "bool": (lambda: typed(pa.bool_()), WireError),
    "tensors of strings": (lambda: typed(pa.utf8()), WireError),
    "tensors of structs": (lambda: typed(pa.struct([(SECRET, pa.int8())])), WireError),
    "tensors of lists": (lambda: typed(pa.list_(pa.field(SECRET, pa.int8()))), WireError),
    "tensors of times": (lambda: typed(pa.timestamp("s", SECRET)), WireError),
    # scale
    "int16 without scale": (
        lambda: stream({"features": tensors(secret_values(2, "int16"))}),
        WireError,
    ),
    "scale of int16 is float16": (
        lambda: scaled(pa.array(ONES.astype(np.float16)), "int16"),
        WireError,
    ),
    "scale of int16 has a null": (
        lambda: scaled(pa.array([1.0, None], pa.float32()), "int16"),
        WireError,
    ),
    "scale of int16 is NaN": (lambda: scaled(pa.array(f32(1, np.nan)), "int16"), NonFinite),
    "scale of int16 overflows": (lambda: scaled(pa.array(f32(1, 2e34)), "int16"), NonFinite),
    "int16 scale too short": (lambda: lie(plain("int16"), "length", 2, 1), WireError),
    "int16 scale buffer too short": (lambda: lie(plain("int16"), "size", 4, 4), WireError),
    "unsigned int16": (lambda: typed(pa.uint16()), WireError),
    "seeds as int16": (lambda: seeded(SEED_ROWS.astype(np.int16)), WireError),
    "int8 without scale": (
        lambda: stream({"features": tensors(secret_values(2, "int8"))}),
        WireError,
    ),
    "float16 with scale": (lambda: scaled(pa.array(ONES), "float16"), WireError),
    "float32 with scale": (lambda: scaled(pa.array(ONES), "float32"), WireError),
    "scale float64": (lambda: scaled(pa.array([1.0, 1.0])), WireError),
    "scale float16": (lambda: scaled(pa.array(ONES.astype(np.float16))), WireError),
    "scale null": (lambda: scaled(pa.array([1, None], pa.float32())), WireError),
    "scale a tensor": (lambda: scaled(tensors(np.ones((2, 1), np.float32))), WireError),
    "scale too short": (lambda: lie(plain("int8"), "length", 2, 1), WireError),
    # shapes
    "permuted": (lambda: shaped([2, 4], permutation=[1, 0]), WireError),
    "size zero": (lambda: shaped([0], 2), WireError),
    "size zero inside": (lambda: shaped([2, 0], 2), WireError),
    "scalars": (lambda: shaped([], 2), WireError),
    "9 dimensions": (lambda: shaped([1] * 9), WireError),
    "100 dimensions": (lambda: shaped([1] * 100), WireError),
    "enormous rows, none of them": (lambda: shaped([1 << 15, 1 << 15], 0), WireError),
    # nulls
    "null row": (outer_nulls, WireError),
    "null value": (inner_nulls, WireError),
    "null_count without nulls": (lambda: lie(plain(), "null_count", 0, 1), WireError),
    "null_count inside": (lambda: lie(plain(), "null_count", 1, 3), WireError),
    "null_count unknown": (lambda: lie(plain(), "null_count", 0, -1), WireError),
    "null_count of scale": (lambda: lie(plain("int8"), "null_count", 2, 1), WireError),
    # rows
    "zero rows": (lambda: plain(rows=0), WireError),
    "zero int8 rows": (lambda: plain("int8", rows=0), WireError),
    "too many rows": (lambda: plain(rows=5), TooLarge),
    "claims many rows": (lambda: lie(plain(), "rows", 0, 1 << 62), TooLarge),
    "claims more rows than columns": (lambda: lie(plain(), "rows", 0, 3), WireError),
    "negative rows": (lambda: lie(plain(), "rows", 0, -1), WireError),
    "column longer": (lambda: lie(plain(), "length", 0, 3), WireError),
    "values longer": (lambda: lie(plain(), "length", 1, 17), WireError),
    "too many bytes": (
        lambda: plain("float32", rows=4, metadata=GOOD | {"x": "y" * 4000}),
        TooLarge,
    ),
    # buffers
    "buffer before the body": (lambda: lie(plain(), "offset", 2, -8), WireError),
    "buffer past the body": (lambda: lie(plain(), "offset", 2, 8), WireError),
    "buffer offset overflows": (lambda: lie(plain(), "offset", 2, (1 << 63) - 1), WireError),
    "buffer too long": (lambda: lie(plain(), "size", 2, 1 << 40), WireError),
    "buffer negative": (lambda: lie(plain(), "size", 2, -1), WireError),
    "buffer too short": (lambda: lie(plain(), "size", 2, 31), WireError),
    "scale buffer too short": (lambda: lie(plain("int8"), "size", 4, 4), WireError),
    # metadata
    "no metadata": (lambda: plain(metadata={}), WireError),
    "no protocol": (lambda: with_metadata(protocol=None), WireError),
    "protocol 2": (lambda: with_metadata(protocol="2"), WireError),
    "protocol empty": (lambda: with_metadata(protocol=""), WireError),
    "no id": (lambda: with_metadata(request_id=None), WireError),
    "id empty": (lambda: with_metadata(request_id=""), WireError),
    "id too long": (lambda: with_metadata(request_id=SECRET * 8 + "x"), WireError),
    "id with space": (lambda: with_metadata(request_id=f"{SECRET} 1"), WireError),
    "id with newline": (lambda: with_metadata(request_id="r-1\n"), WireError),
    "id not ASCII": (lambda: with_metadata(request_id="r-é"), WireError),
    "id in foreign digits": (lambda: with_metadata(request_id="r-١"), WireError),
    "value not UTF-8": (lambda: with_metadata(request_id=b"\xff" + SECRET.encode()), WireError),
    "other value not UTF-8": (lambda: with_metadata(note=b"\xc3\x28"), WireError),
    "key not UTF-8": (lambda: plain(metadata={**GOOD, b"\xff": SECRET}), WireError),
    "model too long": (lambda: with_metadata(model="m" * 65), WireError),
    "model a path": (lambda: with_metadata(model=f"../{SECRET}"), WireError),
    "model empty": (lambda: with_metadata(model=""), WireError),
    "version a path": (lambda: with_metadata(model_version="1/2"), WireError),
    "block negative": (lambda: with_metadata(block="-1"), WireError),
    "block huge": (lambda: with_metadata(block="9" * 13), WireError),
    "block enormous": (lambda: with_metadata(block="9" * 2500), WireError),
    "block a fraction": (lambda: with_metadata(block="1.0"), WireError),
    "block empty": (lambda: with_metadata(block=""), WireError),
    "block in foreign digits": (lambda: with_metadata(block="١"), WireError),
    "block a secret": (lambda: with_metadata(block=SECRET), WireError),
    "deadline negative": (lambda: with_metadata(deadline_ms="-5"), WireError),
    "deadline infinite": (lambda: with_metadata(deadline_ms="inf"), WireError),
    "deadline huge": (lambda: with_metadata(deadline_ms="1" + "0" * 12), WireError),
    "priority 2": (lambda: with_metadata(priority="2"), WireError),
    "priority a word": (lambda: with_metadata(priority="high"), WireError),
    # seeds of noise
    "noise of another map": (lambda: seeded(noise="2"), WireError),
    "noise of no map": (lambda: seeded(noise=""), WireError),
    "noise of a secret map": (lambda: seeded(noise=SECRET), WireError),
    "seeds of 31 bytes": (lambda: seeded(np.zeros((2, 31), np.int8)), WireError),
    "seeds of 33 bytes": (lambda: seeded(np.zeros((2, 33), np.int8)), WireError),
    "seeds in two dimensions": (lambda: seeded(np.zeros((2, 8, 4), np.int8)), WireError),
    "seeds of float16": (lambda: seeded(np.zeros((2, 32), np.float16), None), WireError),
    "seeds of float32": (lambda: seeded(np.zeros((2, 32), np.float32), None), WireError),
    "seeds scaled": (lambda: seeded(scale=f32(1, 2)), WireError),
    "seeds scaled a little": (lambda: seeded(scale=f32(1, 1.0000001)), WireError),
    "seeds scaled to nothing": (lambda: seeded(scale=f32(0, 1)), WireError),
    "seeds scaled by NaN": (lambda: seeded(scale=f32(1, np.nan)), NonFinite),
    "seeds without rows": (lambda: seeded(SEED_ROWS[:0], SEED_ROWS[:0, 0]), WireError),
    # values
    "float16 NaN": (lambda: not_finite("float16", np.nan), NonFinite),
    "float16 Inf": (lambda: not_finite("float16", np.inf), NonFinite),
    "float16 -Inf": (lambda: not_finite("float16", -np.inf), NonFinite),
    "float16 -NaN": (lambda: not_finite("float16", -np.nan), NonFinite),
    "float32 NaN": (lambda: not_finite("float32", np.nan), NonFinite),
    "float32 Inf": (lambda: not_finite("float32", np.inf), NonFinite),
    "float32 -Inf": (lambda: not_finite("float32", -np.inf), NonFinite),
    "float32 -NaN": (lambda: not_finite("float32", -np.nan), NonFinite),
    "scale NaN": (lambda: scaled(pa.array(f32(1, np.nan))), NonFinite),
    "scale Inf": (lambda: scaled(pa.array(f32(np.inf, 1))), NonFinite),
    "scale -Inf": (lambda: scaled(pa.array(f32(1, -np.inf))), NonFinite),
    "scale that overflows": (lambda: scaled(pa.array(f32(1, 3e38))), NonFinite),
    # compression
    "lz4 bomb": (lambda: lie(plain(codec="lz4"), "inflated", 2, 1 << 40), TooLarge),
    "zstd bomb": (lambda: lie(plain(codec="zstd"), "inflated", 2, 1 << 40), TooLarge),
    "bomb in the largest number": (
        lambda: lie(plain(codec="zstd"), "inflated", 2, (1 << 63) - 1),
        TooLarge,
    ),
    "lz4 lies small": (lambda: lie(plain(rows=4, codec="lz4"), "inflated", 2, 8), WireError),
    "zstd lies small": (lambda: lie(plain(rows=4, codec="zstd"), "inflated", 2, 8), WireError),
    "lz4 lies large": (lambda: lie(plain(codec="lz4"), "inflated", 2, 3000), WireError),
    "zstd lies large": (lambda: lie(plain(codec="zstd"), "inflated", 2, 3000), WireError),
    "inflated size -2": (lambda: lie(plain(codec="lz4"), "inflated", 2, -2), WireError),
    "inflated size 0": (lambda: lie(plain(codec="lz4"), "inflated", 2, 0), WireError),
    "inflated size least": (lambda: lie(plain(codec="zstd"), "inflated", 2, -(1 << 63)), WireError),
    "stored but short": (lambda: lie(plain(rows=4, codec="lz4"), "inflated", 2, -1), WireError),
    "piece without a size": (lambda: lie(plain(codec="lz4"), "size", 2, 7), WireError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_input_gets_the_error_of_its_row(name: str) -> None:
    make, expected = HOSTILE[name]
    body = make()
    for dtype in wire.DTYPES:  # so that the layouts of good messages are remembered
        wire.decode_request(plain(dtype))
    with pytest.raises(DataMixError) as caught:
        wire.decode_request(body, max_bytes=4096, max_rows=4)
    assert type(caught.value) is expected, str(caught.value)
    check_sentence(caught.value)
    check_harmless(body)


def check_sentence(error: DataMixError) -> None:
    """One plain sentence that repeats nothing of the payload."""
    sentence = str(error)
    assert 0 < len(sentence) <= 200
    assert "\n" not in sentence
    assert SECRET not in sentence
    assert "PASS" not in sentence


def check_harmless(body: bytes) -> None:
    """Whatever the bytes, both decoders answer or raise ours, fast and without inflating much."""
    gc.disable()  # a full collection of all that other tests left takes a second, and is not ours
    try:
        _check_harmless(body)
    finally:
        gc.enable()


def _check_harmless(body: bytes) -> None:
    before, memory = time.thread_time(), pa.total_allocated_bytes()
    for decode in (wire.decode_request, wire.decode_response):
        try:
            message = decode(body, max_bytes=1 << 16, max_rows=64)
        except DataMixError as error:
            assert len(str(error)) <= 300
        else:
            assert message.features.nbytes <= 1 << 16
    assert isinstance(wire.peek_request_id(body), str)
    assert time.thread_time() - before < 0.5
    assert pa.total_allocated_bytes() - memory < 1 << 20


def test_the_table_starts_from_good_requests() -> None:
    # Else a mistake in the table's own helpers would make every row pass.
    for dtype in wire.DTYPES:
        for codec in (None, "lz4", "zstd"):
            request = wire.decode_request(plain(dtype, rows=4, codec=codec), max_bytes=4096)
            assert np.array_equal(request.features, secret_values(4, dtype))
    assert wire.decode_request(shaped([2, 4], rows=2)).rows == 2
    assert wire.decode_request(scaled(pa.array(ONES))).rows == 2
    same = lie(plain(), "rows", 0, 2)
    assert same == plain()


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_truncated_anywhere_is_refused(dtype: str, codec: str | None) -> None:
    body = plain(dtype, codec=codec)
    for end in range(len(body)):
        with pytest.raises(WireError):
            wire.decode_request(body[:end])


def test_an_error_frame_truncated_anywhere_is_refused() -> None:
    body = wire.encode_error("r-1", 503, "draining")
    for end in range(len(body)):
        with pytest.raises(WireError):
            wire.decode_response(body[:end])


# --- what is accepted though it looks odd -------------------------------------------------------


def test_a_validity_bitmap_without_nulls_is_accepted() -> None:
    # Arrow's Java writer always sends bitmaps; only a null count says that something is null.
    child = pa.Array.from_buffers(
        pa.float16(), 16, [pa.py_buffer(b"\xff" * 2), pa.py_buffer(secret_values().tobytes())], 0
    )
    bitmap = pa.py_buffer(b"\x03")
    storage = pa.Array.from_buffers(F16.storage_type, 2, [bitmap], 0, children=[child])
    message = stream({"features": pa.ExtensionArray.from_storage(F16, storage)})
    assert np.array_equal(wire.decode_request(message).features, secret_values())


def test_an_identity_permutation_and_names_of_dimensions_are_accepted() -> None:
    assert wire.decode_request(shaped([2, 4], permutation=[0, 1])).features.shape == (1, 2, 4)
    assert wire.decode_request(shaped([2, 4], dim_names=["h", "w"])).features.shape == (1, 2, 4)


def test_unknown_metadata_is_ignored() -> None:
    request = wire.decode_request(plain(metadata=GOOD | {"datamix.future": "é", "other": ""}))
    assert request.request_id == "r-1"


def test_columns_may_be_declared_nullable_or_not() -> None:
    for nullable in (True, False):
        assert wire.decode_request(plain(nullable=nullable)).rows == 2


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_compressed_messages_inflate_to_the_same(dtype: str, codec: str) -> None:
    values = np.resize(np.arange(8), (4, 6, 100)).astype(dtype)
    columns = {"features": tensors(values)}
    if dtype in framing.STEPS:
        columns["scale"] = pa.array(f32(1, 2, 3, 4))
    body = stream(columns, codec=codec)
    assert len(body) < len(stream(columns))  # it did compress
    request = wire.decode_request(body)
    assert np.array_equal(request.features, values)
    if dtype in framing.STEPS:
        assert request.scale is not None
        assert request.scale.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_the_inflated_size_counts_against_the_limit(codec: str) -> None:
    values = np.zeros((4, 1024), np.float32)
    body = stream({"features": tensors(values)}, codec=codec)
    assert len(body) < 2000 < values.nbytes
    assert wire.decode_request(body, max_bytes=values.nbytes).rows == 4
    with pytest.raises(TooLarge):
        wire.decode_request(body, max_bytes=values.nbytes - 1)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_bomb_is_refused_before_it_inflates(codec: str) -> None:
    body = stream({"features": tensors(np.zeros((4, 1 << 20), np.float32))}, codec=codec)
    assert len(body) < 1 << 17  # and would be 16 MiB
    before, memory = time.thread_time(), pa.total_allocated_bytes()
    for claimed in (4 << 20, 1 << 40, (1 << 63) - 1):
        with pytest.raises(TooLarge):
            wire.decode_request(lie(body, "inflated", 2, claimed), max_bytes=1 << 18)
    with pytest.raises(WireError):  # what it really holds is never inflated past what it claims
        wire.decode_request(lie(body, "inflated", 2, 1000), max_bytes=1 << 18)
    assert time.thread_time() - before < 0.5
    assert pa.total_allocated_bytes() - memory < 1 << 18


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_short_frame_never_shows_old_memory(codec: str) -> None:
    """A frame that inflates to less than declared would leave the rest of the buffer as it was:
    another client's values, which the cloud would then compute on and send back."""
    short = pa.Codec(codec).compress(b"\x01" * 10, asbytes=True)
    message = stream(
        {"features": tensors(np.zeros((1, 4096), np.int8)), "scale": pa.array(ONES[:1])},
        codec=codec,
    )
    parts = Parts(message)
    offset, _ = struct.unpack_from("<qq", parts.bytes, parts.vector(2) + 32)
    start = parts.body + offset + 8  # after the declared size, which stays 4096
    parts.bytes[start : start + len(short)] = short
    struct.pack_into("<q", parts.bytes, parts.vector(2) + 40, 8 + len(short))
    with pytest.raises(WireError):
        wire.decode_request(bytes(parts.bytes))


@given(data=st.data(), codec=st.sampled_from(["lz4", "zstd"]))
def test_corrupt_compressed_data_is_refused_or_of_the_right_size(
    data: st.DataObject, codec: str
) -> None:
    body = bytearray(plain(rows=4, codec=codec))
    start = Parts(bytes(body)).body
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(start, len(body) - 9))] = data.draw(st.integers(0, 255))
    try:
        assert wire.decode_request(bytes(body)).features.shape == (4, 2, 4)
    except DataMixError as error:
        check_sentence(error)


# --- fuzz ---------------------------------------------------------------------------------------

SEEDS = [
    plain(),
    plain("float32"),
    plain("int8"),
    plain(codec="lz4"),
    plain("int8", codec="zstd"),
    plain("int16"),
    wire.encode_error("r-1", 429, "queue full", retry_after_s=0.5),
    with_dictionary(),
    stream({"scale": pa.array(["x", None]), "features": pa.array([[1], None])}),
]


@settings(max_examples=1500)
@given(data=st.data())
def test_mutated_messages_never_escape_the_error_tree(data: st.DataObject) -> None:
    body = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, max(0, len(body) - 8)))
        match data.draw(st.sampled_from(["byte", "bit", "word", "cut", "insert", "copy"])):
            case "byte":
                body[where : where + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "bit" if where < len(body):
                body[where] ^= 1 << data.draw(st.integers(0, 7))
            case "word":
                word = data.draw(st.sampled_from([0, 1, -1, 1 << 31, 1 << 40, -(1 << 63)]))
                body[where : where + 8] = (word % (1 << 64)).to_bytes(8, "little")
            case "cut":
                del body[where : where + data.draw(st.integers(1, 64))]
            case "insert":
                body[where:where] = data.draw(st.binary(max_size=16))
            case _:
                start = data.draw(st.integers(0, max(0, len(body) - 16)))
                body[where : where + 16] = body[start : start + 16]
    check_harmless(bytes(body))


@given(noise=st.binary(max_size=300), prefix=st.integers(0, 200))
def test_noise_never_escapes_the_error_tree(noise: bytes, prefix: int) -> None:
    check_harmless(SEEDS[0][:prefix] + noise)


def test_every_byte_flipped_one_at_a_time() -> None:
    for seed in SEEDS[:3]:
        for position in range(len(seed)):
            body = bytearray(seed)
            body[position] ^= 0xFF
            check_harmless(bytes(body))


# --- the layout is Arrow's own ------------------------------------------------------------------


@given(dtype=dtypes, shape=shapes, rows=st.integers(0, 6), seed=st.integers(0, 9), extra=ids)
def test_our_bytes_are_those_of_pyarrows_writer(
    dtype: wire.Dtype, shape: tuple[int, ...], rows: int, seed: int, extra: str
) -> None:
    generator = np.random.default_rng(seed)
    features = (100 * generator.standard_normal((rows, *shape))).astype(dtype)
    scale = generator.random(rows).astype(np.float32) if dtype in framing.STEPS else None
    metadata = {"datamix.request_id": extra, "datamix.error": "späť"}
    columns: dict[str, Any] = {"features": tensors(features)}
    if scale is not None:
        columns["scale"] = pa.array(scale)
    assert framing.frame(features, scale, metadata) == stream(columns, metadata, nullable=False)


@given(st.data())
def test_what_we_write_plain_pyarrow_reads(data: st.DataObject) -> None:
    dtype, features = data.draw(dtypes), data.draw(floats())
    table = pa.ipc.open_stream(
        wire.encode_request(features, request_id="a", dtype=dtype)
    ).read_all()
    table.validate(full=True)
    column = table["features"].combine_chunks()
    values, scale = wire.quantise(features, dtype)
    assert np.array_equal(column.to_numpy_ndarray(), values)
    if scale is not None:
        assert np.array_equal(table["scale"].to_numpy(), scale)


def floats(limit: float = 6e4) -> st.SearchStrategy[Array]:
    """(rows, *shape) float32 that float16 can hold."""
    return hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=4),
        elements=st.floats(-limit, limit, width=32),
    )


# --- golden files -------------------------------------------------------------------------------


def golden_messages() -> dict[str, bytes]:
    """The messages of the golden files, made from fixed values."""
    features = np.arange(-12, 12, dtype=np.float32).reshape(4, 1, 2, 3) / 8
    answer: dict[str, Any] = {
        "dtype": "float16",
        "model": "fashion",
        "model_version": "3",
        "block": 1,
        "queue_s": 0.00125,
        "compute_s": 0.004,
        "batch_rows": 64,
        "close_reason": "engine_free",
    }
    return {
        "request-float16": wire.encode_request(features, request_id="golden-1"),
        "request-int16": wire.encode_request(
            features, request_id="golden-3", dtype="int16", step=2.0**-12
        ),
        "request-int8": wire.encode_request(
            features,
            request_id="golden-2",
            dtype="int8",
            model="fashion",
            model_version="3",
            block=1,
            deadline_s=1.5,
            priority=1,
        ),
        "response": wire.encode_response(features, request_id="golden-1", **answer),
        "error": wire.encode_error("golden-2", 429, "the queue is full", retry_after_s=0.25),
    }


@pytest.mark.parametrize("name", golden_messages())
def test_golden_files_are_byte_for_byte_what_we_write(name: str) -> None:
    assert (GOLDEN / f"{name}.arrow").read_bytes() == golden_messages()[name]


def test_there_is_no_golden_file_too_many() -> None:
    assert {path.stem for path in GOLDEN.glob("*.arrow")} == set(golden_messages())


@pytest.mark.parametrize("name", golden_messages())
def test_golden_files_are_ordinary_arrow(name: str) -> None:
    table = pa.ipc.open_stream((GOLDEN / f"{name}.arrow").read_bytes()).read_all()
    table.validate(full=True)
    assert table.schema.metadata[b"datamix.protocol"] == b"1"
    assert table.num_rows == (0 if name == "error" else 4)
    column = table["features"]
    assert isinstance(column.type, pa.FixedShapeTensorType)
    if name != "error":
        values = column.combine_chunks().to_numpy_ndarray().astype(np.float32)
        if name.startswith("request-int"):
            values *= table["scale"].to_numpy().reshape(4, 1, 1, 1)
        expected = np.arange(-12, 12, dtype=np.float32).reshape(4, 1, 2, 3) / 8
        assert np.allclose(values, expected, atol=0.01)


def test_golden_files_decode_to_what_went_in() -> None:
    def read(name: str) -> bytes:
        return (GOLDEN / f"{name}.arrow").read_bytes()

    first, second = (wire.decode_request(read(f"request-{d}")) for d in ("float16", "int8"))
    assert (first.request_id, first.dtype, first.features.shape) == (
        "golden-1",
        "float16",
        (4, 1, 2, 3),
    )
    assert (first.model, first.model_version, first.block) == (None, None, 0)
    assert (first.deadline_s, first.priority, first.scale) == (None, 0, None)
    assert (second.model, second.model_version, second.block) == ("fashion", "3", 1)
    assert (second.deadline_s, second.priority, second.rows) == (1.5, 1, 4)
    third = wire.decode_request(read("request-int16"))
    assert (third.dtype, third.features.shape) == ("int16", (4, 1, 2, 3))
    assert third.scale is not None and third.scale.tolist() == [2.0**-12] * 4
    assert third.features.ravel().tolist() == list(range(-12 * 512, 12 * 512, 512))
    response = wire.decode_response(read("response"))
    assert (response.status, response.error, response.retry_after_s) == (200, None, None)
    assert (response.queue_s, response.compute_s) == (0.00125, 0.004)
    assert (response.batch_rows, response.close_reason) == (64, "engine_free")
    error = wire.decode_response(read("error"))
    assert (error.status, error.error) == (429, "the queue is full")
    assert (error.retry_after_s, len(error.features)) == (0.25, 0)


def test_framing_stays_below_a_kilobyte() -> None:
    features = np.zeros((4, 16, 14, 14), np.float32)
    message = wire.encode_request(
        features, request_id="a" * 24, model="fashion-mnist-mix", model_version="1", deadline_s=30
    )
    assert len(message) - features.size * 2 < 1000


# --- round trips --------------------------------------------------------------------------------


@given(
    features=floats(),
    dtype=dtypes,
    request_id=ids,
    model=st.none() | ids,
    version=st.none() | ids,
    block=st.integers(0, 10**12 - 1),
    deadline_ms=st.none() | st.integers(0, 10**12 - 1),
    priority=st.sampled_from([0, 1]),
)
def test_a_request_comes_out_as_it_went_in(
    features: Array,
    dtype: wire.Dtype,
    request_id: str,
    model: str | None,
    version: str | None,
    block: int,
    deadline_ms: int | None,
    priority: int,
) -> None:
    message = wire.encode_request(
        features,
        dtype=dtype,
        request_id=request_id,
        model=model,
        model_version=version,
        block=block,
        deadline_s=None if deadline_ms is None else deadline_ms / 1000,
        priority=priority,
    )
    request = wire.decode_request(message)
    assert (request.request_id, request.model, request.model_version) == (
        request_id,
        model,
        version,
    )
    assert (request.block, request.priority) == (block, priority)
    if deadline_ms is None:
        assert request.deadline_s is None
    else:
        assert request.deadline_s is not None
        assert abs(request.deadline_s * 1000 - deadline_ms) <= 1  # rounded up to milliseconds
    assert (request.dtype, request.rows) == (dtype, len(features))
    values = wire.dequantise(request.features, request.scale)
    assert values.dtype == np.float32
    check_close(values, features, dtype, request.scale)
    assert wire.peek_request_id(message) == request_id


def check_close(got: Array, sent: Array, dtype: str, scale: Array | None) -> None:
    """Exact for float32, half a step for the others."""
    assert got.shape == sent.shape
    if dtype == "float32":
        assert np.array_equal(got, sent)
    elif dtype == "float16":
        assert np.array_equal(got, sent.astype(np.float16).astype(np.float32))
    else:
        assert scale is not None
        steps = scale.reshape(-1, *[1] * (sent.ndim - 1)).astype(np.float64)
        error = np.abs(got.astype(np.float64) - sent)
        assert np.all(error <= steps * 0.5 * (1 + 1e-4))


@given(
    seeds=hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.just(32))),
    request_id=ids,
    block=st.integers(0, 10**12 - 1),
    deadline_ms=st.none() | st.integers(0, 10**9),
    priority=st.integers(0, 1),
)
def test_seeds_come_out_as_they_went_in(
    seeds: Array, request_id: str, block: int, deadline_ms: int | None, priority: int
) -> None:
    deadline_s = None if deadline_ms is None else deadline_ms / 1000
    body = wire.encode_noise_request(
        seeds, request_id=request_id, block=block, deadline_s=deadline_s, priority=priority
    )
    for _ in range(2):  # read in full, and by what is remembered
        request = wire.decode_request(body)
        assert request.features.tobytes() == seeds.tobytes()
        assert request.features.dtype == np.int8 and request.features.shape == seeds.shape
        assert (request.noise, request.dtype) == (True, "float32")
        assert (request.request_id, request.block) == (request_id, block)
        assert (request.deadline_s, request.priority) == (deadline_s, priority)


def test_seeds_that_a_stranger_wrote_are_read_too() -> None:
    for body in (seeded(), seeded()):
        request = wire.decode_request(body)
        assert request.noise and request.features.tobytes() == SEED_ROWS.tobytes()


def test_int8_features_of_a_seeds_shape_are_no_seeds() -> None:
    seeds = SEED_ROWS.view(np.uint8)
    wire.decode_request(wire.encode_noise_request(seeds, request_id="a"))
    plain = wire.encode_request(SEED_ROWS.astype(np.float32), request_id="a", dtype="int8")
    request = wire.decode_request(plain)
    assert (request.noise, request.dtype) == (False, "int8")


@pytest.mark.parametrize("kind", [np.int8, np.float32])
def test_only_seeds_are_sent_as_seeds(kind: Any) -> None:
    with pytest.raises(WireError, match="expected"):
        wire.encode_noise_request(np.zeros((2, 31), kind), request_id="a")
    with pytest.raises(WireError, match="expected"):
        wire.encode_noise_request(np.zeros((0, 32), np.uint8), request_id="a")
    with pytest.raises(WireError, match="request_id"):
        wire.encode_noise_request(np.zeros((2, 32), np.uint8), request_id="a b")


@given(floats(limit=2.0**127))
@example(f32([3.4e38, -3.4e38]))
@example(f32([1e-45, -1e-45]))
@example(np.zeros((2, 3), np.float32))
def test_int16_is_wrong_by_half_a_step_at_most(features: Array) -> None:
    values, scale = wire.quantise(features, "int16")
    assert values.dtype == np.int16
    assert scale is not None and np.all(scale > 0)
    check_close(wire.dequantise(values, scale), features, "int16", scale)


@given(st.integers(-30, 30), hnp.arrays(np.int16, (2, 7), elements=st.integers(-32767, 32767)))
def test_multiples_of_a_step_come_out_exactly(exponent: int, steps: Array) -> None:
    step = 2.0**exponent
    sent = (steps * step).astype(np.float32)
    request = wire.decode_request(
        wire.encode_request(sent, request_id="a", dtype="int16", step=step)
    )
    assert np.array_equal(request.features, steps)
    assert request.scale is not None and (request.scale == step).all()
    assert np.array_equal(wire.dequantise(request.features, request.scale), sent)


@pytest.mark.parametrize("dtype", framing.STEPS)
def test_what_exceeds_a_step_is_refused_and_not_cut_off(dtype: wire.Dtype) -> None:
    most = framing.STEPS[dtype]
    wire.encode_request(f32([most, -most]), request_id="a", dtype=dtype, step=1.0)
    for value in (most + 1, -most - 1):
        with pytest.raises(NonFinite, match=f"exceed {most} steps of 1, which {dtype} holds"):
            wire.encode_request(f32([value]), request_id="a", dtype=dtype, step=1.0)


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-45, 1e38, np.nan, np.inf])
def test_a_step_that_is_none_is_refused(step: float) -> None:
    with pytest.raises(WireError, match="step is"):
        wire.encode_request(f32([0.0]), request_id="a", dtype="int16", step=step)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_have_no_step(dtype: wire.Dtype) -> None:
    with pytest.raises(WireError, match=f"step is 1 for {dtype}, expected one with int8 and int16"):
        wire.encode_request(f32([0.0]), request_id="a", dtype=dtype, step=1.0)


@given(floats(limit=2.0**127))
@example(np.full((1, 2), 2.66e-43, np.float32))  # 190 times the smallest float: 1.5 steps, not 1
@example(f32([1e-45, -1e-45]))
@example(np.zeros((2, 3), np.float32))
@example(f32([3.4e38, -3.4e38]))
def test_int8_is_wrong_by_half_a_step_at_most(features: Array) -> None:
    values, scale = wire.quantise(features, "int8")
    assert values.dtype == np.int8
    assert scale is not None
    assert scale.dtype == np.float32
    assert np.all(scale > 0)
    check_close(wire.dequantise(values, scale), features, "int8", scale)


@given(features=floats(), dtype=dtypes, retry=st.none() | st.integers(0, 10**6))
def test_a_response_comes_out_as_it_went_in(
    features: Array, dtype: wire.Dtype, retry: int | None
) -> None:
    message = wire.encode_response(
        features,
        dtype=dtype,
        request_id="r-2",
        model="m",
        model_version="1",
        block=2,
        queue_s=0.5,
        compute_s=0.25,
        batch_rows=9,
        close_reason="full",
    )
    response = wire.decode_response(message)
    assert (response.request_id, response.status, response.model) == ("r-2", 200, "m")
    assert (response.model_version, response.block, response.batch_rows) == ("1", 2, 9)
    assert (response.queue_s, response.compute_s) == (0.5, 0.25)
    assert (response.close_reason, response.error) == ("full", None)
    check_close(response.values(), features, dtype, response.scale)
    retry_after_s = None if retry is None else retry / 1000
    error = wire.decode_response(wire.encode_error("r-2", 429, "späť", retry_after_s=retry_after_s))
    assert (error.status, error.error, error.request_id) == (429, "späť", "r-2")
    assert error.features.shape[0] == 0
    if retry_after_s is not None:
        assert error.retry_after_s == pytest.approx(retry_after_s, abs=0.0011)


def test_an_error_about_an_unknown_request_has_an_id_too() -> None:
    assert wire.decode_response(wire.encode_error("", 400, "not Arrow")).request_id == "-"


@pytest.mark.parametrize("status", ["-1", "1e2", SECRET, "9" * 13, ""])
def test_a_response_with_a_bad_status_is_no_message(status: str) -> None:
    with pytest.raises(WireError):
        wire.decode_response(with_metadata(status=status))


def test_a_response_whose_status_is_zero_is_not_taken_for_an_answer() -> None:
    assert wire.decode_response(with_metadata(status="0")).status != 200


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_response_that_is_not_finite_is_for_the_device_to_refuse(dtype: str) -> None:
    response = wire.decode_response(not_finite(dtype, np.nan))
    assert not wire.is_finite(response.values())


def test_an_int8_response_whose_scale_overflows_is_not_finite() -> None:
    response = wire.decode_response(scaled(pa.array(f32(1, 3e38))))
    assert not wire.is_finite(response.values())


def test_responses_have_limits_too() -> None:
    message = plain("float32", rows=4)
    with pytest.raises(TooLarge):
        wire.decode_response(message, max_bytes=len(message) - 1)
    with pytest.raises(TooLarge):
        wire.decode_response(message, max_rows=3)
    assert len(wire.decode_response(message, max_bytes=len(message), max_rows=4).features) == 4


# --- no copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_decoding_copies_nothing(dtype: str, kind: Any) -> None:
    body = kind(plain(dtype))
    request = wire.decode_request(body)
    raw = np.frombuffer(body, np.uint8)
    assert np.shares_memory(request.features, raw)
    if dtype in framing.STEPS:
        assert request.scale is not None
        assert np.shares_memory(request.scale, raw)
    if kind is not bytearray:
        assert not request.features.flags.writeable


def test_features_outlive_the_name_of_their_message() -> None:
    request = wire.decode_request(plain())
    assert np.array_equal(request.features, secret_values())


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        ("float32", 1.0),  # the message
        ("float16", 0.5 + 0.5),  # the values in their new type, and the message
        ("int16", 1.0 + 0.5),
        ("int8", 1.0 + 0.25),  # the quotients, and the values in their new type; then the message
    ],
)
def test_encoding_copies_no_more_than_it_must(dtype: wire.Dtype, most: float) -> None:
    values = np.random.default_rng(0).standard_normal((4, 1 << 16), np.float32)
    wire.encode_request(values, request_id="first", dtype=dtype)  # remembers the layout
    tracemalloc.start()
    try:
        wire.encode_request(values, request_id="second", dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / values.nbytes == pytest.approx(most, abs=0.01)


# --- values -------------------------------------------------------------------------------------


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32]),
        hnp.array_shapes(min_side=0, max_dims=3),
        elements={"allow_nan": True, "allow_infinity": True},
        fill=st.nothing(),
    )
)
def test_is_finite_agrees_with_numpy(values: Array) -> None:
    assert wire.is_finite(values) == bool(np.isfinite(values).all())


def test_is_finite_knows_every_float16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    found = np.array([wire.is_finite(every[i : i + 1]) for i in range(len(every))])
    assert np.array_equal(found, np.isfinite(every))


@pytest.mark.parametrize("value", [65520, -65520, 1e5, 3e38])
def test_values_too_large_for_float16_are_refused_not_sent_as_infinity(value: float) -> None:
    features = f32([1, value])
    with pytest.raises(NonFinite):
        wire.encode_request(features, request_id="a")
    assert wire.decode_request(wire.encode_request(features, request_id="a", dtype="float32"))
    largest = f32([65504, 65519])
    decoded = wire.decode_request(wire.encode_request(largest, request_id="a"))
    assert decoded.features.tolist() == [[65504, 65504]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_values_that_are_not_finite_are_never_sent(dtype: wire.Dtype, value: float) -> None:
    with pytest.raises(NonFinite):
        wire.encode_request(f32([1, value]), request_id="a", dtype=dtype)


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_doubles_too_large_for_the_wire_are_refused(dtype: wire.Dtype) -> None:
    with pytest.raises(NonFinite):
        wire.encode_request(np.array([[1.0, 1e300]]), request_id="a", dtype=dtype)


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_any_memory_layout_and_float_type_may_be_sent(dtype: wire.Dtype) -> None:
    values = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    for features in (
        values,
        values.astype(np.float16),
        np.asfortranarray(values),
        values.astype(np.float32)[:, ::-1, ::2],
        values.transpose(2, 0, 1),
    ):
        request = wire.decode_request(wire.encode_request(features, request_id="a", dtype=dtype))
        assert np.allclose(wire.dequantise(request.features, request.scale), features, atol=0.1)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"request_id": ""},
        {"request_id": "a" * 65},
        {"request_id": "a b"},
        {"request_id": "a\n"},
        {"model": "../x"},
        {"model": ""},
        {"model_version": "1/2"},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"block": -1},
        {"block": 10**12},
        {"priority": 2},
        {"priority": -1},
        {"deadline_s": float("nan")},
        {"deadline_s": float("inf")},
        {"deadline_s": 1e10},
    ],
    ids=str,
)
def test_arguments_that_cannot_travel_are_refused_at_once(arguments: dict[str, Any]) -> None:
    features = np.ones((1, 2), np.float32)
    with pytest.raises(WireError) as caught:
        wire.encode_request(features, **({"request_id": "a"} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 0)])
def test_features_without_rows_or_values_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="shape"):
        wire.encode_request(np.ones(shape, np.float32), request_id="a")


def test_a_deadline_in_the_past_travels_as_none_left() -> None:
    message = wire.encode_request(np.ones((1, 2), np.float32), request_id="a", deadline_s=-3)
    assert wire.decode_request(message).deadline_s == 0


# --- finding the id in broken messages ----------------------------------------------------------


def test_the_id_is_found_though_the_columns_are_bad() -> None:
    assert wire.peek_request_id(typed(pa.float64())) == "r-1"
    assert wire.peek_request_id(plain()[: Parts(plain()).batch]) == "r-1"


@pytest.mark.parametrize(
    "name", ["empty", "text", "0xff", "no id", "id too long", "id with newline"]
)
def test_where_there_is_no_good_id_none_is_made_up(name: str) -> None:
    assert wire.peek_request_id(HOSTILE[name][0]()) == "-"


@given(st.binary(max_size=200))
def test_peeking_never_raises(noise: bytes) -> None:
    assume(not noise.startswith(SEEDS[0][:8]))
    assert wire.peek_request_id(noise) == "-"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for golden_name, golden_bytes in golden_messages().items():
        (GOLDEN / f"{golden_name}.arrow").write_bytes(golden_bytes)
        print(f"wrote {golden_name}.arrow, {len(golden_bytes)} bytes")
