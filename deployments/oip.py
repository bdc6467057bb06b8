"""The Open Inference Protocol v2 over HTTP, JSON and binary tensors: bytes to requests and back.

    request    one input "features", FP32 or FP16, shape [rows, *block shape]
    response   one output "features", the block's output per row, and timings as parameters

The protocol is KServe's (https://kserve.github.io/website/docs/concepts/architecture/data-plane);
binary tensors follow Triton's extension: where the header ``Inference-Header-Content-Length`` is
set, so many bytes of the body are JSON, and the tensors that declare a ``binary_data_size`` come
after them, little-endian and row-major. FP16 has no JSON form, so it travels as binary only.

Pure functions: HTTP is :mod:`deployments.protocol`'s business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from datamix import wire
from datamix.errors import NonFinite, TooLarge, WireError
from datamix.framing import Array
from deployments.engine import Block
from deployments.waiting import Computed

TENSOR = "features"  # the name of the one input and of the one output
MEDIA_TYPES = ("application/json", "application/octet-stream")
LENGTH_HEADER = b"inference-header-content-length"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "schedule_policy")

_DTYPES: dict[str, np.dtype[Any]] = {"FP16": np.dtype("<f2"), "FP32": np.dtype("<f4")}
_DATATYPES = {"float16": "FP16", "float32": "FP32"}
_PARAMETERS = frozenset({"block", "priority", "timeout", "binary_data_output"})
_LENGTH = re.compile(r"[0-9]{1,12}\Z")
# JSON holds up the event loop: some 20 ms per MB read, and 20 ms for so many values written. Lists
# and objects cost most, as Python's garbage collector visits them.
_MAX_JSON_BYTES = 1 << 20
_MAX_JSON_PARTS = 1 << 14
_MAX_JSON_VALUES = 1 << 15
_MAX_ID = 256  # characters
_MAX_AXES = 16
_MAX_NUMBER = 10**12


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded request.

    Attributes:
        wire: what is to be computed; its id is "" where the client gave none.
        binary: whether the output goes back as binary data.
    """

    wire: wire.Request
    binary: bool


class Answer(NamedTuple):
    """A response's body and, where a tensor follows the JSON, the length of the JSON in bytes."""

    body: bytes
    json_length: int | None


# --- requests ---------------------------------------------------------------------------------


def decode_request(body: bytes, header_length: str, *, max_rows: int) -> Request:
    """Check and open one request; a binary tensor becomes a view of ``body``.

    Args:
        body: the HTTP body, whose size was checked before.
        header_length: the value of ``Inference-Header-Content-Length``; "" where it was not sent.
        max_rows: rows accepted at most.

    Raises:
        WireError: not one complete request with one input as this replica takes it.
        TooLarge: more than ``max_rows``, or more JSON than 1 MiB or 16,384 lists and objects.
        NonFinite: a value is NaN or Inf.
    """
    text, tail = _split(body, header_length)
    message = _parse(text)
    parameters = _object(message, "parameters", "the request's parameters")
    if not parameters.keys() <= _PARAMETERS:
        raise WireError(
            "the request has an unknown parameter, expected only " + ", ".join(sorted(_PARAMETERS))
        )
    binary = _flag(parameters, "binary_data_output", False)
    binary = _read_outputs(_list(message, "outputs"), binary)
    request = wire.Request(
        features=_read_input(_list(message, "inputs"), tail, max_rows),
        scale=None,
        request_id=_read_id(message),
        block=_number(parameters, "block", 0),
        deadline_s=_read_timeout(parameters),
        priority=_read_priority(parameters),
    )
    return Request(request, binary)


def _split(body: bytes, header_length: str) -> tuple[bytes, memoryview]:
    """The JSON and the tensors after it; without the header all is JSON."""
    if not header_length:
        return body, memoryview(b"")
    if not _LENGTH.match(header_length):
        raise WireError("Inference-Header-Content-Length is not a whole number of bytes")
    length = int(header_length)
    if not 0 < length <= len(body):
        raise WireError(
            f"Inference-Header-Content-Length is {length}, expected 1 to {len(body)}, the body's "
            "size"
        )
    return body[:length], memoryview(body)[length:]


