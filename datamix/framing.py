"""Arrow IPC framing: features, scales and metadata to and from one complete stream.

Devices of one model send the same message again and again, but for the values of a few metadata
strings and the tensors themselves. So both ways remember the layouts they have met:

- to write one, pyarrow writes schema and batch header once, and later messages are joined around
  their own strings and data;
- to read one, pyarrow and the checks here go through it once; a later message of the same length
  that equals it in every byte of its headers, but for the strings, has passed the same checks.

That leaves a dozen comparisons per message, and none of pyarrow's calls that let go of the GIL,
which a busy engine thread takes at once and gives back late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamix import flat
from datamix.errors import TooLarge, WireError

Dtype = Literal["float16", "float32", "int8"]
Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# By the dtype's one-letter code: numpy builds `dtype.name` anew on each access.
DTYPE_OF: dict[str, Dtype] = {np.dtype(name).char: name for name in DTYPES}

_START = b"\xff\xff\xff\xff"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_PADDING = 8  # Arrow aligns each buffer of a message's body to 8 bytes
_MAX_DIMENSIONS = 8  # of a row; numpy has a limit too, and raises no WireError
_ARROW = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()}

# How much of what clients send is remembered, at most 512 headers of 4 kB.
_MAX_KEYS, _MAX_PER_KEY, _MAX_HEADERS = 128, 4, 4096


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a message whose headers were checked in full.

    Attributes:
        fixed: ``(start, stop, bytes)`` of everything that must be equal: both headers but for the
            metadata's values, and the end of the stream.
        values: ``(key, start, stop)`` of the metadata's values.
        dtype: value type of the features.
        shape: (rows, *shape) of the features.
        features_at: where the features start.
        scale_at: where the scales start; None without.
    """

    fixed: tuple[tuple[int, int, bytes], ...]
    values: tuple[tuple[str, int, int], ...]
    dtype: Dtype
    shape: tuple[int, ...]
    features_at: int
    scale_at: int | None

    def fits(self, body: Buffer) -> bool:
        """Whether ``body``, of the same length, has these headers."""
        return all(body[start:stop] == piece for start, stop, piece in self.fixed)

    def read(self, body: Buffer) -> tuple[Array, Array | None, dict[str, str]]:
        """Features, scales and metadata of a message that fits; views of ``body``."""
        count = math.prod(self.shape)
        features = np.frombuffer(body, self.dtype, count, self.features_at).reshape(self.shape)
        scale = None
        if self.scale_at is not None:
            scale = np.frombuffer(body, np.float32, self.shape[0], self.scale_at)
        try:
            metadata = {key: str(body[start:stop], "utf-8") for key, start, stop in self.values}
        except UnicodeDecodeError as error:
            raise WireError("metadata is not UTF-8") from error
        return features, scale, metadata


# By the length of the message and of its schema.
_known: dict[tuple[int, bytes], list[Layout]] = {}


@lru_cache(maxsize=256)
def _header(dtype: Dtype, shape: tuple[int, ...], rows: int) -> tuple[pa.Schema, bytes, int]:
    """Schema, record batch header and padding after the features, for one layout.

    The header does not depend on the values, so pyarrow writes it once, over zeros.
    """
    tensor = pa.fixed_shape_tensor(_ARROW[dtype], shape)
    size = math.prod(shape)
    zeros = pa.array(np.zeros(rows * size, dtype))
    storage = pa.FixedSizeListArray.from_arrays(zeros, size)
    columns = [pa.ExtensionArray.from_storage(tensor, storage)]
    fields = [pa.field("features", tensor, nullable=False)]
    if dtype == "int8":
        columns.append(pa.array(np.zeros(rows, np.float32)))
        fields.append(pa.field("scale", pa.float32(), nullable=False))
    schema = pa.schema(fields)
    message = pa.RecordBatch.from_arrays(columns, schema=schema).serialize().to_pybytes()
    metadata_bytes = int.from_bytes(message[4:8], "little")
    return schema, message[: 8 + metadata_bytes], -(rows * size * zeros.type.byte_width) % _PADDING


@lru_cache(maxsize=1024)
def _pieces(
    dtype: Dtype, shape: tuple[int, ...], keys: tuple[str, ...], lengths: tuple[int, ...]
) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """Headers of a message, cut at its metadata's values, and the order of the values in them.

    Where the values stand depends on their lengths only, so pyarrow writes the schema once, over
    values of zeros.
    """
    schema, header, _ = _header(dtype, shape[1:], shape[0])
    zeros = {key: bytes(length) for key, length in zip(keys, lengths, strict=True)}
    message = schema.with_metadata(zeros).serialize().to_pybytes()
    found = {key.decode(): where for key, *where in flat.metadata_values(message[8:])}
    order = sorted(range(len(keys)), key=lambda index: found[keys[index]][0])
    cuts = [8 + at for index in order for at in found[keys[index]]]
    starts, stops = [0, *cuts[1::2]], [*cuts[::2], len(message)]
    pieces = [message[start:stop] for start, stop in zip(starts, stops, strict=True)]
    pieces[-1] += header
    return tuple(pieces), tuple(order)


