"""Messages with something wrong in them: what happens to the bytes of real ones.

Everything here is a pure function of a ``random.Random``, so that a seed gives the same mutants
again. A mutant may still be a good message; :mod:`benchmarks.fuzzing.oracle` knows.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks.fuzzing.messages import compressed, name, parts_of, read, real, request, write

_NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 9, 15, 16, 127, 128, 255, 256, (1 << 15) - 1, 1 << 15, (1 << 16) - 1),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63),
    *(-1, -2, -8, -(1 << 31), -(1 << 40)),
)
_KEYS = (
    *("protocol", "request_id", "model", "model_version", "deadline_ms", "priority", "block"),
    *("status", "error", "retry_after_ms", "queue_us", "compute_us", "batch_rows", "close_reason"),
)
_TEXTS: tuple[str | bytes, ...] = (
    *("", "0", "1", "2", "-1", "+1", " 1", "1 ", "1e3", "0x10", "1.0", "nan", "١", "00", "\n"),
    *("9" * 12, "9" * 13, "9" * 5000, "x" * 64, "x" * 65, "x" * 5000, "echo", "other", "echo\0"),
    *("../../etc/passwd", "%s%n", "<script>", "späť", "\0", "\x7f", "\u202e", b"\xff\xfe"),
)
_SCALES = (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e-45, 1e-38, 2.6e36, 2.7e36, 3.4e38, -3.4e38)


class Mutant(NamedTuple):
    """One message as it will be sent, and what was done to it."""

    kind: str
    body: bytes


# --- bytes ------------------------------------------------------------------------------------


def flip(message: bytes, chance: random.Random) -> bytes:
    """Some bits are others."""
    data = bytearray(message)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 32))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def flip_header(message: bytes, chance: random.Random) -> bytes:
    """Some bits before the values are others."""
    data, end = bytearray(message), parts_of(message).body
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(data)


def insert(message: bytes, chance: random.Random) -> bytes:
    """Something is put between: noise, zeros, or a piece of the message itself."""
    at, count = chance.randrange(len(message) + 1), chance.choice((1, 4, 8, 64, 1000))
    start = chance.randrange(len(message))
    what = (chance.randbytes(count), bytes(count), message[start : start + count])
    return message[:at] + chance.choice(what) + message[at:]


def delete(message: bytes, chance: random.Random) -> bytes:
    """A piece is missing."""
    at, count = chance.randrange(len(message)), chance.choice((1, 4, 8, 64, 1000))
    return message[:at] + message[at + count :]


def truncate(message: bytes, chance: random.Random) -> bytes:
    """The end is missing, often exactly a part's."""
    parts = parts_of(message)
    places = (0, 4, 8, parts.batch - 8, parts.batch, parts.body, len(message) - 8, len(message) - 1)
    return message[: chance.choice((*places, chance.randrange(len(message))))]


def splice(message: bytes, chance: random.Random) -> bytes:
    """The beginning of one message and the end of another."""
    other = real(chance)
    ours, theirs = parts_of(message), parts_of(other)
    if chance.random() < 0.5:
        cut, start = chance.choice(((ours.batch, theirs.batch), (ours.body, theirs.body)))
        return message[:cut] + other[start:]
    return message[: chance.randrange(len(message))] + other[chance.randrange(len(other)) :]


def repeat(message: bytes, chance: random.Random) -> bytes:
    """Parts come twice, in another order, or behind what should be the end."""
    parts, end = parts_of(message), message[-8:]
    schema, batch = message[: parts.batch - 8], message[parts.batch - 8 : -8]
    return chance.choice(
        (
            message + message,
            message + end,
            message + b"\0",
            schema + schema + batch + end,
            schema + batch + batch + end,
            batch + schema + end,
            batch + end,
            schema + end,
            schema + end + batch + end,
            end,
        )
    )


# --- numbers ----------------------------------------------------------------------------------


def number(chance: random.Random, near: int = 0) -> int:
    """A number at which code breaks."""
    kind = chance.random()
    if kind < 0.7:
        return chance.choice(_NUMBERS)
    return near + chance.randrange(-9, 10) if kind < 0.9 else chance.getrandbits(64)


def put(data: bytearray, at: int, size: int, value: int) -> None:
    """Write ``size`` bytes, little-endian, as far as there are any."""
    raw = (value % (1 << (8 * size))).to_bytes(size, "little")
    data[at : at + size] = raw[: max(0, len(data) - at)]


def word(message: bytes, chance: random.Random) -> bytes:
    """Integers of the FlatBuffers are others: offsets, vtables, counts, types."""
    data, end = bytearray(message), parts_of(message).body
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size = chance.choice((1, 2, 4, 4, 4, 8))
        at = chance.randrange(end) // size * size
        put(data, at, size, number(chance, int.from_bytes(data[at : at + size], "little")))
    return bytes(data)


