"""Arrow's IPC metadata without pyarrow, which is larger than all else on a device together.

Only what this wire needs: a schema of one or two columns, and the header of one record batch,
written and read as FlatBuffers; what the numbers of fields mean stands in Arrow's ``Schema.fbs``
and ``Message.fbs``. Where pyarrow is installed it does this work (:mod:`datamix.framing`,
:mod:`datamix.unframing`), and the tests hold both to the same answers.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datamix import flat

arrow: Any
try:
    import pyarrow

    arrow = pyarrow
except ModuleNotFoundError:
    arrow = None

_START = b"\xff\xff\xff\xff"  # of each message
_V5 = 4  # of the metadata
_SCHEMA, _BATCH = 1, 3  # kinds of message
_INT, _FLOAT, _LIST = 2, 3, 16  # kinds of type
_NAME, _EXTENSION = b"ARROW:extension:name", b"ARROW:extension:metadata"
_TENSOR = b"arrow.fixed_shape_tensor"
_FLOATS = {0: "float16", 1: "float32", 2: "float64"}
_INTEGERS = {"int8": 8, "int16": 16}  # bits of those that have scales
_VALUE_BYTES = {"float16": 2, "float32": 4, "int8": 1, "int16": 2}
_MOST_COLUMNS = 16


class Tensor(NamedTuple):
    """The type of a column of tensors.

    Attributes:
        value_type: ``float16``, ``float32``, ``int8``, ``int16`` or something else.
        shape: of one row.
        permutation: of its dimensions; None where they are in order.
    """

    value_type: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None


class Opened(NamedTuple):
    """A stream of one schema and one record batch, opened but not checked.

    Attributes:
        header: metadata of the schema message.
        names: of the columns.
        tensor: type of the first column; None where it holds no tensors.
        second: type of the second column, as in :class:`Tensor`; None where there is none.
        metadata: of the schema.
        batch: metadata of the record batch message.
        body: of the record batch.
        end: where the record batch ends in the stream.
    """

    header: bytes
    names: list[str]
    tensor: Tensor | None
    second: str | None
    metadata: Mapping[bytes, bytes]
    batch: bytes
    body: memoryview
    end: int


# ------------------------------------------------------------------ writing


def schema_message(dtype: str, shape: tuple[int, ...], metadata: Mapping[str, bytes]) -> bytes:
    """The schema of features with rows of ``shape``, and of scales, as one message."""
    extension = json.dumps({"shape": list(shape)}, separators=(",", ":")).encode()
    item = _field("item", _value_type(dtype), nullable=True)
    features = _field(
        "features",
        (_LIST, _Table({0: ("<i", math.prod(shape))})),
        children=[item],
        metadata={_NAME: _TENSOR, _EXTENSION: extension},
    )
    columns = [features]
    if dtype in _INTEGERS:
        columns.append(_field("scale", _value_type("float32")))
    pairs = {key.encode(): value for key, value in metadata.items()}
    return _message(_SCHEMA, _Table({1: columns, 2: _pairs(pairs)}), 0)


def batch_header(dtype: str, shape: tuple[int, ...], rows: int) -> bytes:
    """What stands before the body of a record batch of so many rows."""
    values = rows * math.prod(shape)
    nodes, sizes = [rows, values], [0, 0, values * _VALUE_BYTES[dtype]]
    if dtype in _INTEGERS:
        nodes.append(rows)
        sizes += [0, 4 * rows]
    buffers, at = [], 0
    for size in sizes:
        buffers.append((at, size))
        at += size + -size % 8
    batch = _Table(
        {
            0: ("<q", rows),
            1: _Structs([(length, 0) for length in nodes]),
            2: _Structs(buffers),
        }
    )
    return _message(_BATCH, batch, at)


class _Table(NamedTuple):
    """Fields by number: ``(format, value)`` of a scalar, or what is referred to."""

    fields: dict[int, Any]


class _Structs(NamedTuple):
    """A vector of pairs of 64-bit integers."""

    pairs: list[tuple[int, int]]


def _value_type(dtype: str) -> tuple[int, _Table]:
    if dtype in _INTEGERS:
        return _INT, _Table({0: ("<i", _INTEGERS[dtype]), 1: ("<B", 1)})
    return _FLOAT, _Table({0: ("<h", 0 if dtype == "float16" else 1)})


def _field(
    name: str,
    kind: tuple[int, _Table],
    *,
    nullable: bool = False,
    children: Sequence[_Table] = (),
    metadata: Mapping[bytes, bytes] | None = None,
) -> _Table:
    number, table = kind
    fields = {0: name.encode(), 1: ("<B", nullable), 2: ("<B", number), 3: table, 5: list(children)}
    if metadata:
        fields[6] = _pairs(metadata)
    return _Table(fields)


def _pairs(metadata: Mapping[bytes, bytes]) -> list[_Table]:
    return [_Table({0: key, 1: value}) for key, value in metadata.items()]


def _message(kind: int, header: _Table, body_bytes: int) -> bytes:
    table = _Table({0: ("<h", _V5), 1: ("<B", kind), 2: header, 3: ("<q", body_bytes)})
    data = bytearray(4)
    struct.pack_into("<I", data, 0, _put(data, table))
    _pad(data, 8)
    return _START + struct.pack("<i", len(data)) + bytes(data)


def _pad(data: bytearray, multiple: int, rest: int = 0) -> None:
    """Fill up until the length leaves ``rest`` when divided by ``multiple``."""
    data += bytes((rest - len(data)) % multiple)


def _put(data: bytearray, value: Any) -> int:
    """Append a table, a string, a vector of tables or one of structs; where it begins.

    References point ahead, so what they refer to is appended after the table that holds them.
    """
    if isinstance(value, _Table):
        return _put_table(data, value)
    if isinstance(value, _Structs):
        _pad(data, 8, 4)  # the structs behind the count are aligned
        at = len(data)
        data += struct.pack("<I", len(value.pairs))
        for pair in value.pairs:
            data += struct.pack("<qq", *pair)
        return at
    _pad(data, 4)
    at = len(data)
    data += struct.pack("<I", len(value))
    if isinstance(value, bytes):
        data += value + b"\x00"
        return at
    data += bytes(4 * len(value))
    for index, entry in enumerate(value):
        _refer(data, at + 4 + 4 * index, entry)
    return at


def _put_table(data: bytearray, table: _Table) -> int:
    """A table behind its vtable, the widest fields first, so that each is aligned."""
    formats = {
        number: field[0] if isinstance(field, tuple) and field[0] in _SCALARS else "<I"
        for number, field in table.fields.items()
    }
    order = sorted(formats, key=lambda number: -struct.calcsize(formats[number]))
    offsets, size = {}, 4
    for number in order:
        offsets[number] = size
        size += struct.calcsize(formats[number])
    slots = max(formats) + 1
    _pad(data, 2)
    vtable = len(data)
    entries = (offsets.get(number, 0) for number in range(slots))
    data += struct.pack(f"<HH{slots}H", 4 + 2 * slots, size, *entries)
    _pad(data, 8, 4)
    at = len(data)
    data += struct.pack("<i", at - vtable) + bytes(size - 4)
    for number in order:
        field, place = table.fields[number], at + offsets[number]
        if formats[number] == "<I":
            _refer(data, place, field)
        else:
            struct.pack_into(formats[number], data, place, field[1])
    return at


_SCALARS = ("<B", "<h", "<i", "<q")


def _refer(data: bytearray, place: int, value: Any) -> None:
    struct.pack_into("<I", data, place, _put(data, value) - place)


# ------------------------------------------------------------------ reading


def open_stream(body: bytes | bytearray | memoryview) -> Opened:
    """Find the parts of a stream of one schema and one record batch.

    Raises:
        ValueError: it is none, or it is big-endian.
    """
    view = memoryview(body).cast("B")
    try:
        header, _, at = _read_message(view, 0, _SCHEMA)
        if not flat.is_little_endian(header):
            raise ValueError("big-endian")
        schema = flat.message_table(header)
        columns = [_Column(header, table) for table in _tables(header, schema, 1)]
        metadata = _metadata(header, schema, 2)
        batch, content, end = _read_message(view, at, _BATCH)
        names = [column.name for column in columns]
        tensor = columns[0].tensor() if columns else None
        second = columns[1].value_type() if len(columns) > 1 else None
    except (struct.error, IndexError) as error:
        raise ValueError("offset past the end") from error
    return Opened(header, names, tensor, second, metadata, batch, content, end)


def _read_message(view: memoryview, at: int, kind: int) -> tuple[bytes, memoryview, int]:
    """Metadata and body of the message at ``at``, which must be of ``kind``, and where it ends."""
    size = struct.unpack_from("<i", view, at + 4)[0]
    if view[at : at + 4] != _START or not 0 < size <= len(view) - at - 8 or size % 8:
        raise ValueError("no message")
    body_at = at + 8 + size
    header = bytes(view[at + 8 : body_at])
    found, body_bytes = flat.message_kind(header)
    if found != kind or not 0 <= body_bytes <= len(view) - body_at or body_bytes % 8:
        raise ValueError("another message")
    end = body_at + body_bytes
    return header, view[body_at:end], end


def _tables(data: bytes, table: int, number: int) -> list[int]:
    """Positions of the tables in the vector that field ``number`` refers to."""
    position = flat.field(data, table, number)
    if not position:
        return []
    start = flat.follow(data, position)
    count = struct.unpack_from("<I", data, start)[0]
    if count > _MOST_COLUMNS:
        raise ValueError(f"{count} entries")
    return [flat.follow(data, start + 4 + 4 * index) for index in range(count)]


def _metadata(data: bytes, table: int, number: int) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for entry in _tables(data, table, number):
        key, value = (flat.string(data, flat.field(data, entry, slot)) for slot in (0, 1))
        found.setdefault(data[slice(*key)], data[slice(*value)])  # the first one, as for pyarrow
    return found


class _Column:
    """One field of a schema."""

    def __init__(self, data: bytes, table: int) -> None:
        self._data, self._table = data, table
        if flat.field(data, table, 4):
            raise ValueError("dictionary")
        self.name = data[slice(*flat.string(data, flat.field(data, table, 0)))].decode()

    def value_type(self) -> str:
        """``float16``, ``float32``, ``int8``, ``int16``, or ``other``."""
        kind, table = self._type()
        if _tables(self._data, self._table, 5) or _metadata(self._data, self._table, 6):
            return "other"
        if kind == _FLOAT:
            return _FLOATS.get(self._number("<h", table, 0), "other")
        if kind == _INT and self._number("<b", table, 1):
            bits = self._number("<i", table, 0)
            return next((name for name, width in _INTEGERS.items() if width == bits), "other")
        return "other"

    def tensor(self) -> Tensor | None:
        """The column's type, if it is one of tensors that are what they say."""
        kind, table = self._type()
        metadata = _metadata(self._data, self._table, 6)
        children = _tables(self._data, self._table, 5)
        if kind != _LIST or metadata.get(_NAME) != _TENSOR or len(children) != 1:
            return None
        told = json.loads(metadata.get(_EXTENSION, b""))
        if not isinstance(told, dict):
            raise ValueError("no shape")
        shape, permutation = _integers(told.get("shape")), told.get("permutation")
        if math.prod(shape) != self._number("<i", table, 0):
            raise ValueError("shape and list disagree")
        value_type = _Column(self._data, children[0]).value_type()
        return Tensor(value_type, shape, None if permutation is None else _integers(permutation))

    def _type(self) -> tuple[int, int]:
        kind, table = (flat.field(self._data, self._table, number) for number in (2, 3))
        if not kind or not table:
            raise ValueError("no type")
        return self._data[kind], flat.follow(self._data, table)

    def _number(self, form: str, table: int, number: int) -> int:
        position = flat.field(self._data, table, number)
        return int(struct.unpack_from(form, self._data, position)[0]) if position else 0


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ValueError("no integers")
    return tuple(value)
