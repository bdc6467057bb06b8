"""Tensors and their metadata to and from Arrow IPC bytes: the wire, version 1 (docs/wire.md).

One message is one complete Arrow IPC stream: a schema, exactly one record batch, end-of-stream.

    request   features: fixed_shape_tensor(float16 | float32 | int8 | int16), one row is one mixture
              scale:    float32, only with integers (value = integer * scale)
              metadata: datamix.protocol, datamix.request_id, and what the sender wants
    response  the same columns, the backbone's output per row, and timings as metadata

Decoding copies nothing: the arrays of a decoded message are read-only views of its bytes. The bytes
themselves are the business of :mod:`datamix.framing` and :mod:`datamix.unframing`.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datamix import flat
from datamix.errors import NonFinite, WireError
from datamix.framing import DTYPE_OF, STEPS, Array, Buffer, Template, Values, frame, template
from datamix.framing import DTYPES as DTYPES  # part of this module's interface
from datamix.framing import Dtype as Dtype
from datamix.noise import MAP as NOISE_MAP
from datamix.noise import SEED_BYTES, to_rows
from datamix.tracing import FIELD as TRACEPARENT
from datamix.tracing import Parent
from datamix.unframing import Reader

PROTOCOL = "1"
MEDIA_TYPE = "application/vnd.apache.arrow.stream"
CLOSE_REASONS = ("engine_free", "full", "deadline", "drain")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
# Signed and unsigned integers of a float's size, and the bits of positive and negative infinity.
_INFINITY = {
    2: (np.int16, 0x7C00, np.uint16, 0xFC00),
    4: (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}


class Request(NamedTuple):
    """A decoded request.

    Attributes:
        features: (rows, *shape), in one of ``DTYPES``; a read-only view of the message.
        scale: (rows,) float32 with integer features, else None.
        request_id: 1 to 64 characters of ``[A-Za-z0-9._-]``.
        model: the model asked for; None for the one of the path.
        model_version: the version asked for; None for the newest.
        block: which block of the backbone.
        deadline_s: the budget left on arrival, in seconds; None for no deadline.
        priority: 0 normal, 1 low.
        noise: the features are seeds (rows, 32), to be expanded by :mod:`datamix.noise`.
        traceparent: the device's span that this belongs to (:mod:`datamix.tracing`); mostly None.
    """

    features: Array
    scale: Array | None
    request_id: str
    model: str | None = None
    model_version: str | None = None
    block: int = 0
    deadline_s: float | None = None
    priority: int = 0
    noise: bool = False
    traceparent: str | None = None

    @property
    def rows(self) -> int:
        """Number of mixtures."""
        return int(self.features.shape[0])

    @property
    def dtype(self) -> Dtype:
        """The value type that the response will have: the request's, and float32 for seeds."""
        return "float32" if self.noise else DTYPE_OF[self.features.dtype.char]


_max = np.maximum.reduce


class Response(NamedTuple):
    """A decoded response: the backbone's output, or the error that ``status`` names.

    Attributes:
        features: (rows, *shape), in the request's value type; zero rows with an error.
        scale: (rows,) float32 with integer features, else None.
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
    # Not ndarray.max, which is Python around the same call.
    return bool(
        _max(values.view(signed), None) < positive and _max(values.view(unsigned), None) < negative
    )


def quantise(
    values: Array, dtype: Dtype, *, check: bool = True, step: float | None = None
) -> tuple[Array, Array | None]:
    """Float values (rows, *shape) in the wire's value type, with a scale per row for integers.

    Without ``check``, values that are not finite go through as float16 and float32. A row's scale
    is its largest magnitude over the type's steps each way, or ``step``, for integers only.

    Raises:
        NonFinite: a value is NaN or Inf, or too large for float16, or for so many of ``step``.
        WireError: ``dtype`` is none of ``DTYPES``, or ``step`` none of a positive float32.
    """
    if dtype in STEPS:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the next line refuses
            values = np.ascontiguousarray(values, np.float32)
        if not is_finite(values):
            raise NonFinite("features hold NaN or Inf, expected finite values")
        scale = _scales(values, STEPS[dtype], step)
        steps = values / scale.reshape(-1, *[1] * (values.ndim - 1))
        np.rint(steps, out=steps)
        if step is not None and steps.size and np.abs(steps).max() > STEPS[dtype]:
            raise NonFinite(
                f"features exceed {STEPS[dtype]} steps of {step:g}, which {dtype} holds"
            )
        return steps.astype(dtype), scale
    if step is not None:
        raise WireError(f"step is {step:g} for {dtype}, expected one with int8 and int16 only")
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


def _scales(values: Array, steps: int, step: float | None) -> npt.NDArray[np.float32]:
    """A scale per row: ``step``, or as coarse as the row's largest value needs."""
    if step is not None:
        # A subnormal one would be too coarse a number.
        if not np.finfo(np.float32).tiny <= step <= np.finfo(np.float32).max / (steps + 1):
            raise WireError(f"step is {step}, expected a positive float32 that is not extreme")
        return np.full(len(values), step, np.float32)
    flat = values.reshape(len(values), -1)
    # The largest magnitude, without a copy that holds all of them.
    scale = np.maximum(flat.max(axis=1), -flat.min(axis=1)) / np.float32(steps)
    # Below the least normal float a scale is too coarse a number: the steps could miss the
    # largest value. A row of zeros is divided safely, too.
    least: npt.NDArray[np.float32] = np.maximum(scale, np.finfo(np.float32).tiny)
    return least


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
    if np.abs(scale).max() <= np.finfo(np.float32).max / (1 << 15):  # NaN is not
        return True
    return is_finite(dequantise(values, scale))


