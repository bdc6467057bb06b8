"""Rows of any mixture of value types find their places, and nobody else's."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datamix import wire
from deployments.engine import Rows
from deployments.staging import lay_out, most_bytes, pack, view

SHAPE = (3, 2, 2)

asked = st.lists(
    st.tuples(st.sampled_from(wire.DTYPES), st.integers(1, 9)), min_size=1, max_size=12
)


def batch(sizes: list[tuple[wire.Dtype, int]]) -> list[Rows]:
    generator = np.random.default_rng(len(sizes))
    return [
        Rows(*wire.quantise(generator.normal(size=(rows, *SHAPE)), dtype)) for dtype, rows in sizes
    ]


@given(asked)
def test_every_row_is_found_again(sizes: list[tuple[wire.Dtype, int]]) -> None:
    requests = batch(sizes)
    layout = lay_out(requests, SHAPE)
    assert layout.rows == sum(rows for _, rows in sizes)
    assert layout.size_bytes <= most_bytes(layout.rows, SHAPE)
    memory = np.full(layout.size_bytes, 255, np.uint8)
    pack(requests, layout, SHAPE, memory)
    values = np.full((layout.rows, *SHAPE), np.nan, np.float32)
    for dtype, first, rows, offset, scale_offset in layout.segments:
        part = view(memory, offset, (rows, *SHAPE), dtype)
        scale = None if scale_offset is None else view(memory, scale_offset, (rows,), "float32")
        values[first : first + rows] = wire.dequantise(part, scale)
    for (features, scale), start in zip(requests, layout.starts, strict=True):
        found = values[start : start + len(features)]
        np.testing.assert_array_equal(found, wire.dequantise(features, scale))


@given(asked)
def test_the_parts_do_not_overlap_and_are_aligned(sizes: list[tuple[wire.Dtype, int]]) -> None:
    layout = lay_out(batch(sizes), SHAPE)
    end = 0
    for dtype, _, rows, offset, scale_offset in layout.segments:
        for at, size in ((offset, rows * 12 * np.dtype(dtype).itemsize), (scale_offset, rows * 4)):
            if at is not None:
                assert at >= end
                assert at % 256 == 0
                end = at + size
    assert end <= layout.size_bytes


def test_a_batch_of_one_value_type_is_one_piece_in_the_order_of_the_requests() -> None:
    layout = lay_out(batch([("float16", 2), ("float16", 3)]), SHAPE)
    assert [segment[:4] for segment in layout.segments] == [("float16", 0, 5, 0)]
    assert layout.starts == [0, 2]


def test_rows_may_be_views_with_gaps() -> None:
    wide = np.arange(4 * 24, dtype=np.float32).reshape(4, 3, 2, 4)
    requests = [Rows(wide[:, :, :, ::2], None)]
    layout = lay_out(requests, SHAPE)
    memory = np.zeros(layout.size_bytes, np.uint8)
    pack(requests, layout, SHAPE, memory)
    np.testing.assert_array_equal(view(memory, 0, (4, *SHAPE), "float32"), wide[:, :, :, ::2])
