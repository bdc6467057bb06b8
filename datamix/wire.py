"""Tensors and their metadata to and from Arrow IPC bytes: the wire, version 1 (docs/wire.md).

One message is one complete Arrow IPC stream: a schema, exactly one record batch, end-of-stream.

    request   features: fixed_shape_tensor(float16 | float32 | int8), one row is one mixture
              scale:    float32, only with int8 (value = int8 * scale)
              metadata: datamix.protocol, datamix.request_id, and what the sender wants
    response  the same columns, the backbone's output per row, and timings as metadata

Decoding copies nothing: the arrays of a decoded message are read-only views of its bytes. Encoding
lets pyarrow write the header of each layout once and afterwards joins header and data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamix import flat
from datamix.errors import NonFinite, TooLarge, WireError

Dtype = Literal["float16", "float32", "int8"]
Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

PROTOCOL = "1"
MEDIA_TYPE = "application/vnd.apache.arrow.stream"
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
CLOSE_REASONS = ("engine_free", "full", "deadline", "drain")

_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_PADDING = 8  # Arrow aligns each buffer of a message's body to 8 bytes
_MAX_DIMENSIONS = 8  # of a row; numpy has a limit too, and raises no WireError
# By the dtype's one-letter code: numpy builds `dtype.name` anew on each access.
_DTYPE_OF: dict[str, Dtype] = {np.dtype(name).char: name for name in DTYPES}
_ARROW = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8()}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_NUMBER = re.compile(r"[0-9]{1,12}\Z")
# Signed and unsigned integers of a float's size, and the bits of positive and negative infinity.
_INFINITY = {
    2: (np.int16, 0x7C00, np.uint16, 0xFC00),
    4: (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded request.

    Attributes:
        features: (rows, *shape), float16, float32 or int8; a read-only view of the message.
        scale: (rows,) float32 with int8 features, else None.
        request_id: 1 to 64 characters of ``[A-Za-z0-9._-]``.
        model: the model asked for; None for the one of the path.
        model_version: the version asked for; None for the newest.
        block: which block of the backbone.
        deadline_s: the budget left on arrival, in seconds; None for no deadline.
        priority: 0 normal, 1 low.
    """

    features: Array
    scale: Array | None
    request_id: str
    model: str | None = None
    model_version: str | None = None
    block: int = 0
    deadline_s: float | None = None
    priority: int = 0

    @property
    def rows(self) -> int:
        """Number of mixtures."""
        return int(self.features.shape[0])

    @property
    def dtype(self) -> Dtype:
        """The value type, which the response will have too."""
        return _DTYPE_OF[self.features.dtype.char]


@dataclass(frozen=True, slots=True)
class Response:
    """A decoded response: the backbone's output, or the error that ``status`` names.

    Attributes:
        features: (rows, *shape), in the request's value type; zero rows with an error.
        scale: (rows,) float32 with int8 features, else None.
        request_id: the request this answers.
        status: an HTTP status; 200 is an answer.
        error: one plain sentence where ``status`` is not 200.
        retry_after_s: when to try again, in seconds, where the cloud said so.
        model: the model that answered.
        model_version: its version.
        block: which block answered.
        queue_s: from arrival to the start of the computation, in seconds.
        compute_s: the forward of the whole batch, in seconds.
        batch_rows: rows of the batch this request was computed in.
        close_reason: why that batch closed, one of ``CLOSE_REASONS``.
    """

    features: Array
    scale: Array | None
    request_id: str
    status: int = 200
    error: str | None = None
    retry_after_s: float | None = None
    model: str | None = None
    model_version: str | None = None
    block: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    batch_rows: int = 0
    close_reason: str = ""

    def values(self) -> npt.NDArray[np.float32]:
        """The output as (rows, *shape) float32, scales applied."""
        return dequantise(self.features, self.scale)


# --- values -----------------------------------------------------------------------------------


