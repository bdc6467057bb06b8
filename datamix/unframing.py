"""Arrow IPC framing, the reading side: one complete stream to features, scales and metadata.

The first message of a kind goes through pyarrow (where it is not installed, through
:mod:`datamix.ipc`) and the checks here from end to end. A later one of
the same length that equals it in every byte of its headers, but for the values of a few metadata
keys, such as the request's id, has passed the same checks, and its other metadata means the same.

That leaves a few slices and one look-up per message, and none of pyarrow's calls that let go of the
GIL, which a busy engine thread takes at once and gives back late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from datamix import flat, ipc
from datamix.errors import TooLarge, WireError
from datamix.framing import DTYPE_OF, DTYPES, END, STEPS, Array, Buffer, Dtype, Values

_START = b"\xff\xff\xff\xff"
_MAX_DIMENSIONS = 8  # of a row; numpy has a limit too, and raises no WireError

# How much of what clients send is remembered: so many headers of at most 4 kB. A message is
# compared with all cuts of its length, one after the other, so there are few.
_MAX_LAYOUTS, _MAX_HEADERS, _MAX_CUTS = 512, 4096, 16

T = TypeVar("T")


class Frame(NamedTuple, Generic[T]):
    """A message that passed all checks.

    Attributes:
        features: (rows, *shape); a view of the message where it was not compressed.
        scale: (rows,) float32 with integer features, else None; a view, too.
        parsed: what the reader made of the metadata that seldom changes.
        variables: the metadata that does.
    """

    features: Array
    scale: Array | None
    parsed: T
    variables: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Layout(Generic[T]):
    """What headers say that were checked in full: where the values are, and what else they mean."""

    dtype: Dtype
    shape: tuple[int, ...]
    size: int
    features_at: int
    scale_at: int | None
    parsed: T


@dataclass(frozen=True, slots=True)
class _Cuts(Generic[T]):
    """Where the variables stand in messages of one length, and the layouts met between them."""

    variables: tuple[tuple[str, int, int], ...]
    fixed: tuple[tuple[int, int], ...]
    layouts: dict[bytes, _Layout[T]] = field(default_factory=dict)


class Reader(Generic[T]):
    """Reads messages of one kind, and remembers the headers it has met."""

    def __init__(self, variables: frozenset[str], parse: Callable[[Values], T]) -> None:
        """Read metadata as two parts: ``variables``, and all else, which ``parse`` makes sense of.

        ``parse`` raises WireError where it cannot; its result is shared by many messages.
        """
        self._variables = variables
        self._parse = parse
        # By the length of the message and of its schema.
        self._known: dict[tuple[int, bytes], list[_Cuts[T]]] = {}
        self._layouts = 0

    def forget(self) -> None:
        """Start again with an empty memory."""
        self._known.clear()
        self._layouts = 0

    def read(self, body: Buffer, *, max_bytes: int, max_rows: int) -> Frame[T]:
        """Check and open one message.

        Raises:
            WireError: not one complete message with the columns of the protocol.
            TooLarge: more than ``max_bytes``, as received or inflated, or more than ``max_rows``.
        """
        if len(body) > max_bytes:
            raise TooLarge(f"message has {len(body)} bytes, expected at most {max_bytes}")
        key = len(body), bytes(body[4:8])
        for cuts in self._known.get(key, ()):
            layout = cuts.layouts.get(b"".join([body[a:b] for a, b in cuts.fixed]))
            if layout is not None:
                return self._read(body, cuts, layout, max_rows)
        return self._check(body, key, max_bytes=max_bytes, max_rows=max_rows)

    def _read(self, body: Buffer, cuts: _Cuts[T], layout: _Layout[T], max_rows: int) -> Frame[T]:
        """A message whose headers are known."""
        shape = layout.shape
        if shape[0] > max_rows:
            raise _too_many(shape[0], max_rows)
        features = np.frombuffer(body, layout.dtype, layout.size, layout.features_at).reshape(shape)
        scale = None
        if layout.scale_at is not None:
            scale = np.frombuffer(body, np.float32, shape[0], layout.scale_at)
        try:
            variables = {key: str(body[a:b], "utf-8") for key, a, b in cuts.variables}
        except UnicodeDecodeError as error:
            raise WireError("metadata is not UTF-8") from error
        return Frame(features, scale, layout.parsed, variables)

    def _check(
        self, body: Buffer, key: tuple[int, bytes], *, max_bytes: int, max_rows: int
    ) -> Frame[T]:
        """A message that is checked from end to end, and remembered if it is an ordinary one."""
        found = _parse(body, max_bytes=max_bytes, max_rows=max_rows)
        metadata = found.metadata
        parsed = self._parse({k: v for k, v in metadata.items() if k not in self._variables})
        if found.header is not None:
            layout = _Layout(
                DTYPE_OF[found.features.dtype.char],
                found.features.shape,
                found.features.size,
                found.features_at,
                found.scale_at,
                parsed,
            )
            self._remember(key, body, found, layout)
        variables = {k: v for k, v in metadata.items() if k in self._variables}
        return Frame(found.features, found.scale, parsed, variables)

    def _remember(
        self, key: tuple[int, bytes], body: Buffer, found: _Parsed, layout: _Layout[T]
    ) -> None:
        if found.body_at > _MAX_HEADERS or body[:4] != _START:
            return
        strings = _strings_at(found.header or b"", body, found.metadata)
        if strings is None:
            return
        variables = tuple(string for string in strings if string[0] in self._variables)
        edges = [0, *(at for _, *places in variables for at in places), found.body_at]
        fixed = list(zip(edges[::2], edges[1::2], strict=True))
        fixed.append((len(body) - len(END), len(body)))
        if self._layouts >= _MAX_LAYOUTS:
            self.forget()
        beside = self._known.setdefault(key, [])
        # Other names at the same places are other cuts: a stranger may call the id a deadline.
        same = [c for c in beside if (c.variables, c.fixed) == (variables, tuple(fixed))]
        if same:
            cuts = same[0]
        else:
            if len(beside) == _MAX_CUTS:
                self._layouts -= sum(len(cuts.layouts) for cuts in beside)
                beside.clear()
            cuts = _Cuts(variables, tuple(fixed))
            beside.append(cuts)
        cuts.layouts[b"".join([body[a:b] for a, b in cuts.fixed])] = layout
        self._layouts += 1


def _too_many(rows: int, max_rows: int) -> TooLarge:
    return TooLarge(f"message has {rows} rows, expected at most {max_rows}")


class _Parsed(NamedTuple):
    """A message as pyarrow and the checks found it; the places are those of what is not compressed.

    ``header`` is None where the message is compressed, so that there is nothing to point at.
    """

    features: Array
    scale: Array | None
    metadata: dict[str, str]
    header: bytes | None
    body_at: int
    features_at: int
    scale_at: int | None


def _parse(body: Buffer, *, max_bytes: int, max_rows: int) -> _Parsed:
    """Check a message from end to end."""
    try:
        opened = _open(body) if ipc.arrow else ipc.open_stream(body)
        layout = flat.batch_layout(opened.batch)
    except (ValueError, RecursionError) as error:
        # The reader's own words can hold bytes of the message, so they stay here.
        raise WireError("body is not a complete Arrow IPC stream") from error
    if memoryview(body)[opened.end :] != END:
        raise WireError("record batch is not followed by the end of the stream and nothing else")
    names = opened.names
    if names not in (["features"], ["features", "scale"]):
        raise WireError(
            f"message has {len(names)} columns, expected features, or with integers scale"
        )
    dtype, shape = _tensor_type(opened.tensor)
    if (dtype in STEPS) != (len(names) == 2):
        raise WireError(
            f"a scale column belongs to int8 and int16 features, and to them only, got {dtype}"
        )
    if len(names) == 2 and opened.second != "float32":
        raise WireError("column scale has the wrong type, expected float32")
    if layout.rows > max_rows:
        raise _too_many(layout.rows, max_rows)
    size = math.prod(shape)
    expected = [layout.rows, layout.rows * size, layout.rows][: len(names) + 1]
    if list(layout.nodes) != [(length, 0) for length in expected] or layout.rows < 0:
        raise WireError("columns disagree about the number of rows, or hold nulls")
    buffers = _buffers(opened.body, layout, max_bytes)
    if len(buffers) != (3 if len(names) == 1 else 5):
        raise WireError(f"record batch has {len(buffers)} buffers, expected 3, or 5 with a scale")
    features = _values(buffers[2], dtype, layout.rows * size).reshape(layout.rows, *shape)
    scale = _values(buffers[4], "float32", layout.rows) if len(names) == 2 else None
    metadata = _strings(opened.metadata)
    if layout.codec is not None:
        return _Parsed(features, scale, metadata, None, 0, 0, None)
    body_at = opened.end - opened.body.nbytes
    at = [body_at + offset for offset, _ in layout.buffers]
    scale_at = None if scale is None else at[4]
    return _Parsed(features, scale, metadata, opened.header, body_at, at[2], scale_at)


def _open(body: Buffer) -> ipc.Opened:
    """:func:`datamix.ipc.open_stream` by pyarrow.

    Raises:
        ValueError: pyarrow finds something else.
    """
    pa = ipc.arrow
    reader = pa.BufferReader(body)
    try:
        first = pa.ipc.read_message(reader)
        header = first.metadata.to_pybytes()
        if first.type != "schema" or not flat.is_little_endian(header):
            raise ValueError("no little-endian schema")
        schema = pa.ipc.read_schema(first)
        names = schema.names  # raises where a name is not UTF-8
        second = pa.ipc.read_message(reader)
        if second.type != "record batch":
            raise ValueError("no record batch")
        tensor = _arrow_tensor(schema.field(0).type) if names else None
        other = str(schema.field(1).type) if len(names) > 1 else None
        return ipc.Opened(
            header,
            names,
            tensor,
            _NAMES.get(other) if other else None,
            schema.metadata or {},
            second.metadata.to_pybytes(),
            memoryview(second.body),
            reader.tell(),
        )
    except (pa.ArrowException, OSError, EOFError, KeyError, TypeError) as error:
        raise ValueError("pyarrow refuses") from error


# What pyarrow calls our value types.
_NAMES = {"halffloat": "float16", "float": "float32", "int8": "int8", "int16": "int16"}


def _arrow_tensor(kind: Any) -> ipc.Tensor | None:
    if not isinstance(kind, ipc.arrow.FixedShapeTensorType):
        return None
    order = None if kind.permutation is None else tuple(kind.permutation)
    return ipc.Tensor(_NAMES.get(str(kind.value_type), "other"), tuple(kind.shape), order)


def _strings_at(header: bytes, body: Buffer, metadata: Values) -> list[tuple[str, int, int]] | None:
    """Key, start and stop of each value of the metadata, in their order; None if that is doubtful.

    What is walked here must be what pyarrow read, and no value may lie over another: bytes of one
    that may change would then be compared by nobody.
    """
    try:
        values = sorted(flat.metadata_values(header), key=lambda value: value[1:])
        strings = [(key.decode(), 8 + start, 8 + stop) for key, start, stop in values]
        read = {key: str(body[start:stop], "utf-8") for key, start, stop in strings}
    except ValueError:  # more entries than ours, or not UTF-8
        return None
    edges = [at for _, start, stop in strings for at in (start, stop)]
    if read != metadata or len(read) != len(strings) or edges != sorted(edges):
        return None
    return strings


def _tensor_type(tensor: ipc.Tensor | None) -> tuple[Dtype, tuple[int, ...]]:
    """Value type and shape of the features column."""
    if tensor is None:
        raise WireError("column features has the wrong type, expected arrow.fixed_shape_tensor")
    dtype, shape, order = tensor
    if dtype not in DTYPES:
        # The type's own words may hold anything: a struct has names that the sender chose.
        raise WireError(f"features have the wrong value type, expected one of {', '.join(DTYPES)}")
    if order is not None and order != tuple(range(len(order))):
        raise WireError("features are permuted, expected row-major tensors")
    if not 1 <= len(shape) <= _MAX_DIMENSIONS:
        raise WireError(f"rows have {len(shape)} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    if min(shape) < 1:
        raise WireError(f"features have rows of shape {shape}, expected positive sizes")
    return dtype, shape


def _buffers(view: memoryview, layout: flat.BatchLayout, max_bytes: int) -> list[Any]:
    """The body's buffers, inflated only after their declared sizes were found to be in bounds."""
    pieces = []
    for offset, length in layout.buffers:
        if offset < 0 or length < 0 or offset + length > len(view):
            raise WireError("a buffer of the record batch lies outside the message")
        pieces.append(view[offset : offset + length])
    if layout.codec is None:
        return pieces
    if ipc.arrow is None:
        raise WireError("message is compressed, which takes pyarrow to read")
    # Compressed: each buffer that is not empty starts with its inflated size, -1 for "stored".
    sizes = [int.from_bytes(p[:8], "little", signed=True) if len(p) >= 8 else 0 for p in pieces]
    if sum(max(size, 0) for size in sizes) > max_bytes:
        raise TooLarge(f"message inflates to more than {max_bytes} bytes")
    try:
        return [
            piece[8:] if size == -1 else _inflate(piece[8:], layout.codec, size) if size else b""
            for piece, size in zip(pieces, sizes, strict=True)
        ]
    except (ipc.arrow.ArrowException, OSError, ValueError) as error:
        raise WireError(f"a buffer does not inflate as {layout.codec}") from error


def _inflate(piece: memoryview, codec: str, size: int) -> Any:
    """``piece`` inflated to exactly ``size`` bytes; anything else raises."""
    if size < 0:
        raise ValueError("negative size")
    pa = ipc.arrow
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
