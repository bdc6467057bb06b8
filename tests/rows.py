"""Requests for engines: rows as they come off the wire, and what must come back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamix import wire
from deployments.engine import Array, Rows

SIZES = (1, 4, 2)


def requests(
    shape: tuple[int, ...], dtype: wire.Dtype = "float32", sizes: Sequence[int] = SIZES
) -> list[Rows]:
    """One request of each size, with normal values in the given value type."""
    generator = np.random.default_rng(1)
    return [Rows(*wire.quantise(generator.normal(size=(n, *shape)), dtype)) for n in sizes]


def shapes(outputs: Sequence[Array]) -> list[tuple[int, ...]]:
    return [output.shape for output in outputs]


def assert_close(actual: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    """Each output within ``tolerance`` of what is expected, relative to max(1, |expected|)."""
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        error = np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted))
        assert error.max() <= tolerance, error.max()