def frame(features: Array, scale: Array | None, metadata: Mapping[str, str]) -> bytes:
    """One complete message. ``features`` is contiguous and in a wire value type."""
    dtype = DTYPE_OF[features.dtype.char]
    shape = features.shape
    values = [value.encode() for value in metadata.values()]
    pieces, order = _pieces(dtype, shape, tuple(metadata), tuple(map(len, values)))
    parts: list[Any] = [pieces[0]]
    for index, piece in zip(order, pieces[1:], strict=True):
        parts += (values[index], piece)
    parts += (features.data if features.size else b"", bytes(-features.nbytes % _PADDING))
    if scale is not None:
        parts += (scale.data if scale.size else b"", bytes(-scale.nbytes % _PADDING))
    parts.append(_END)
    return b"".join(parts)


def unframe(
    body: Buffer, *, max_bytes: int, max_rows: int
) -> tuple[Array, Array | None, dict[str, str]]:
    """Features, scales and metadata of one message; views of ``body`` where not compressed.

    Raises:
        WireError: not one complete message with the columns of the protocol.
        TooLarge: more than ``max_bytes``, as received or inflated, or more than ``max_rows``.
    """
    if len(body) > max_bytes:
        raise TooLarge(f"message has {len(body)} bytes, expected at most {max_bytes}")
    key = len(body), bytes(body[4:8])
    for layout in _known.get(key, ()):
        if layout.fits(body):
            if layout.shape[0] > max_rows:
                raise _too_many(layout.shape[0], max_rows)
            return layout.read(body)
    return _parse(body, key, max_bytes=max_bytes, max_rows=max_rows)


def _too_many(rows: int, max_rows: int) -> TooLarge:
    return TooLarge(f"message has {rows} rows, expected at most {max_rows}")


