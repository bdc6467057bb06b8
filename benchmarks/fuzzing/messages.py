"""Real messages of both directions, and where their parts lie."""

from __future__ import annotations

import random
import struct
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from datamix import flat, wire

SHAPE = (4, 4, 4)
MAX_ROWS = 8  # that the replica under test accepts; real messages have up to one more


class Parts(NamedTuple):
    """Where the parts of a real message lie.

    Attributes:
        schema: start of the schema's header.
        batch: start of the record batch's header.
        body: start of the record batch's buffers.
        numbers: of each 64-bit number of the batch's header: rows, lengths, nulls, offsets, sizes.
        buffers: start of each buffer.
    """

    schema: int
    batch: int
    body: int
    numbers: tuple[int, ...]
    buffers: tuple[int, ...]


def parts_of(message: bytes | bytearray) -> Parts:
    """Find the parts of a message as we or pyarrow write it."""
    batch = 16 + struct.unpack_from("<i", message, 4)[0]
    body = batch + struct.unpack_from("<i", message, batch - 4)[0]
    header = bytes(message[batch:body])
    table = flat._header(header)
    numbers = [batch + flat._field(header, table, 0)]
    for field in (1, 2):
        start = flat._follow(header, flat._field(header, table, field))
        count = struct.unpack_from("<I", header, start)[0]
        numbers += [batch + start + 4 + 8 * index for index in range(2 * count)]
    layout = flat.batch_layout(header)
    return Parts(8, batch, body, tuple(numbers), tuple(body + at for at, _ in layout.buffers))


def name(chance: random.Random) -> str:
    """A request id that nobody else has."""
    return f"{chance.getrandbits(64):016x}"


def features_of(chance: random.Random, rows: int) -> Any:
    """Finite values (rows, *SHAPE) float32 that every value type can hold."""
    raw = chance.randbytes(rows * int(np.prod(SHAPE)))
    return np.frombuffer(raw, np.int8).astype(np.float32).reshape(rows, *SHAPE)


def request(chance: random.Random, dtype: wire.Dtype | None = None) -> bytes:
    """A request as a device sends it, good but for perhaps too many rows or too little time."""
    fields: dict[str, Any] = {}
    if chance.random() < 0.3:
        fields["model"] = "echo"
        fields["model_version"] = chance.choice((None, "1"))
    if chance.random() < 0.2:
        fields["deadline_s"] = chance.choice((0.0, 0.001, 600.0, 600.0))
    if chance.random() < 0.2:
        fields["priority"] = 1
    rows = chance.choice((1, 1, 1, 2, 2, 2, 3, 4, 4, 6, MAX_ROWS, MAX_ROWS + 1))
    fields["dtype"] = dtype or chance.choice(wire.DTYPES)
    return wire.encode_request(features_of(chance, rows), request_id=name(chance), **fields)


def compressed(chance: random.Random) -> bytes:
    """A request whose buffers are lz4 or zstd."""
    batch = read(request(chance))
    return write([batch], batch.schema, chance.choice(("lz4", "zstd")))


def response(chance: random.Random) -> bytes:
    """What the cloud sends: a message, but no request."""
    if chance.random() < 0.5:
        return wire.encode_error(name(chance), 429, "the queue is full", retry_after_s=0.5)
    return wire.encode_response(
        features_of(chance, 2),
        dtype=chance.choice(wire.DTYPES),
        request_id=name(chance),
        model="echo",
        model_version="1",
        block=0,
        queue_s=0.001,
        compute_s=0.002,
        batch_rows=2,
        close_reason="engine_free",
    )


def real(chance: random.Random) -> bytes:
    """Any real message, mostly a request."""
    (make,) = chance.choices((request, compressed, response), (8, 2, 1))
    return make(chance)


def read(message: bytes) -> Any:
    """The record batch of a real message."""
    return pa.ipc.open_stream(message).read_next_batch()


def write(batches: list[Any], schema: Any, codec: str | None = None) -> bytes:
    """One Arrow IPC stream, by pyarrow alone."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    body: bytes = sink.getvalue().to_pybytes()
    return body
