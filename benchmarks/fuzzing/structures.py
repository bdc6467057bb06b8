"""Messages that hypothesis makes up: good as Arrow or as JSON, of a meaning nobody planned."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzzing.messages import MAX_ROWS, SHAPE, features_of, name, write
from benchmarks.fuzzing.mutants import Mutant

T = TypeVar("T")

_CHUNK = 50  # examples at once: hypothesis starts anew for each chunk, with a seed of its own

_NAMES = st.sampled_from(["features", "features", "scale", "label", ""]) | st.text(max_size=8)
_SHAPES = st.just(list(SHAPE)) | st.lists(st.integers(1, 5), min_size=1, max_size=4)
_TENSOR_TYPES = st.sampled_from(
    [pa.float16(), pa.float32(), pa.int8(), pa.float64(), pa.uint8(), pa.int32(), pa.int64()]
)
_PLAIN = st.sampled_from(
    [
        *(pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.string()),
        *(pa.binary(), pa.decimal128(5, 2), pa.timestamp("s", "UTC"), pa.list_(pa.float32())),
        *(pa.list_(pa.float32(), 3), pa.struct([("features", pa.float32())]), pa.string_view()),
        *(pa.dictionary(pa.int8(), pa.string()), pa.map_(pa.string(), pa.int8())),
        *(pa.run_end_encoded(pa.int16(), pa.int8()), pa.large_list(pa.int8()), pa.uuid()),
    ]
)
_KEYS = st.sampled_from(
    [
        *("datamix.protocol", "datamix.request_id", "datamix.model", "datamix.model_version"),
        *("datamix.deadline_ms", "datamix.priority", "datamix.block", "datamix.status"),
    ]
)
_TEXTS = st.sampled_from(["0", "1", "echo", "-1", "600000"]) | st.text(max_size=20)


@st.composite
def _tensors(draw: st.DrawFn, rows: int, value_type: Any = None) -> Any:
    """A column of tensors."""
    value_type, shape = value_type or draw(_TENSOR_TYPES), draw(_SHAPES)
    size = int(np.prod(shape))
    raw = draw(st.binary(min_size=16, max_size=16)) * (rows * size)
    flat = pa.array(np.frombuffer(raw[: rows * size], np.int8)).cast(value_type, safe=False)
    storage = pa.FixedSizeListArray.from_arrays(flat, size)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(value_type, shape), storage)


def _scale(rows: int) -> st.SearchStrategy[Any]:
    numbers = st.lists(st.floats(width=32), min_size=rows, max_size=rows)
    return numbers.map(lambda found: pa.array(np.array(found, np.float32)))


def _columns(rows: int) -> st.SearchStrategy[list[tuple[str, Any]]]:
    """Columns as they should be, or any others."""

    def named(*columns: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[str, Any]]]:
        return st.tuples(*columns).map(lambda c: list(zip(("features", "scale"), c, strict=False)))

    odd = _PLAIN.map(lambda kind: pa.nulls(rows, kind))
    anything = st.tuples(_NAMES, _tensors(rows) | odd | _scale(rows))
    return st.one_of(
        named(_tensors(rows)),
        named(_tensors(rows, pa.int8()), _scale(rows)),
        named(_tensors(rows), odd),
        st.lists(anything, max_size=3),
    )


@st.composite
def arrow(draw: st.DrawFn) -> bytes:
    """An Arrow stream with any columns, metadata, number of batches and compression."""
    columns = draw(_columns(draw(st.integers(0, 10))))
    metadata = {
        "datamix.protocol": "1",
        "datamix.request_id": f"{draw(st.integers(0, 1 << 64)):016x}",
    }
    if draw(st.integers(0, 3)) == 0:
        metadata |= draw(st.dictionaries(_KEYS | st.text(max_size=8), _TEXTS, max_size=5))
    elif draw(st.integers(0, 7)) == 0:
        del metadata[draw(st.sampled_from(sorted(metadata)))]
    schema = pa.schema([pa.field(name, column.type) for name, column in columns], metadata)
    batch = pa.RecordBatch.from_arrays([column for _, column in columns], schema=schema)
    batches = [batch] * draw(st.sampled_from([1] * 8 + [0, 2]))
    return write(batches, schema, draw(st.sampled_from([None, None, "lz4", "zstd"])))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda some: (
        st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=8), some, max_size=4)
    ),
    max_leaves=8,
)
_NUMBERS = st.integers(-2, 10**13) | st.integers() | st.floats() | _JSON
# Where a request of the Open Inference Protocol has something else than expected; often nowhere.
_ODD = st.sampled_from(
    ["", "", "", "name", "datatype", "shape", "size", "tail", "value", "data", "inputs", "tensor",
     "parameters", "parameter", "outputs", "id", "extra"]
)  # fmt: skip
_PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "block": st.just(0),
        "priority": st.integers(0, 2),
        "timeout": st.sampled_from([0, 1, 600_000_000]),
        "binary_data_output": st.booleans(),
    },
)


@st.composite
def oip(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """A body of the Open Inference Protocol and, with binary data, the length of its JSON."""
    odd = draw(_ODD)
    binary = draw(st.booleans()) or odd in ("size", "tail")
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    tensor, tail = _tensor(chance, draw(st.integers(1, MAX_ROWS)), binary)
    message: dict[str, Any] = {"id": name(chance), "inputs": [tensor]}
    message["parameters"] = draw(_PARAMETERS)
    if odd in ("name", "datatype", "shape", "data"):
        tensor[odd] = draw(_JSON)
    elif odd in ("inputs", "parameters", "outputs", "id", "extra"):
        message[odd] = draw(_JSON)
    elif odd == "size":
        tensor["parameters"]["binary_data_size"] = draw(_NUMBERS)
    elif odd == "tensor":
        tensor["parameters"] = draw(_JSON)
    elif odd == "tail":
        tail = tail[: draw(st.integers(0, len(tail)))]
    elif odd == "value" and not binary:
        tensor["data"][0] = draw(_NUMBERS)
    elif odd == "parameter":
        message["parameters"][draw(st.sampled_from(["block", "priority", "timeout"]))] = draw(
            _NUMBERS
        )
    text = json.dumps(message).encode()
    return text + tail, len(text) if binary else None


def _tensor(chance: random.Random, rows: int, binary: bool) -> tuple[dict[str, Any], bytes]:
    """A good input, and its values where they are binary."""
    numbers = features_of(chance, rows)
    tensor: dict[str, Any] = {"name": "features", "shape": [rows, *SHAPE], "datatype": "FP32"}
    if not binary:
        tensor["data"] = chance.choice((numbers, numbers.ravel())).tolist()
        return tensor, b""
    tensor["datatype"] = chance.choice(("FP16", "FP32"))
    tail = numbers.astype("<f2" if tensor["datatype"] == "FP16" else "<f4").tobytes()
    tensor["parameters"] = {"binary_data_size": len(tail)}
    return tensor, tail


def examples(strategy: st.SearchStrategy[T], count: int, number: int) -> list[T]:
    """``count`` examples of ``strategy``, the same for the same ``number``."""
    found: list[T] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: T) -> None:
        found.append(value)

    collect()
    return found


def endless(strategy: st.SearchStrategy[T], text: str) -> Iterator[T]:
    """Examples without end, a chunk at a time; the same for the same ``text``."""
    chance = random.Random(text)
    while True:
        yield from examples(strategy, _CHUNK, chance.getrandbits(64))


def streams(text: str) -> Iterator[Mutant]:
    """Arrow streams without end."""
    return (Mutant("arrow structure", body) for body in endless(arrow(), text))