def _name(metadata: Values, key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not _NAME.match(value):
        raise WireError(f"{key} is not 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return value


def _number(metadata: Values, key: str) -> int | None:
    value = metadata.get(key)
    return None if value is None else _whole(key, value)


def _number_or(metadata: Values, key: str, default: int) -> int:
    value = metadata.get(key)
    return default if value is None else _whole(key, value)


def _whole(key: str, value: str) -> int:
    # In every message several times, so without a regular expression.
    if not (value.isascii() and value.isdigit() and len(value) <= 12):
        raise WireError(f"{key} is not a whole number of at most 12 digits")
    return int(value)


def _check_protocol(metadata: Values) -> None:
    if metadata.get("datamix.protocol") != PROTOCOL:
        raise WireError(f"datamix.protocol is missing or unknown, expected {PROTOCOL!r}")


def _request_id(variables: Values) -> str:
    request_id = _name(variables, "datamix.request_id")
    if request_id is None:
        raise WireError("datamix.request_id is missing")
    return request_id


def check_name(key: str, value: str) -> str:
    """Return a name that can travel.

    Raises:
        WireError: it is not 1 to 64 characters of ``A-Z a-z 0-9 . _ -``.
    """
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
    step: float | None = None,
    traceparent: str | None = None,
) -> bytes:
    """Mixtures (rows, *shape), any float dtype, as one message of value type ``dtype``.

    ``step`` is the scale of all rows of integers, where it is not to be made of their values;
    ``traceparent`` the span of the device that this request belongs to (:mod:`datamix.tracing`).

    Raises:
        NonFinite: a value is not finite, or more than ``dtype`` holds.
        WireError: the id, a name, a number or the shape cannot travel.
    """
    if features.ndim < 2 or not features.size:
        raise WireError(f"features have shape {features.shape}, expected (rows, *shape), not empty")
    values, fields = _request_fields(
        request_id, model, model_version, block, deadline_s, priority, traceparent
    )
    quantised, scale = quantise(features, dtype, step=step)
    layout = template(dtype, quantised.shape, fields)
    return b"".join(layout.fill(values, quantised, scale))


def encode_noise_request(
    seeds: Array,
    *,
    request_id: str,
    model: str | None = None,
    model_version: str | None = None,
    block: int = 0,
    deadline_s: float | None = None,
    priority: int = 0,
) -> bytes:
    """Seeds of noise (rows, 32) uint8, for the cloud to expand and compute on.

    The seeds travel as int8 features whose scales are 1, marked by ``datamix.noise``; the answer is
    float32, one row for each seed. See :mod:`datamix.noise`.

    Raises:
        WireError: the id, a name, a number or the seeds cannot travel.
    """
    rows = to_rows(seeds)
    values, fields = _request_fields(request_id, model, model_version, block, deadline_s, priority)
    layout = template("int8", rows.shape, (*fields, ("datamix.noise", NOISE_MAP)))
    return b"".join(layout.fill(values, rows, np.ones(len(rows), np.float32)))


def _request_fields(
    request_id: str,
    model: str | None,
    model_version: str | None,
    block: int,
    deadline_s: float | None,
    priority: int,
    traceparent: str | None = None,
) -> tuple[tuple[bytes, ...], tuple[tuple[str, str | int], ...]]:
    """A request's metadata: the values that change, and the template's fields."""
    if not 0 <= block < 10**12:
        raise WireError(f"block is {block}, expected 0 or more, at most 12 digits")
    if priority not in (0, 1):
        raise WireError(f"priority is {priority}, expected 0 or 1")
    if deadline_s is not None and not deadline_s < 1e9:
        raise WireError(f"deadline_s is {deadline_s}, expected less than 1e9")
    values = [check_name("request_id", request_id).encode()]
    fields: list[tuple[str, str | int]] = [
        ("datamix.protocol", PROTOCOL),
        ("datamix.request_id", len(values[0])),
    ]
    if model is not None:
        fields.append(("datamix.model", check_name("model", model)))
    if model_version is not None:
        fields.append(("datamix.model_version", check_name("model_version", model_version)))
    if block:
        fields.append(("datamix.block", str(block)))
    if deadline_s is not None:
        values.append(b"%d" % math.ceil(max(0.0, deadline_s) * 1000))
        fields.append(("datamix.deadline_ms", len(values[1])))
    if priority:
        fields.append(("datamix.priority", str(priority)))
    if traceparent is not None:
        values.append(str(Parent.parse(traceparent)).encode())
        fields.append((TRACEPARENT, len(values[-1])))
    return tuple(values), tuple(fields)


def _traceparent(variables: Values) -> str | None:
    text = variables.get(TRACEPARENT)
    return None if text is None else str(Parent.parse(text))


class _Fixed(NamedTuple):
    """What a request says that the next one of the same device says too."""

    model: str | None
    model_version: str | None
    block: int
    priority: int
    noise: bool


def _read_fixed(metadata: Values) -> _Fixed:
    _check_protocol(metadata)
    priority = _number_or(metadata, "datamix.priority", 0)
    if priority not in (0, 1):
        raise WireError(f"datamix.priority is {priority}, expected 0 or 1")
    return _Fixed(
        _name(metadata, "datamix.model"),
        _name(metadata, "datamix.model_version"),
        _number_or(metadata, "datamix.block", 0),
        priority,
        _is_noise(metadata),
    )


def _is_noise(metadata: Values) -> bool:
    noise = metadata.get("datamix.noise")
    if noise not in (None, NOISE_MAP):
        raise WireError(f"datamix.noise names an unknown map, expected {NOISE_MAP!r}")
    return noise is not None


def _check_seeds(features: Array, scale: Array | None) -> None:
    is_seeds = features.dtype.char == "b" and features.shape[1:] == (SEED_BYTES,)
    if not is_seeds or scale is None or not (scale == 1).all():
        raise WireError(
            f"rows of noise have another form, expected int8 seeds of shape ({SEED_BYTES},) with"
            " scales of 1"
        )


requests = Reader(
    frozenset({"datamix.request_id", "datamix.deadline_ms", TRACEPARENT}), _read_fixed
)


def decode_request(body: Buffer, *, max_bytes: int = 1 << 24, max_rows: int = 1 << 12) -> Request:
    """Check and open one request; its arrays are views of ``body`` where that is not compressed.

    Raises:
        WireError: not one complete message with the columns and metadata of the protocol.
        TooLarge: more than ``max_bytes``, as received or inflated, or more than ``max_rows``.
        NonFinite: a value is NaN or Inf.
    """
    features, scale, fixed, variables = requests.read(body, max_bytes=max_bytes, max_rows=max_rows)
    request_id = _request_id(variables)
    if not len(features):
        raise WireError("request has no rows, expected at least one")
    if not _is_finite(features, scale):
        raise NonFinite("features hold NaN or Inf, expected finite values")
    if fixed.noise:
        _check_seeds(features, scale)
    deadline_ms = _number(variables, "datamix.deadline_ms")
    return Request(
        features,
        scale,
        request_id,
        *fixed[:3],
        None if deadline_ms is None else deadline_ms / 1000,
        *fixed[3:],
        _traceparent(variables),
    )


# --- responses --------------------------------------------------------------------------------


def encode_response(features: Array, **fields: Any) -> bytes:
    """The backbone's output as one message; takes and raises what :func:`response_parts` does."""
    return b"".join(response_parts(features, **fields))


def response_parts(
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
) -> list[Any]:
    """The backbone's output (rows, *shape) as one message in parts, in the request's value type.

    Whoever sends the message joins its parts, behind whatever has to go before, so that the output
    is copied once. Float values are not checked: the device must look for NaN and Inf anyway, as it
    does not trust the cloud, and the cloud's time is the scarce one.

    Raises:
        NonFinite: the output is not finite and ``dtype`` is one of integers, which cannot say so.
    """
    values = (
        request_id.encode(),
        b"%d" % int(queue_s * 1e6),
        b"%d" % int(compute_s * 1e6),
        b"%d" % batch_rows,
    )
    quantised, scale = quantise(features, dtype, check=False)
    layout = _response_template(
        dtype, quantised.shape, model, model_version, block, close_reason, tuple(map(len, values))
    )
    return layout.fill(values, quantised, scale)


@lru_cache(maxsize=4096)
def _response_template(
    dtype: Dtype,
    shape: tuple[int, ...],
    model: str,
    model_version: str,
    block: int,
    close_reason: str,
    lengths: tuple[int, ...],
) -> Template:
    request_id, queue_us, compute_us, batch_rows = lengths
    fields: tuple[tuple[str, str | int], ...] = (
        ("datamix.protocol", PROTOCOL),
        ("datamix.request_id", request_id),
        ("datamix.status", "200"),
        ("datamix.model", model),
        ("datamix.model_version", model_version),
        ("datamix.block", str(block)),
        ("datamix.queue_us", queue_us),
        ("datamix.compute_us", compute_us),
        ("datamix.batch_rows", batch_rows),
        ("datamix.close_reason", close_reason),
    )
    return template(dtype, shape, fields)


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
    return frame(np.empty((0, 1), np.float32), None, metadata)


def decode_response(body: Buffer, *, max_bytes: int = 1 << 26, max_rows: int = 1 << 14) -> Response:
    """Check and open one response.

    Raises:
        WireError: not a message of this protocol. (An error status is returned, not raised.)
        TooLarge: more bytes or rows than allowed.
    """
    features, scale, fixed, values = responses.read(body, max_bytes=max_bytes, max_rows=max_rows)
    retry_after_ms = _number(values, "datamix.retry_after_ms")
    return Response(
        features,
        scale,
        _request_id(values),
        fixed.status,
        values.get("datamix.error"),
        None if retry_after_ms is None else retry_after_ms / 1000,
        fixed.model,
        fixed.model_version,
        fixed.block,
        _number_or(values, "datamix.queue_us", 0) / 1e6,
        _number_or(values, "datamix.compute_us", 0) / 1e6,
        _number_or(values, "datamix.batch_rows", 0),
        fixed.close_reason,
    )


class _FixedResponse(NamedTuple):
    """What a response says that the next one of the same model says too."""

    status: int
    model: str | None
    model_version: str | None
    block: int
    close_reason: str


def _read_fixed_response(metadata: Values) -> _FixedResponse:
    _check_protocol(metadata)
    return _FixedResponse(
        _number_or(metadata, "datamix.status", 200),
        _name(metadata, "datamix.model"),
        _name(metadata, "datamix.model_version"),
        _number_or(metadata, "datamix.block", 0),
        metadata.get("datamix.close_reason", ""),
    )


responses = Reader(
    frozenset(
        {
            "datamix.request_id",
            "datamix.queue_us",
            "datamix.compute_us",
            "datamix.batch_rows",
            "datamix.error",
            "datamix.retry_after_ms",
        }
    ),
    _read_fixed_response,
)


def peek_request_id(body: Buffer) -> str:
    """The request id of a message that may be broken elsewhere; ``-`` where it cannot be found.

    An error on a stream must name the request it answers, even if that request's columns are bad.
    """
    try:
        size = int.from_bytes(body[4:8], "little")
        header = bytes(body[8 : 8 + size])
        # Of a key that comes twice the first value counts, as it does for pyarrow.
        spans = {key: span for key, *span in reversed(flat.metadata_values(header))}
        value = header[slice(*spans[b"datamix.request_id"])].decode()
    except (ValueError, KeyError):
        return "-"
    return value if _NAME.match(value) else "-"