def layout(message: bytes, chance: random.Random) -> bytes:
    """The batch's header lies about rows, nulls, or where its buffers are."""
    data, parts = bytearray(message), parts_of(message)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.choice(parts.numbers)
        put(data, at, 8, number(chance, int.from_bytes(data[at : at + 8], "little")))
    return bytes(data)


def length(message: bytes, chance: random.Random) -> bytes:
    """The framing lies about the length of a header, or its marks are others."""
    data, parts = bytearray(message), parts_of(message)
    starts = (parts.schema, parts.batch, len(data))
    at = chance.choice(starts) - chance.choice((4, 4, 8))
    put(data, at, 4, number(chance, int.from_bytes(data[at : at + 4], "little")))
    return bytes(data)


def digits(message: bytes, chance: random.Random) -> bytes:
    """Digits of the texts are others: the shape of rows, the deadline, the block, the id."""
    data, end = bytearray(message), parts_of(message).batch
    places = [at for at in range(end) if 48 <= data[at] <= 57]
    for _ in range(chance.choice((1, 1, 2, 4))):
        data[chance.choice(places)] = ord(chance.choice("0123456789-,]e."))
    return bytes(data)


# --- meaning ----------------------------------------------------------------------------------


def metadata(message: bytes, chance: random.Random) -> bytes:
    """Keys and values are swapped, missing, there twice, or strange."""
    batch = read(message)
    pairs = list(batch.schema.metadata.items())
    for _ in range(chance.choice((1, 1, 2))):
        pairs = _change(pairs, chance)
    schema = batch.schema.with_metadata(pa.KeyValueMetadata(pairs))
    return write([batch.replace_schema_metadata(schema.metadata)], schema)


def _change(pairs: list[Any], chance: random.Random) -> list[Any]:
    changed = list(pairs)
    at, other = (chance.randrange(len(pairs) or 1) for _ in range(2))
    kind = chance.randrange(7) if pairs else 5
    if kind == 0:
        changed[at] = (pairs[at][0], chance.choice(_TEXTS))
    elif kind == 1:
        del changed[at]
    elif kind == 2:
        changed[at], changed[other] = (
            (pairs[at][0], pairs[other][1]),
            (
                pairs[other][0],
                pairs[at][1],
            ),
        )
    elif kind == 3:
        changed[at] = (pairs[other][0], pairs[at][1])
    elif kind == 4:
        changed.insert(other, (pairs[at][0], chance.choice((pairs[at][1], *_TEXTS))))
    elif kind == 5:
        key = chance.choice((*(f"datamix.{key}" for key in _KEYS), *_TEXTS))
        changed += [(key, chance.choice(_TEXTS))] * chance.choice((1, 1, 1, 30))
    else:
        chance.shuffle(changed)
    return changed


def columns(message: bytes, chance: random.Random) -> bytes:
    """Columns are missing, there twice, renamed, of another type, or there is one too many."""
    batch = read(message)
    found = list(zip(batch.schema.names, batch.columns, strict=True))
    at, kind = chance.randrange(len(found)), chance.randrange(6)
    if kind == 0:
        del found[at]
    elif kind == 1:
        found.append(found[at])
    elif kind == 2:
        found[at] = (chance.choice(("", "scale", "Features", "features ", "späť")), found[at][1])
    elif kind == 3:
        others = (pa.int32(), pa.float64(), pa.bool_(), pa.string(), pa.float32(), pa.null())
        nulls = pa.nulls(len(batch), chance.choice(others))
        found[at] = (found[at][0], nulls)
    elif kind == 4:
        found.append(("scale", pa.array(np.ones(len(batch), np.float32))))
    else:
        found[at] = (found[at][0], found[at][1][: len(batch) - 1])
        found = [(key, column[: len(batch) - 1]) for key, column in found]
    fields = [pa.field(key, column.type) for key, column in found]
    schema = pa.schema(fields, batch.schema.metadata)
    changed = pa.RecordBatch.from_arrays([column for _, column in found], schema=schema)
    return write([changed] * chance.choice((1, 1, 1, 0, 2)), schema)