def _parse(
    body: Buffer, key: tuple[int, bytes], *, max_bytes: int, max_rows: int
) -> tuple[Array, Array | None, dict[str, str]]:
    """Check a message from end to end, and remember its layout."""
    reader = pa.BufferReader(body)
    try:
        first = pa.ipc.read_message(reader)
        header = first.metadata.to_pybytes()
        if first.type != "schema" or not flat.is_little_endian(header):
            raise WireError("message does not start with a little-endian Arrow schema")
        schema = pa.ipc.read_schema(first)
        names = schema.names  # raises where a name is not UTF-8
        second = pa.ipc.read_message(reader)
        if second.type != "record batch":
            raise WireError(f"message holds a {second.type}, expected one record batch")
        layout = flat.batch_layout(second.metadata.to_pybytes())
    except (pa.ArrowException, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        # pyarrow's own words can hold bytes of the message, so they stay here.
        raise WireError("body is not a complete Arrow IPC stream") from error
    if memoryview(body)[reader.tell() :] != _END:
        raise WireError("record batch is not followed by the end of the stream and nothing else")
    if names not in (["features"], ["features", "scale"]):
        raise WireError(f"message has {len(names)} columns, expected features, or with int8 scale")
    tensor = schema.field(0).type
    dtype, shape = _tensor_type(tensor)
    if (dtype == "int8") != (len(names) == 2):
        raise WireError(f"a scale column belongs to int8 features, and to them only, got {dtype}")
    if len(names) == 2 and schema.field(1).type != pa.float32():
        raise WireError("column scale has the wrong type, expected float32")
    if layout.rows > max_rows:
        raise _too_many(layout.rows, max_rows)
    size = math.prod(shape)
    expected = [layout.rows, layout.rows * size, layout.rows][: len(names) + 1]
    if list(layout.nodes) != [(length, 0) for length in expected] or layout.rows < 0:
        raise WireError("columns disagree about the number of rows, or hold nulls")
    buffers = _buffers(second.body, layout, max_bytes)
    if len(buffers) != (3 if len(names) == 1 else 5):
        raise WireError(f"record batch has {len(buffers)} buffers, expected 3, or 5 with int8")
    features = _values(buffers[2], dtype, layout.rows * size).reshape(layout.rows, *shape)
    scale = _values(buffers[4], "float32", layout.rows) if len(names) == 2 else None
    metadata = _strings(schema.metadata)
    if layout.codec is None:
        body_at = reader.tell() - second.body.size
        at = [body_at + offset for offset, _ in layout.buffers]
        scale_at = at[4] if scale is not None else None
        _remember(key, body, header, (dtype, features.shape, body_at, at[2], scale_at), metadata)
    return features, scale, metadata


def _remember(
    key: tuple[int, bytes],
    body: Buffer,
    header: bytes,
    found: tuple[Dtype, tuple[int, ...], int, int, int | None],
    metadata: Mapping[str, str],
) -> None:
    """Remember the layout of a message that passed all checks, if it is an ordinary one."""
    dtype, shape, body_at, features_at, scale_at = found
    if body_at > _MAX_HEADERS or body[:4] != _START:
        return
    try:
        values = sorted(flat.metadata_values(header), key=lambda value: value[1:])
        strings = tuple((key.decode(), 8 + start, 8 + stop) for key, start, stop in values)
        read = {key: str(body[start:stop], "utf-8") for key, start, stop in strings}
    except ValueError:  # more entries than ours, or not UTF-8
        return
    cuts = [at for _, start, stop in strings for at in (start, stop)]
    # What is walked here must be what pyarrow read, and no value may lie over another or over
    # something that is not a value: then it would be compared by nobody.
    if read != metadata or len(read) != len(strings) or cuts != sorted(cuts):
        return
    starts, stops = [0, *cuts[1::2]], [*cuts[::2], body_at]
    fixed = [(a, b, bytes(body[a:b])) for a, b in zip(starts, stops, strict=True)]
    fixed.append((len(body) - len(_END), len(body), _END))
    if len(_known) >= _MAX_KEYS and key not in _known:
        _known.clear()
    layouts = _known.setdefault(key, [])
    layouts.insert(0, Layout(tuple(fixed), strings, dtype, shape, features_at, scale_at))
    del layouts[_MAX_PER_KEY:]


def _tensor_type(tensor: pa.DataType) -> tuple[Dtype, tuple[int, ...]]:
    """Value type and shape of the features column."""
    if not isinstance(tensor, pa.FixedShapeTensorType):
        raise WireError("column features has the wrong type, expected arrow.fixed_shape_tensor")
    dtype = {"halffloat": "float16", "float": "float32", "int8": "int8"}.get(str(tensor.value_type))
    if dtype is None:
        # The type's own words may hold anything: a struct has names that the sender chose.
        raise WireError(f"features have the wrong value type, expected one of {', '.join(DTYPES)}")
    order = tensor.permutation
    if order is not None and list(order) != list(range(len(order))):
        raise WireError("features are permuted, expected row-major tensors")
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= _MAX_DIMENSIONS:
        raise WireError(f"rows have {len(shape)} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    if min(shape) < 1:
        raise WireError(f"features have rows of shape {shape}, expected positive sizes")
    return cast(Dtype, dtype), shape


def _buffers(body: pa.Buffer, layout: flat.BatchLayout, max_bytes: int) -> list[Any]:
    """The body's buffers, inflated only after their declared sizes were found to be in bounds."""
    view = memoryview(body)
    pieces = []
    for offset, length in layout.buffers:
        if offset < 0 or length < 0 or offset + length > len(view):
            raise WireError("a buffer of the record batch lies outside the message")
        pieces.append(view[offset : offset + length])
    if layout.codec is None:
        return pieces
    # Compressed: each buffer that is not empty starts with its inflated size, -1 for "stored".
    sizes = [int.from_bytes(p[:8], "little", signed=True) if len(p) >= 8 else 0 for p in pieces]
    if sum(max(size, 0) for size in sizes) > max_bytes:
        raise TooLarge(f"message inflates to more than {max_bytes} bytes")
    try:
        return [
            piece[8:] if size == -1 else _inflate(piece[8:], layout.codec, size) if size else b""
            for piece, size in zip(pieces, sizes, strict=True)
        ]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise WireError(f"a buffer does not inflate as {layout.codec}") from error


def _inflate(piece: memoryview, codec: str, size: int) -> pa.Buffer:
    """``piece`` inflated to exactly ``size`` bytes; anything else raises."""
    if size < 0:
        raise ValueError("negative size")
    if codec == "zstd":
        return pa.Codec("zstd").decompress(piece, decompressed_size=size)
    # Not pa.Codec: where an lz4 frame holds less than declared, it leaves the rest of the buffer as
    # it was in memory, which may be another client's values.
    inflated = pa.CompressedInputStream(pa.BufferReader(piece), "lz4").read_buffer(size + 1)
    if inflated.size != size:
        raise ValueError("another size than declared")
    return inflated


def _values(buffer: Any, dtype: str, count: int) -> Array:
    """``count`` values from the start of a buffer, which may be padded."""
    if memoryview(buffer).nbytes < count * np.dtype(dtype).itemsize:
        raise WireError("a buffer of the record batch is shorter than its rows need")
    return np.frombuffer(buffer, dtype, count)


def _strings(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    try:
        return {key.decode(): value.decode() for key, value in (metadata or {}).items()}
    except UnicodeDecodeError as error:
        raise WireError("metadata is not UTF-8") from error
