"""The few fields of Arrow's IPC metadata that pyarrow reads but does not show.

A hostile message can claim to inflate to a terabyte, or to be big-endian. pyarrow only notices
while it inflates, so :mod:`datamix.wire` looks first. The metadata is a FlatBuffer
(https://flatbuffers.dev/internals): a table points back to its vtable, which holds the offset of
each field or 0 where the field is absent. Field numbers are those of Arrow's ``Message.fbs`` and
``Schema.fbs``. ``struct`` checks every access against the buffer's end, so a lying offset raises.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

_I8 = struct.Struct("<b")
_I16 = struct.Struct("<h")
_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_PAIR = struct.Struct("<qq")

_CODECS = {0: "lz4", 1: "zstd"}
_MAX_ENTRIES = 16  # two columns need 3 nodes and 5 buffers; more is not our message
_MAX_BYTES = 4096  # of a record batch's metadata; ours takes 200 to 300


class BatchLayout(NamedTuple):
    """What the header of one record batch says about its body.

    Attributes:
        rows: number of rows.
        codec: ``"lz4"``, ``"zstd"`` or None where the buffers are not compressed.
        nodes: ``(length, null_count)`` of each column and child, in depth-first order.
        buffers: ``(offset, length)`` of each buffer in the body, in bytes.
    """

    rows: int
    codec: str | None
    nodes: tuple[tuple[int, int], ...]
    buffers: tuple[tuple[int, int], ...]


def _field(data: bytes, table: int, number: int) -> int:
    """Absolute position of field ``number`` of the table at ``table``; 0 where it is absent."""
    if table < 0:
        raise ValueError("offset before the start")
    vtable = table - _I32.unpack_from(data, table)[0]
    if vtable < 0:
        raise ValueError("offset before the start")
    slot = 4 + 2 * number
    if slot >= _U16.unpack_from(data, vtable)[0]:
        return 0
    offset: int = _U16.unpack_from(data, vtable + slot)[0]
    return table + offset if offset else 0


def _follow(data: bytes, position: int) -> int:
    """Where the reference stored at ``position`` points."""
    target: int = position + _U32.unpack_from(data, position)[0]
    return target


def _pairs(data: bytes, position: int) -> tuple[tuple[int, int], ...]:
    """The vector of (int64, int64) structs that the reference at ``position`` points at."""
    start = _follow(data, position)
    count = _U32.unpack_from(data, start)[0]
    if count > _MAX_ENTRIES:
        raise ValueError(f"{count} entries")
    return tuple(_PAIR.unpack_from(data, start + 4 + 16 * i) for i in range(count))


def _header(data: bytes) -> int:
    """Position of the table that a ``Message`` wraps: field 2, after version and header type."""
    position = _field(data, _U32.unpack_from(data, 0)[0], 2)
    if not position:
        raise ValueError("message without a header")
    return _follow(data, position)


def batch_layout(metadata: bytes) -> BatchLayout:
    """Read the layout out of a record batch message's metadata.

    Raises:
        ValueError: the metadata is not what Arrow would write for a small record batch.
    """
    if len(metadata) > _MAX_BYTES:  # before it becomes a key that the cache holds on to
        raise ValueError(f"{len(metadata)} bytes")
    return _batch_layout(metadata)


# Devices of one model send the same header again and again; only the first costs a walk.
@lru_cache(maxsize=256)
def _batch_layout(metadata: bytes) -> BatchLayout:
    try:
        batch = _header(metadata)
        length, nodes, buffers, compression = (_field(metadata, batch, n) for n in range(4))
        codec = None
        if compression:
            table = _follow(metadata, compression)
            kind, method = _field(metadata, table, 0), _field(metadata, table, 1)
            if method and _I8.unpack_from(metadata, method)[0] != 0:
                raise ValueError("compression that is not per buffer")
            number = _I8.unpack_from(metadata, kind)[0] if kind else 0
            if number not in _CODECS:
                raise ValueError("unknown compression")
            codec = _CODECS[number]
        return BatchLayout(
            rows=_I64.unpack_from(metadata, length)[0] if length else 0,
            codec=codec,
            nodes=_pairs(metadata, nodes) if nodes else (),
            buffers=_pairs(metadata, buffers) if buffers else (),
        )
    except struct.error as error:
        raise ValueError("offset past the end") from error


def metadata_values(metadata: bytes) -> list[tuple[bytes, int, int]]:
    """Key of each metadata entry of a schema message, and where its value starts and stops.

    Raises:
        ValueError: the metadata is not a schema message, or holds more than a few entries.
    """
    try:
        vector = _field(metadata, _header(metadata), 2)
        if not vector:
            return []
        start = _follow(metadata, vector)
        count = _U32.unpack_from(metadata, start)[0]
        if count > _MAX_ENTRIES:
            raise ValueError(f"{count} entries")
        found = []
        for index in range(count):
            entry = _follow(metadata, start + 4 + 4 * index)
            key, value = (_string(metadata, _field(metadata, entry, n)) for n in range(2))
            found.append((metadata[slice(*key)], *value))
        return found
    except struct.error as error:
        raise ValueError("offset past the end") from error


def _string(data: bytes, position: int) -> tuple[int, int]:
    """Start and stop of the string that the reference at ``position`` points at."""
    if not position:
        raise ValueError("no string")
    start = _follow(data, position) + 4
    stop = start + _U32.unpack_from(data, start - 4)[0]
    if stop > len(data):
        raise ValueError("string past the end")
    return start, stop


def message_table(metadata: bytes) -> int:
    """Position of the schema or record batch that a message wraps.

    Raises:
        ValueError: there is none.
    """
    return _header(metadata)


def message_kind(metadata: bytes) -> tuple[int, int]:
    """What a message is (1: a schema, 3: a record batch), and the bytes of its body.

    Raises:
        ValueError: it does not say.
    """
    try:
        table = _U32.unpack_from(metadata, 0)[0]
        kind, size = _field(metadata, table, 1), _field(metadata, table, 3)
        if not kind:
            raise ValueError("message without a kind")
        return metadata[kind], _I64.unpack_from(metadata, size)[0] if size else 0
    except (struct.error, IndexError) as error:
        raise ValueError("offset past the end") from error


def is_little_endian(metadata: bytes) -> bool:
    """Whether a schema message declares little-endian buffers.

    Raises:
        ValueError: the metadata is not a schema message.
    """
    try:
        position = _field(metadata, _header(metadata), 0)
        return not position or _I16.unpack_from(metadata, position)[0] == 0
    except struct.error as error:
        raise ValueError("offset past the end") from error


# For datamix.ipc, which walks further.
field, follow, string = _field, _follow, _string