def shape(message: bytes, chance: random.Random) -> bytes:
    """The same values as rows of another shape, or as a type that was never registered."""
    batch = read(message)
    storage = batch.column(0).storage
    size, value_type = storage.type.list_size, storage.type.value_type
    shapes = ([size], [1, size], [size, 1], [1] * 9 + [size], [size // 2 or 1, min(size, 2)])
    kind = chance.randrange(3)
    column, declared = storage, storage.type
    text = {b"ARROW:extension:name": b"arrow.fixed_shape_tensor"}
    if kind == 0:
        declared = pa.fixed_shape_tensor(value_type, chance.choice(shapes))
        column = pa.ExtensionArray.from_storage(declared, storage)
        text = {}
    elif kind == 1:
        sizes = [number(chance) for _ in range(chance.randrange(4))]
        text[b"ARROW:extension:metadata"] = f'{{"shape":{sizes}}}'.encode()
    else:
        text[b"ARROW:extension:metadata"] = chance.choice(
            (b"", b"{", b"[]", b'{"shape":"4"}', b'{"shape":[4,4,4],"permutation":[2,1,0]}',
             b'{"shape":[4,4,4],"dim_names":["a"]}', b'{"shape":[64.0]}', b'{"shape":[-4,-4,4]}')
        )  # fmt: skip
    fields = [pa.field("features", declared, metadata=text), *list(batch.schema)[1:]]
    arrays = [column, *batch.columns[1:]]
    schema = pa.schema(fields, batch.schema.metadata)
    return write([pa.RecordBatch.from_arrays(arrays, schema=schema)], schema)


def values(message: bytes, chance: random.Random) -> bytes:
    """Values are NaN, infinite or noise."""
    data, parts = bytearray(message), parts_of(message)
    for _ in range(chance.choice((1, 1, 4))):
        if parts.body < len(data) - 8:
            at = chance.randrange(parts.body, len(data) - 8) & ~3
            raw = (b"\0\x7c\0\xfc", b"\xff\x7f\0\0", b"\0\0\x80\x7f", b"\0\0\xc0\xff")
            data[at : at + 4] = chance.choice((*raw, chance.randbytes(4)))
    return bytes(data)


def scale(message: bytes, chance: random.Random) -> bytes:
    """Scales of int8 rows are NaN, infinite, nothing, negative or enormous."""
    data = bytearray(request(chance, "int8"))
    at = parts_of(data).buffers[4]
    for index in range((len(data) - 8 - at) // 4):
        if chance.random() < 0.5:
            struct.pack_into("<f", data, at + 4 * index, np.float32(chance.choice(_SCALES)))
    return bytes(data)


def inflated(message: bytes, chance: random.Random) -> bytes:
    """Compressed buffers that lie about their size, or are damaged."""
    data = bytearray(compressed(chance))
    parts = parts_of(data)
    at = chance.choice(parts.buffers)
    if chance.random() < 0.7:
        put(data, at, 8, number(chance, int.from_bytes(data[at : at + 8], "little", signed=True)))
    else:
        data[chance.randrange(parts.body, len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


@lru_cache(maxsize=16)
def _bomb(codec: str, mib: int) -> bytes:
    """A request of a few kB that inflates to so many MiB of zeros."""
    zeros = pa.array(np.zeros(mib << 19, np.float16))
    kind = pa.fixed_shape_tensor(pa.float16(), [len(zeros)])
    storage = pa.FixedSizeListArray.from_arrays(zeros, len(zeros))
    columns = {"features": pa.ExtensionArray.from_storage(kind, storage)}
    batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata(
        {"datamix.protocol": "1", "datamix.request_id": "b" * 16}
    )
    return write([batch], batch.schema, codec)


def bomb(message: bytes, chance: random.Random) -> bytes:
    """Inflates to more than a message may have, to just as much, or says that it does not."""
    data = bytearray(_bomb(chance.choice(("lz4", "zstd")), chance.choice((1, 7, 8, 9, 64))))
    parts = parts_of(data)
    at = data.index(b"b" * 16)
    data[at : at + 16] = name(chance).encode()
    if chance.random() < 0.6:
        sizes = (0, 1, 128, 1 << 20, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 1 << 40, -1, -2)
        put(data, parts.buffers[2], 8, chance.choice(sizes))
    return bytes(data)


def nothing(message: bytes, chance: random.Random) -> bytes:
    """A real message as it is."""
    return message


# How often each of them is used.
MUTATORS: dict[Callable[[bytes, random.Random], bytes], int] = {
    **{flip: 10, flip_header: 14, insert: 5, delete: 5, truncate: 4, splice: 8, repeat: 4},
    **{word: 14, layout: 8, length: 4, digits: 5, metadata: 8, columns: 4, shape: 4, values: 4},
    **{scale: 4, inflated: 4, bomb: 1, nothing: 2},
}


def mutate(chance: random.Random) -> Mutant:
    """One mutant of one real message."""
    (mutator,) = chance.choices(list(MUTATORS), list(MUTATORS.values()))
    body = mutator(real(chance), chance)
    if body and chance.random() < 0.1:
        body = chance.choice((flip, insert, delete))(body, chance)
    return Mutant(mutator.__name__, body)


def endless(seed: str) -> Iterator[Mutant]:
    """The mutants of one seed, one after the other."""
    chance = random.Random(seed)
    while True:
        yield mutate(chance)