def is_finite(values: Array) -> bool:
    """Whether no float16 or float32 value is NaN or Inf.

    Looks at the raw bits: infinity and all NaN are larger than any finite number of their sign,
    as integers too. numpy's isfinite converts each float16 first, which takes 6 times as long.
    """
    signed, positive, unsigned, negative = _INFINITY[values.itemsize]
    if not values.size:
        return True
    return bool(values.view(signed).max() < positive and values.view(unsigned).max() < negative)


def quantise(values: Array, dtype: Dtype, *, check: bool = True) -> tuple[Array, Array | None]:
    """Float values (rows, *shape) in the wire's value type, with a scale per row for int8.

    Without ``check``, values that are not finite go through as float16 and float32.

    Raises:
        NonFinite: a value is NaN or Inf, or too large for float16.
        WireError: ``dtype`` is none of ``DTYPES``.
    """
    if dtype == "int8":
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the next line refuses
            values = np.ascontiguousarray(values, np.float32)
        if not is_finite(values):
            raise NonFinite("features hold NaN or Inf, expected finite values")
        scale = np.abs(values).reshape(len(values), -1).max(axis=1) / np.float32(127)
        # Below the least normal float a scale is too coarse a number: 127 steps could miss the
        # largest value. A row of zeros is divided safely, too.
        scale = np.maximum(scale, np.finfo(np.float32).tiny)
        steps = np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1)))
        return steps.astype(np.int8), scale
    if dtype not in DTYPES:
        raise WireError(f"value type is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if values.dtype == dtype:
        converted = np.ascontiguousarray(values)
    else:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the next line refuses
            converted = np.ascontiguousarray(values, dtype=dtype)
    if check and not is_finite(converted):
        raise NonFinite(f"features hold values that are not finite as {dtype}")
    return converted, None


def dequantise(values: Array, scale: Array | None) -> npt.NDArray[np.float32]:
    """The reverse of :func:`quantise`: (rows, *shape) float32."""
    if scale is None:
        return values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are for the caller to refuse
        product: npt.NDArray[np.float32] = values * scale.reshape(-1, *[1] * (values.ndim - 1))
    return product


def _is_finite(values: Array, scale: Array | None) -> bool:
    """Whether ``values * scale`` is finite, without the product where no scale is enormous."""
    if scale is None:
        return is_finite(values)
    if np.abs(scale).max() <= np.finfo(np.float32).max / 128:  # NaN is not
        return True
    return is_finite(dequantise(values, scale))


# --- framing ----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _template(dtype: Dtype, shape: tuple[int, ...], rows: int) -> tuple[pa.Schema, bytes, int]:
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


def _frame(features: Array, scale: Array | None, metadata: Mapping[str, str]) -> bytes:
    """One complete message. ``features`` is contiguous and in a wire value type."""
    dtype = _DTYPE_OF[features.dtype.char]
    schema, header, padding = _template(dtype, features.shape[1:], features.shape[0])
    parts: list[Any] = [
        schema.with_metadata(dict(metadata)).serialize(),
        header,
        features.data if features.size else b"",
        bytes(padding),
    ]
    if scale is not None:
        parts += [scale.data if scale.size else b"", bytes(-scale.nbytes % _PADDING)]
    return b"".join([*parts, _END])


def _unframe(
    body: Buffer, *, max_bytes: int, max_rows: int
) -> tuple[Array, Array | None, dict[str, str]]:
    """Features, scales and metadata of one message; views of ``body`` where not compressed."""
    if len(body) > max_bytes:
        raise TooLarge(f"message has {len(body)} bytes, expected at most {max_bytes}")
    reader = pa.BufferReader(body)
    try:
        first = pa.ipc.read_message(reader)
        if first.type != "schema" or not flat.is_little_endian(first.metadata.to_pybytes()):
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
        raise TooLarge(f"message has {layout.rows} rows, expected at most {max_rows}")
    size = math.prod(shape)
    expected = [layout.rows, layout.rows * size, layout.rows][: len(names) + 1]
    if list(layout.nodes) != [(length, 0) for length in expected] or layout.rows < 0:
        raise WireError("columns disagree about the number of rows, or hold nulls")
    buffers = _buffers(second.body, layout, max_bytes)
    if len(buffers) != (3 if len(names) == 1 else 5):
        raise WireError(f"record batch has {len(buffers)} buffers, expected 3, or 5 with int8")
    features = _values(buffers[2], dtype, layout.rows * size).reshape(layout.rows, *shape)
    scale = _values(buffers[4], "float32", layout.rows) if len(names) == 2 else None
    return features, scale, _strings(schema.metadata)


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


def _name(metadata: Mapping[str, str], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not _NAME.match(value):
        raise WireError(f"{key} is not 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return value


def _number(metadata: Mapping[str, str], key: str) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not _NUMBER.match(value):
        raise WireError(f"{key} is not a whole number of at most 12 digits")
    return int(value)


def _number_or(metadata: Mapping[str, str], key: str, default: int) -> int:
    number = _number(metadata, key)
    return default if number is None else number


def _check_protocol(metadata: Mapping[str, str]) -> str:
    """The request id, after the protocol version was found to be ours."""
    if metadata.get("datamix.protocol") != PROTOCOL:
        raise WireError(f"datamix.protocol is missing or unknown, expected {PROTOCOL!r}")
    request_id = _name(metadata, "datamix.request_id")
    if request_id is None:
        raise WireError("datamix.request_id is missing")
    return request_id


def _check_name(key: str, value: str) -> str:
    if not _NAME.match(value):
        raise WireError(f"{key} is {value!r}, expected 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return value


# --- requests ---------------------------------------------------------------------------------


def encode_request(
    features: Array,
    *,
    request_id: str,
    dtype: Dtype = "float16",
    model: str | None = None,
    model_version: str | None = None,
    block: int = 0,
    deadline_s: float | None = None,
    priority: int = 0,
) -> bytes:
    """Mixtures (rows, *shape), any float dtype, as one message of value type ``dtype``.

    Raises:
        NonFinite: a value is not finite, or becomes infinite in ``dtype``.
        WireError: the id, a name, a number or the shape cannot travel.
    """
    if features.ndim < 2 or not features.size:
        raise WireError(f"features have shape {features.shape}, expected (rows, *shape), not empty")
    if not 0 <= block < 10**12:
        raise WireError(f"block is {block}, expected 0 or more, at most 12 digits")
    if priority not in (0, 1):
        raise WireError(f"priority is {priority}, expected 0 or 1")
    if deadline_s is not None and not deadline_s < 1e9:
        raise WireError(f"deadline_s is {deadline_s}, expected less than 1e9")
    metadata = {
        "datamix.protocol": PROTOCOL,
        "datamix.request_id": _check_name("request_id", request_id),
    }
    if model is not None:
        metadata["datamix.model"] = _check_name("model", model)
    if model_version is not None:
        metadata["datamix.model_version"] = _check_name("model_version", model_version)
    if block:
        metadata["datamix.block"] = str(block)
    if deadline_s is not None:
        metadata["datamix.deadline_ms"] = str(math.ceil(max(0.0, deadline_s) * 1000))
    if priority:
        metadata["datamix.priority"] = str(priority)
    return _frame(*quantise(features, dtype), metadata)


def decode_request(body: Buffer, *, max_bytes: int = 1 << 24, max_rows: int = 1 << 12) -> Request:
    """Check and open one request; its arrays are views of ``body`` where that is not compressed.

    Raises:
        WireError: not one complete message with the columns and metadata of the protocol.
        TooLarge: more than ``max_bytes``, as received or inflated, or more than ``max_rows``.
        NonFinite: a value is NaN or Inf.
    """
    features, scale, metadata = _unframe(body, max_bytes=max_bytes, max_rows=max_rows)
    request_id = _check_protocol(metadata)
    if not len(features):
        raise WireError("request has no rows, expected at least one")
    if not _is_finite(features, scale):
        raise NonFinite("features hold NaN or Inf, expected finite values")
    priority = _number_or(metadata, "datamix.priority", 0)
    if priority not in (0, 1):
        raise WireError(f"datamix.priority is {priority}, expected 0 or 1")
    deadline_ms = _number(metadata, "datamix.deadline_ms")
    return Request(
        features=features,
        scale=scale,
        request_id=request_id,
        model=_name(metadata, "datamix.model"),
        model_version=_name(metadata, "datamix.model_version"),
        block=_number_or(metadata, "datamix.block", 0),
        deadline_s=None if deadline_ms is None else deadline_ms / 1000,
        priority=priority,
    )


# --- responses --------------------------------------------------------------------------------


def encode_response(
    features: Array,
    *,
    dtype: Dtype,
    request_id: str,
    model: str,
    model_version: str,
    block: int,
    queue_s: float,
    compute_s: float,
    batch_rows: int,
    close_reason: str,
) -> bytes:
    """The backbone's output (rows, *shape) as one message, in the request's value type.

    Float values are not checked: the device must look for NaN and Inf anyway, as it does not trust
    the cloud, and the cloud's time is the scarce one.

    Raises:
        NonFinite: the output is not finite and ``dtype`` is int8, which cannot say so.
    """
    metadata = {
        "datamix.protocol": PROTOCOL,
        "datamix.request_id": request_id,
        "datamix.status": "200",
        "datamix.model": model,
        "datamix.model_version": model_version,
        "datamix.block": str(block),
        "datamix.queue_us": str(int(queue_s * 1e6)),
        "datamix.compute_us": str(int(compute_s * 1e6)),
        "datamix.batch_rows": str(batch_rows),
        "datamix.close_reason": close_reason,
    }
    return _frame(*quantise(features, dtype, check=False), metadata)


def encode_error(
    request_id: str, status: int, sentence: str, *, retry_after_s: float | None = None
) -> bytes:
    """A failure as a message with zero rows. ``request_id`` may be unknown: then ``-``."""
    metadata = {
        "datamix.protocol": PROTOCOL,
        "datamix.request_id": request_id or "-",
        "datamix.status": str(status),
        "datamix.error": sentence,
    }
    if retry_after_s is not None:
        metadata["datamix.retry_after_ms"] = str(math.ceil(retry_after_s * 1000))
    return _frame(np.empty((0, 1), np.float32), None, metadata)


def decode_response(body: Buffer, *, max_bytes: int = 1 << 26, max_rows: int = 1 << 14) -> Response:
    """Check and open one response.

    Raises:
        WireError: not a message of this protocol. (An error status is returned, not raised.)
        TooLarge: more bytes or rows than allowed.
    """
    features, scale, metadata = _unframe(body, max_bytes=max_bytes, max_rows=max_rows)
    request_id = _check_protocol(metadata)
    retry_after_ms = _number(metadata, "datamix.retry_after_ms")
    return Response(
        features=features,
        scale=scale,
        request_id=request_id,
        status=_number_or(metadata, "datamix.status", 200),
        error=metadata.get("datamix.error"),
        retry_after_s=None if retry_after_ms is None else retry_after_ms / 1000,
        model=_name(metadata, "datamix.model"),
        model_version=_name(metadata, "datamix.model_version"),
        block=_number_or(metadata, "datamix.block", 0),
        queue_s=_number_or(metadata, "datamix.queue_us", 0) / 1e6,
        compute_s=_number_or(metadata, "datamix.compute_us", 0) / 1e6,
        batch_rows=_number_or(metadata, "datamix.batch_rows", 0),
        close_reason=metadata.get("datamix.close_reason", ""),
    )


def peek_request_id(body: Buffer) -> str:
    """The request id of a message that may be broken elsewhere; ``-`` where it cannot be found.

    An error on a stream must name the request it answers, even if that request's columns are bad.
    """
    try:
        schema = pa.ipc.read_schema(pa.BufferReader(body))
        value = (schema.metadata or {}).get(b"datamix.request_id", b"-").decode()
    except (pa.ArrowException, OSError, EOFError, ValueError, KeyError, TypeError):
        return "-"
    return value if _NAME.match(value) else "-"
