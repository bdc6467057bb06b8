"""The rows of one batch as one piece of memory, in the value types they came in.

A GPU gets what was on the wire, and converts and scales it itself: float16 is half and int8 a
quarter of what float32 would be. Rows of one value type lie together, so that one batch may hold
several; each part begins at a multiple of 256:

    float16 rows | float32 rows | int8 rows | their scales | int16 rows | their scales
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from datamix.framing import STEPS
from deployments.engine import Rows, Shape

_DTYPES = ("float16", "float32", *STEPS)
_ALIGN = 256


class Segment(NamedTuple):
    """Rows of one value type.

    Attributes:
        dtype: ``float16``, ``float32``, ``int8`` or ``int16``.
        first: its first row in the batch.
        rows: how many it has.
        offset: where they lie, in bytes.
        scale_offset: where their scales lie, in bytes; None without.
    """

    dtype: str
    first: int
    rows: int
    offset: int
    scale_offset: int | None


class Layout(NamedTuple):
    """Where everything of a batch lies.

    Attributes:
        rows: of the whole batch.
        size_bytes: of everything, gaps included.
        segments: the parts, in order.
        starts: each request's first row in the batch, in the order of the requests.
    """

    rows: int
    size_bytes: int
    segments: list[Segment]
    starts: list[int]


def most_bytes(rows: int, shape: Shape) -> int:
    """What a batch of ``rows`` needs at most, whatever it is made of."""
    return rows * (math.prod(shape) + 1) * 4 + (len(_DTYPES) + len(STEPS)) * _ALIGN


def lay_out(requests: Sequence[Rows], shape: Shape) -> Layout:
    """Find a place for every request's rows of ``shape``."""
    values = math.prod(shape)
    starts = [0] * len(requests)
    segments = []
    rows = offset = 0
    for dtype in _DTYPES:
        first = rows
        for index, (features, _) in enumerate(requests):
            if features.dtype == dtype:
                starts[index] = rows
                rows += len(features)
        if rows == first:
            continue
        begins = offset
        offset = _aligned(offset + (rows - first) * values * np.dtype(dtype).itemsize)
        scales = None
        if dtype in STEPS:
            scales = offset
            offset = _aligned(offset + (rows - first) * 4)
        segments.append(Segment(dtype, first, rows - first, begins, scales))
    return Layout(rows, offset, segments, starts)


def pack(
    requests: Sequence[Rows], layout: Layout, shape: Shape, memory: npt.NDArray[np.uint8]
) -> None:
    """Copy the rows of all requests to their places in ``memory``."""
    for dtype, first, rows, offset, scale_offset in layout.segments:
        part = view(memory, offset, (rows, *shape), dtype)
        scales = None if scale_offset is None else view(memory, scale_offset, (rows,), "float32")
        for (features, scale), start in zip(requests, layout.starts, strict=True):
            if features.dtype == dtype:
                at = slice(start - first, start - first + len(features))
                part[at] = features
                if scales is not None and scale is not None:
                    scales[at] = scale


def view(
    memory: npt.NDArray[np.uint8], offset: int, shape: Shape, dtype: str
) -> npt.NDArray[np.generic]:
    """Part of ``memory`` as an array."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
