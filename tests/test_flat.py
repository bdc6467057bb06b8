"""The walk through Arrow's FlatBuffers: it reads what Arrow wrote, and a lie cannot lead it astray.

pyarrow itself is the reference for honest metadata. For hostile metadata the only promise is
ValueError, in time that does not depend on what a length field claims.
"""

from __future__ import annotations

import struct
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix import flat

COLUMN_TYPES = [pa.int8(), pa.float16(), pa.float32(), pa.int64()]


def metadata_of(batch: Any, codec: str | None = None) -> bytes:
    """The metadata of the message that pyarrow makes of ``batch``."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()  # the schema
    metadata: bytes = messages.read_next_message().metadata.to_pybytes()
    return metadata


def batch_of(types: list[Any], rows: int, nulls: bool) -> Any:
    columns = []
    for kind in types:
        value: Any = [1, 2, 3] if pa.types.is_fixed_size_list(kind) else 1
        values = [None if nulls and i % 2 else value for i in range(rows)]
        columns.append(pa.array(values, kind))
    return pa.RecordBatch.from_arrays(columns, [f"c{i}" for i in range(len(columns))])


@given(
    types=st.lists(st.sampled_from(COLUMN_TYPES), min_size=1, max_size=5),
    rows=st.integers(0, 20),
    nulls=st.booleans(),
    codec=st.sampled_from([None, "lz4", "zstd"]),
)
def test_the_layout_is_what_arrow_wrote(
    types: list[Any], rows: int, nulls: bool, codec: str | None
) -> None:
    batch = batch_of(types, rows, nulls)
    layout = flat.batch_layout(metadata_of(batch, codec))
    assert layout.rows == rows
    assert layout.codec == codec
    assert list(layout.nodes) == [(len(c), c.null_count) for c in batch.columns]
    assert len(layout.buffers) == 2 * len(types)  # validity and values
    if codec is None:
        sizes = [rows * c.type.bit_width // 8 for c in batch.columns]
        for (offset, length), size in zip(layout.buffers[1::2], sizes, strict=True):
            assert offset % 8 == 0
            assert size <= length <= size + 7


def test_children_follow_their_parent_depth_first() -> None:
    batch = batch_of([pa.list_(pa.int8(), 3), pa.float32()], rows=5, nulls=False)
    layout = flat.batch_layout(metadata_of(batch))
    assert layout.nodes == ((5, 0), (15, 0), (5, 0))
    assert len(layout.buffers) == 1 + 2 + 2


def test_a_schema_is_little_endian_unless_it_says_otherwise() -> None:
    schema = pa.schema([pa.field("features", pa.int8())])
    metadata = pa.ipc.read_message(schema.serialize()).metadata.to_pybytes()
    assert flat.is_little_endian(metadata)
    assert not flat.is_little_endian(big_endian(metadata))


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=80), max_size=10))
def test_the_values_of_metadata_are_where_arrow_put_them(metadata: dict[str, str]) -> None:
    schema = pa.schema([("a", pa.int8())], metadata)
    header = pa.ipc.read_message(schema.serialize()).metadata.to_pybytes()
    found = flat.metadata_values(header)
    assert {k.decode(): header[a:b].decode() for k, a, b in found} == metadata


def test_more_metadata_than_ours_is_refused() -> None:
    schema = pa.schema([("a", pa.int8())], {str(i): "x" for i in range(17)})
    header = pa.ipc.read_message(schema.serialize()).metadata.to_pybytes()
    with pytest.raises(ValueError, match="17 entries"):
        flat.metadata_values(header)


def big_endian(metadata: bytes) -> bytes:
    """The schema message ``metadata`` with its endianness field present and set to Big.

    Arrow leaves out a field that has its default. A vtable entry may point anywhere after the
    table, so it is made to point at a 16-bit 1 that is there for another reason.
    """
    table = flat._header(metadata)
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    assert struct.unpack_from("<H", metadata, vtable + 4)[0] == 0
    one = next(
        offset
        for offset in range(8, len(metadata) - table - 1, 2)
        if metadata[table + offset : table + offset + 2] == b"\x01\x00"
    )
    changed = bytearray(metadata)
    struct.pack_into("<H", changed, vtable + 4, one)
    return bytes(changed)


HONEST = metadata_of(batch_of([pa.list_(pa.int8(), 3), pa.float32()], 5, False), "lz4")
SCHEMA = pa.ipc.read_message(
    pa.schema([("a", pa.int8())], {"key": "value", "other": ""}).serialize()
).metadata.to_pybytes()


@pytest.mark.parametrize("read", [flat.batch_layout, flat.is_little_endian, flat.metadata_values])
def test_cut_metadata_is_refused_or_read_within_its_bounds(read: Any) -> None:
    whole = HONEST if read is flat.batch_layout else SCHEMA
    refused = 0
    for end in range(len(whole)):
        try:
            read(whole[:end])
        except ValueError:
            refused += 1
    assert refused >= 32  # what lies there is always read


@given(data=st.data(), schema=st.booleans())
def test_a_lying_offset_raises_value_error_and_nothing_else(
    data: st.DataObject, schema: bool
) -> None:
    changed = bytearray(SCHEMA if schema else HONEST)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(changed) - 4))
        word = data.draw(st.sampled_from([0, 1, 7, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
        struct.pack_into("<I", changed, where, word)
    check_harmless(bytes(changed))


@given(st.binary(max_size=400))
def test_noise_raises_value_error_and_nothing_else(noise: bytes) -> None:
    check_harmless(noise)


def check_harmless(metadata: bytes) -> None:
    before = time.thread_time()
    for read in (flat.batch_layout, flat.is_little_endian, flat.metadata_values):
        try:
            read(metadata)
        except ValueError as error:
            assert len(str(error)) < 60
    assert time.thread_time() - before < 0.2


@pytest.mark.parametrize("count", [17, 1_000_000, 0xFFFFFFFF])
@pytest.mark.parametrize("field", [1, 2], ids=["nodes", "buffers"])
def test_a_claimed_count_of_entries_is_checked_before_it_is_believed(
    count: int, field: int
) -> None:
    vector = flat._follow(HONEST, flat._field(HONEST, flat._header(HONEST), field))
    changed = bytearray(HONEST)
    struct.pack_into("<I", changed, vector, count)
    with pytest.raises(ValueError, match="entries"):
        flat.batch_layout(bytes(changed))


def test_an_unknown_codec_or_method_is_refused() -> None:
    batch = flat._header(HONEST)
    compression = flat._follow(HONEST, flat._field(HONEST, batch, 3))
    zstd = metadata_of(batch_of([pa.int8()], 5, False), "zstd")
    codec = flat._field(zstd, flat._follow(zstd, flat._field(zstd, flat._header(zstd), 3)), 0)
    assert flat._field(HONEST, compression, 0) == 0  # lz4 is the default and left out
    changed = bytearray(zstd)
    changed[codec] = 9
    with pytest.raises(ValueError, match="unknown compression"):
        flat.batch_layout(bytes(changed))


def test_what_is_remembered_is_small() -> None:
    # The layout of a message is remembered by its metadata, which a stranger chooses: a few
    # hundred messages with megabytes of it must not stay in memory.
    batch = pa.RecordBatch.from_arrays([pa.array(np.zeros(2, np.int8))], ["a"])
    metadata = metadata_of(batch)
    assert flat.batch_layout(metadata).rows == 2
    with pytest.raises(ValueError, match="bytes"):
        flat.batch_layout(metadata + bytes(1 << 16))
    assert not hasattr(flat.is_little_endian, "cache_info")  # its key holds the request id
