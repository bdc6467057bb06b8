"""A device's exported parts on disk: read with their hashes, and looked through before they run.

An ONNX file is a program, and foreign input. onnxruntime would open further files that one names,
grow memory as one asks, and has hundreds of operators. A split model needs a few dozen of them, one
flat graph and weights within the file, so :func:`check_program` lets nothing else pass.

The file is a protobuf (onnx.proto3): fields with numbers and wire types. What is walked here is
read by no other library first, and a field that is not listed below is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datamix.bundle import Manifest, onnx_files, read_file, read_manifest
from datamix.errors import BundleError

OPSET = 17
"""Of the operators in exported files; onnxruntime since 1.12 knows it."""
INPUT, OUTPUT = "inputs", "outputs"
"""Names of a part's one input and one output."""
MAX_ONNX_BYTES = 1 << 28

# None makes tensors out of a number alone, as Expand, Tile or Resize do, or runs a graph within.
OPERATORS = frozenset({
    "Abs", "Add", "AveragePool", "BatchNormalization", "Clip", "Constant", "Conv", "Div", "Elu",
    "Erf", "Exp", "Flatten", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "LogSoftmax", "MatMul", "MaxPool",
    "Max", "Min", "Mul", "Neg", "PRelu", "Pow", "ReduceMean", "Relu", "Reshape", "Sigmoid",
    "Softmax", "Softplus", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip
_MAX_PADS = 64  # pixels beside an image; more would grow it without a weight

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL = {1, 2, 3, 4, 5, 6, 7, 8, 14}  # no functions, no training
_GRAPH = {1, 2, 5, 10, 11, 12, 13}  # no sparse weights
_NODE = {1, 2, 3, 4, 5, 6, 7}
_ATTRIBUTE = {1, 2, 3, 4, 5, 7, 8, 20}  # numbers, a string, a tensor: no graphs
_TENSOR = {1, 2, 4, 7, 8, 9}  # no external data, no strings
_FLOAT, _INT64 = 1, 7  # types of a tensor

Field = tuple[int, int, int | bytes]


def load_onnx(path: str | Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read a device's exported parts; the safetensors files may be absent.

    Args:
        path: folder, a local path or a URI.

    Returns:
        The manifest, and by name the bytes of each of its :func:`onnx_files`, looked through.

    Raises:
        BundleError: no exported files, or one that is missing, changed, too large or no such file.
    """
    manifest = read_manifest(path)
    if not manifest.has_onnx:
        raise BundleError(
            f"bundle {str(path)!r} has no ONNX files, expected those of `datamix export`"
        )
    files = {}
    for file in onnx_files(len(manifest.blocks)):
        body = read_file(path, file, MAX_ONNX_BYTES)
        if hashlib.sha256(body).hexdigest() != manifest.hashes[file]:
            raise BundleError(f"{file}: sha256 differs from the manifest's; the file was changed")
        check_program(file, body)
        files[file] = body
    return manifest, files


def check_program(file: str, body: bytes) -> None:
    """Refuse an ONNX file that is more than a flat graph of known operators over its own weights.

    Raises:
        BundleError: it is, or it is no ONNX file of the stated operator set.
    """
    try:
        _check_model(body)
    except ValueError as error:
        raise BundleError(f"{file}: {error}") from None


# ------------------------------------------------------------------ the graph


def _check_model(body: bytes) -> None:
    opsets = []
    graphs = 0
    for number, _, value in _fields(body, "the model", _MODEL):
        if number == 7:
            graphs += 1
            _check_graph(_bytes(value))
        elif number == 8:
            opsets.append(_bytes(value))
    if graphs != 1:
        raise ValueError(f"has {graphs} graphs, expected one ONNX graph")
    # OperatorSetIdProto: domain 1, left out or empty, and version 2.
    found = [{n: v for n, _, v in _fields(opset, "an operator set", {1, 2})} for opset in opsets]
    if [(opset.get(1, b""), opset.get(2)) for opset in found] != [(b"", OPSET)]:
        raise ValueError(f"has other operator sets, expected ONNX's own of version {OPSET}")


def _check_graph(body: bytes) -> None:
    for number, _, value in _fields(body, "the graph", _GRAPH):
        if number == 1:
            _check_node(_bytes(value))
        elif number == 5:
            _check_tensor(_bytes(value))


def _check_node(body: bytes) -> None:
    operator, attributes = "", []
    for number, _, value in _fields(body, "a node", _NODE):
        if number == 4:
            operator = _text(value)
        elif number == 5:
            attributes.append(_bytes(value))
        elif number == 7 and value:
            raise ValueError("has an operator of another domain, expected ONNX's own")
    if operator not in OPERATORS:
        raise ValueError(f"has operator {operator[:64]!r}, expected one of a split model's")
    for attribute in attributes:
        _check_attribute(attribute)


def _check_attribute(body: bytes) -> None:
    name, numbers = "", []
    for number, kind, value in _fields(body, "an attribute", _ATTRIBUTE):
        if number == 1:
            name = _text(value)
        elif number == 5:
            _check_tensor(_bytes(value))
        elif number == 8:
            numbers += [_signed(value)] if kind == _VARINT else _packed(_bytes(value))
    if name == "pads" and not all(0 <= pad <= _MAX_PADS for pad in numbers):
        raise ValueError(f"has pads {numbers[:8]}, expected 0 to {_MAX_PADS}")


def _check_tensor(body: bytes) -> None:
    dtype, values = 0, []
    for number, kind, value in _fields(body, "a tensor", _TENSOR):
        if number == 2:
            dtype = _signed(value)
        elif number == 9 or (number == 4 and kind in (_BYTES, _FIXED32)):  # floats
            values.append(_bytes(value))
    if dtype not in (_FLOAT, _INT64):
        raise ValueError(f"has a tensor of type {dtype}, expected float32 or int64")
    if dtype == _FLOAT and any(len(value) % 4 for value in values):
        raise ValueError("is no ONNX file: a tensor ends within a value")
    if dtype == _FLOAT and not all(np.isfinite(np.frombuffer(v, "<f4")).all() for v in values):
        raise ValueError("holds NaN or Inf, expected finite weights")


# ------------------------------------------------------------------ protobuf


def _fields(body: bytes, what: str, known: set[int]) -> Iterator[Field]:
    """Number, wire type and value of each field of one message."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        number, kind = tag >> 3, tag & 7
        if number not in known:
            raise ValueError(f"field {number} of {what} is not expected in a split model's part")
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(body, at)
        elif kind in (_FIXED64, _FIXED32, _BYTES):
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if size is None:
                size, at = _varint(body, at)
            if size > len(body) - at:
                raise ValueError(f"is no ONNX file: a field of {what} runs over its end")
            value, at = body[at : at + size], at + size
        else:
            raise ValueError(f"is no ONNX file: {what} has a field of wire type {kind}")
        yield number, kind, value


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(body):
            break
        byte = body[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("is no ONNX file: a number runs over its end")


def _packed(body: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(body):
        number, at = _varint(body, at)
        numbers.append(_signed(number))
    return numbers


def _signed(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("is no ONNX file: bytes where a number belongs")
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("is no ONNX file: a number where a message belongs")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode("ascii", "replace")