def _parse(text: bytes) -> dict[str, Any]:
    if len(text) > _MAX_JSON_BYTES:
        raise TooLarge(
            f"JSON has {len(text)} bytes, expected at most {_MAX_JSON_BYTES}; larger tensors can "
            "travel as binary data"
        )
    if text.count(b"[") + text.count(b"{") > _MAX_JSON_PARTS:
        raise TooLarge(
            f"JSON has more than {_MAX_JSON_PARTS} lists and objects; data may be one flat list"
        )
    try:
        message = json.loads(str(text, "utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise WireError("JSON is nested too deeply") from None
    except ValueError:  # not JSON, not UTF-8, or a number of thousands of digits
        raise WireError("the request is not JSON in UTF-8") from None
    if type(message) is not dict:
        raise WireError("JSON is not an object, expected one with inputs")
    return message


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key, readers choose differently; so there must be one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise WireError("JSON has the same key twice in one object")
    return found


def _object(message: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The object at ``key``; an empty one where there is none."""
    value = message.get(key)
    if value is None:
        return {}
    if type(value) is not dict:
        raise WireError(f"{name} are not an object")
    return value


def _list(message: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects at ``key``; none where it is absent."""
    value = message.get(key)
    if value is None:
        return []
    if type(value) is not list or not all(type(item) is dict for item in value):
        raise WireError(f"{key} are not a list of objects")
    return value


def _flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if type(value) is not bool:
        raise WireError(f"parameter {key} is neither true nor false")
    return value


def _number(parameters: dict[str, Any], key: str, default: int) -> int:
    value = parameters.get(key, default)
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise WireError(f"parameter {key} is not a whole number from 0, of at most 12 digits")
    return value


def _read_id(message: dict[str, Any]) -> str:
    value = message.get("id")
    if value is None:
        return ""
    if type(value) is not str or len(value) > _MAX_ID:
        raise WireError(f"id is not a string of at most {_MAX_ID} characters")
    return value


def _read_timeout(parameters: dict[str, Any]) -> float | None:
    """Triton's ``timeout`` in microseconds, as seconds; 0 is none."""
    return _number(parameters, "timeout", 0) / 1e6 or None


def _read_priority(parameters: dict[str, Any]) -> int:
    """Triton counts priorities from 1, the highest, and 0 is the default; the wire from 0."""
    priority = _number(parameters, "priority", 0)
    if priority > 2:
        raise WireError(f"parameter priority is {priority}, expected 0 (default), 1 or 2 (low)")
    return int(priority == 2)


def _read_outputs(outputs: list[dict[str, Any]], binary: bool) -> bool:
    """Whether the output is wanted as binary data; ``binary`` where its entry does not say."""
    if not outputs:
        return binary
    if len(outputs) > 1 or outputs[0].get("name") != TENSOR:
        raise WireError(f"outputs are not one named {TENSOR!r}, the only one there is")
    parameters = _object(outputs[0], "parameters", "the output's parameters")
    if not parameters.keys() <= {"binary_data"}:
        raise WireError("the output has an unknown parameter, expected only binary_data")
    return _flag(parameters, "binary_data", binary)


def _read_input(inputs: list[dict[str, Any]], tail: memoryview, max_rows: int) -> Array:
    if len(inputs) != 1:
        raise WireError(f"request has {len(inputs)} inputs, expected one named {TENSOR!r}")
    (tensor,) = inputs
    if tensor.get("name") != TENSOR:
        raise WireError(f"the input has another name, expected {TENSOR!r}")
    datatype = tensor.get("datatype")
    if type(datatype) is not str or datatype not in _DTYPES:
        raise WireError(f"datatype of the input is not one of {', '.join(_DTYPES)}")
    shape = _read_shape(tensor.get("shape"), max_rows)
    parameters = _object(tensor, "parameters", "the input's parameters")
    if not parameters.keys() <= {"binary_data_size"}:
        raise WireError("the input has an unknown parameter, expected only binary_data_size")
    if not parameters:
        if len(tail):
            raise WireError(f"{len(tail)} bytes follow the JSON, but no input claims them")
        if datatype == "FP16":
            raise WireError("FP16 has no JSON form, expected binary data or FP32")
        features = _read_data(tensor.get("data"), shape)
    else:
        if "data" in tensor:
            raise WireError("the input has both data and a binary_data_size, expected one of them")
        features = _read_binary(parameters, tail, _DTYPES[datatype], shape)
    if not wire.is_finite(features):
        raise NonFinite("features hold NaN or Inf, expected finite values")
    return features


def _read_shape(shape: Any, max_rows: int) -> tuple[int, ...]:
    """All axes, which are numbers small enough to be multiplied."""
    if (
        type(shape) is not list
        or not 1 <= len(shape) <= _MAX_AXES
        or not all(type(size) is int and 0 <= size < _MAX_NUMBER for size in shape)
    ):
        raise WireError(f"shape of the input is not a list of 1 to {_MAX_AXES} whole numbers")
    if shape[0] > max_rows:
        raise TooLarge(f"request has {shape[0]} rows, expected at most {max_rows}")
    if not all(shape):
        raise WireError("the input is empty, expected at least one row and one value")
    return tuple(shape)


def _read_binary(
    parameters: dict[str, Any], tail: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Array:
    size = _number(parameters, "binary_data_size", 0)
    expected = math.prod(shape) * dtype.itemsize
    if size != expected:
        raise WireError(f"binary_data_size is {size}, expected {expected} by shape and datatype")
    if len(tail) != size:
        raise WireError(f"{len(tail)} bytes follow the JSON, expected {size}")
    values = np.frombuffer(tail, dtype).reshape(shape)
    # The JSON may end at any byte, but torch must not be given floats at odd addresses.
    return values if values.flags.aligned else values.copy()


def _read_data(data: Any, shape: tuple[int, ...]) -> Array:
    """Numbers in row-major order, flat or nested as the shape says, as float32."""
    count = math.prod(shape)
    if type(data) is not list:
        raise WireError("the input has neither a list as data nor a binary_data_size")
    values = data
    if len(shape) > 1 and data and type(data[0]) is list:
        for size in shape[1:]:
            if not all(type(part) is list and len(part) == size for part in values):
                raise WireError("data is nested otherwise than shape says")
            values = list(chain.from_iterable(values))
    if len(values) != count:
        raise WireError(f"data has {len(values)} values, expected {count} by shape")
    # numpy would read strings and booleans as numbers, too.
    if not set(map(type, values)) <= {int, float}:
        raise WireError("data holds something that is not a number")
    try:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the caller refuses
            return np.array(values, np.float32).reshape(shape)
    except OverflowError:  # a whole number beyond any float
        raise NonFinite("features hold numbers too large for FP32") from None


# --- responses --------------------------------------------------------------------------------


def encode_response(request: Request, computed: Computed, *, model: str, version: str) -> Answer:
    """The block's output as JSON, or as JSON and binary data.

    Binary data has the request's datatype, and JSON is always FP32.

    Raises:
        NonFinite: the output holds NaN or Inf, as float16 perhaps only.
        TooLarge: JSON was asked for, and there are too many values for it.
    """
    if not request.binary and computed.output.size > _MAX_JSON_VALUES:
        raise TooLarge(
            f"the output has {computed.output.size} values, expected at most {_MAX_JSON_VALUES} "
            "for JSON; more can travel as binary data"
        )
    dtype = request.wire.dtype if request.binary else "float32"
    # Numbers of the engine's float16 output are the same in float32.
    try:
        output, _ = wire.quantise(computed.output, dtype)
    except NonFinite:
        raise NonFinite(
            f"the output of block {request.wire.block} is not finite as {dtype}"
        ) from None
    timing = computed.timing
    tensor: dict[str, Any] = {
        "name": TENSOR,
        "datatype": _DATATYPES[dtype],
        "shape": list(output.shape),
    }
    message: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.wire.request_id:
        message["id"] = request.wire.request_id
    message["parameters"] = {
        "block": request.wire.block,
        "batch_rows": timing.batch_rows,
        "queue_us": int(timing.queue_s * 1e6),
        "compute_us": int(timing.compute_s * 1e6),
        "close_reason": timing.close_reason,
    }
    message["outputs"] = [tensor]
    if not request.binary:
        tensor["data"] = output.ravel().tolist()
        return Answer(json.dumps(message).encode(), None)
    tensor["parameters"] = {"binary_data_size": output.nbytes}
    text = json.dumps(message).encode()
    return Answer(b"".join((text, output.data)), len(text))


# --- what a client may ask about a model --------------------------------------------------------


def model_config(model: str, blocks: Sequence[Block], max_rows: int) -> dict[str, Any]:
    """`GET /v2/models/{model}/config`, in Triton's terms: shapes are block 0's, without rows."""

    def tensor(shape: Sequence[int]) -> dict[str, Any]:
        return {"name": TENSOR, "data_type": "TYPE_FP32", "dims": list(shape)}

    return {
        "name": model,
        "platform": "datamix",
        "backend": "datamix",
        "max_batch_size": max_rows,
        "input": [tensor(blocks[0].input_shape)],
        "output": [tensor(blocks[0].output_shape)],
        "dynamic_batching": {},
    }


def repository_index(models: Sequence[tuple[str, str, str]], body: bytes) -> list[dict[str, str]]:
    """`POST /v2/repository/index`: the models that are served.

    Args:
        models: (name, version, reason) of every version, the reason "" where it is ready.
        body: the request's: nothing, or JSON that may ask with ``ready`` for those only.

    Raises:
        WireError: the body is neither.
    """
    only_ready = bool(body) and _flag(_parse(body), "ready", False)
    return [
        {
            "name": name,
            "version": version,
            "state": "UNAVAILABLE" if reason else "READY",
            "reason": reason,
        }
        for name, version, reason in models
        if not (reason and only_ready)
    ]
