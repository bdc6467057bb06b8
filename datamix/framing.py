"""Arrow IPC framing, the writing side: features, scales and metadata as one complete stream.

Devices of one model send the same message again and again, but for a few values of the metadata,
such as the request's id, and the tensors themselves. So schema and batch header are written once
(:func:`template`), by pyarrow, or by :mod:`datamix.ipc` where it is not installed, and later
messages are joined around their own values and data.

The reading side is :mod:`datamix.unframing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from datamix import flat, ipc

Dtype = Literal["float16", "float32", "int8", "int16"]
Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview
Values = Mapping[str, str]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# By the dtype's one-letter code: numpy builds `dtype.name` anew on each access.
STEPS: Mapping[str, int] = {"int8": 127, "int16": 32767}
"""Integer types, which have a scale per row: value = integer * scale; so many steps each way."""
DTYPE_OF: dict[str, Dtype] = {np.dtype(name).char: name for name in DTYPES}

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a stream

PADDING = 8  # Arrow aligns each buffer of a message's body to 8 bytes


def _messages(
    dtype: Dtype, shape: tuple[int, ...], metadata: Mapping[str, bytes]
) -> tuple[bytes, bytes]:
    """The schema message, and the record batch's without its body, for features (rows, *shape)."""
    if ipc.arrow is None:
        schema = ipc.schema_message(dtype, shape[1:], metadata)
        return schema, ipc.batch_header(dtype, shape[1:], shape[0])
    schema, header = _header(dtype, shape[1:], shape[0])
    return schema.with_metadata(metadata).serialize().to_pybytes(), header


@lru_cache(maxsize=256)
def _header(dtype: Dtype, shape: tuple[int, ...], rows: int) -> tuple[Any, bytes]:
    """Schema and record batch header of one layout, as pyarrow has them.

    The header does not depend on the values, so pyarrow writes it once, over zeros.
    """
    pa = ipc.arrow
    types = {"float16": pa.float16(), "float32": pa.float32()}
    types |= {"int8": pa.int8(), "int16": pa.int16()}
    tensor = pa.fixed_shape_tensor(types[dtype], shape)
    size = math.prod(shape)
    zeros = _zeros(types[dtype], rows * size)
    storage = pa.FixedSizeListArray.from_arrays(zeros, size)
    columns = [pa.ExtensionArray.from_storage(tensor, storage)]
    fields = [pa.field("features", tensor, nullable=False)]
    if dtype in STEPS:
        columns.append(_zeros(pa.float32(), rows))
        fields.append(pa.field("scale", pa.float32(), nullable=False))
    schema = pa.schema(fields)
    message = pa.RecordBatch.from_arrays(columns, schema=schema).serialize().to_pybytes()
    metadata_bytes = int.from_bytes(message[4:8], "little")
    return schema, message[: 8 + metadata_bytes]


def _zeros(kind: Any, count: int) -> Any:
    """``count`` zeros as a pyarrow array.

    Not by ``pa.array``, which imports pandas where that is installed: a tenth of a second within
    somebody's first message.
    """
    pa = ipc.arrow
    data = pa.py_buffer(bytes(count * kind.bit_width // 8))
    return pa.Array.from_buffers(kind, count, [None, data])


class Template(NamedTuple):
    """A message but for its data and the values of some metadata.

    Attributes:
        pieces: what stands before, between and after those values, up to the data.
        order: indices of the values, in the order in which they stand in the message.
    """

    pieces: tuple[bytes, ...]
    order: tuple[int, ...]

    def fill(self, values: tuple[bytes, ...], features: Array, scale: Array | None) -> list[Any]:
        """The message in parts, to be joined by whoever sends it.

        ``values`` have the lengths, and ``features`` the type and shape, that the template was made
        for; ``features`` is contiguous.
        """
        pieces = self.pieces
        parts: list[Any] = [pieces[0]]
        at = 1
        for index in self.order:
            parts += (values[index], pieces[at])
            at += 1
        if features.size:
            parts.append(features.data)
        if padding := -features.nbytes % PADDING:
            parts.append(bytes(padding))
        if scale is not None and scale.size:
            parts += (scale.data, bytes(-scale.nbytes % PADDING))
        parts.append(END)
        return parts


@lru_cache(maxsize=1024)
def template(
    dtype: Dtype, shape: tuple[int, ...], fields: tuple[tuple[str, str | int], ...]
) -> Template:
    """The template of all messages with this layout.

    Where values stand depends on their lengths only, so the schema is written once, over values of
    zeros.

    Args:
        dtype: value type of the features.
        shape: (rows, *shape) of the features.
        fields: the metadata's keys, in the order in which they are written, each with its value or,
            where that changes, the length of its value in bytes.
    """
    metadata = {
        key: bytes(value) if isinstance(value, int) else value.encode() for key, value in fields
    }
    message, header = _messages(dtype, shape, metadata)
    found = {key.decode(): where for key, *where in flat.metadata_values(message[8:])}
    places = [found[key] for key, value in fields if isinstance(value, int)]
    order = sorted(range(len(places)), key=lambda index: places[index][0])
    cuts = [8 + at for index in order for at in places[index]]
    starts, stops = [0, *cuts[1::2]], [*cuts[::2], len(message)]
    pieces = [message[start:stop] for start, stop in zip(starts, stops, strict=True)]
    pieces[-1] += header
    return Template(tuple(pieces), tuple(order))


def frame(features: Array, scale: Array | None, metadata: Values) -> bytes:
    """One complete message. ``features`` is contiguous and in a wire value type."""
    layout = template(DTYPE_OF[features.dtype.char], features.shape, tuple(metadata.items()))
    return b"".join(layout.fill((), features, scale))
