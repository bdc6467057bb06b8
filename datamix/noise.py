"""Noise map 1: from a seed of 32 bytes to Gaussian noise, the same on the device and in the cloud.

In the mode split (docs/privacy.md) operator B gets a seed where the device has noise, which takes
32 bytes where the noise would take thousands. Both ends must then make the same noise:

    keystream   ChaCha20 (RFC 8439) under the seed as its key, counter and nonce all zero
    words       the keystream as little-endian unsigned integers of 64 bits; for n values
                p = ceil(n / 2) pairs: the first p words are w0, the next p words are w1
    uniforms    u = (floor(w / 2^11) + 1/2) / 2^53 in float64, above 0 and at most 1
    values      Box and Muller (1958): r = sqrt(-2 ln u0), a = 2 pi u1; first all r cos a, then all
                r sin a, of these the first n, in float64, as an array in C order

Both ends agree to a few units in the last place of float64, however their libraries compute a
logarithm, and so to one in float32, in which the cloud computes. No value exceeds 8.66, where a
normal distribution has 1 in 2^57. A seed is a key: it is used once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError, WireError

MAP = "1"
"""What ``datamix.noise`` says on the wire."""

SEED_BYTES = 32

Array = npt.NDArray[Any]


def gaussians(seed: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Expand a seed to standard normal values of ``shape``, float64.

    Raises:
        ConfigError: the seed does not have 32 bytes, or the shape has no values.
    """
    return expand([seed], shape).reshape(shape)


def expand(seeds: Sequence[bytes], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """A row of standard normal values for each seed: (rows, *shape) float64.

    Raises:
        ConfigError: a seed does not have 32 bytes, or the shape has no values.
    """
    noise = np.empty(_rows_of(len(seeds), shape))
    _fill(noise, seeds)
    return noise


def expand_rows(rows: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A row of noise for each seed: (rows, 32) uint8 or int8 to (rows, *shape) float32.

    Raises:
        ConfigError: the shape has no values.
        WireError: seeds of another shape or type.
    """
    noise = np.empty(_rows_of(len(rows), shape), np.float32)
    _fill(noise, from_rows(rows))
    return noise


def _rows_of(rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    if min(shape, default=0) < 1:
        raise ConfigError(f"shape of noise is {shape}, expected positive sizes")
    return (rows, *shape)


def _fill(noise: Array, seeds: Sequence[bytes]) -> None:
    maker = _Maker(math.prod(noise.shape[1:]))
    try:
        for row, seed in zip(noise, seeds, strict=True):
            maker.make(seed, row.reshape(-1))
    finally:
        maker.wipe()


class _Maker:
    """Makes rows of ``count`` values, in memory that is used again for each.

    Memory that is fresh for every step costs more than the arithmetic.
    """

    def __init__(self, count: int) -> None:
        pairs = (count + 1) // 2
        self._zeros = bytes(16 * pairs)
        # Ciphers want room for most of a block beyond what they write.
        self._stream = np.zeros(16 * pairs + 64, np.uint8)
        self._words = self._stream[: 16 * pairs].view("<i8").reshape(2, pairs)
        self._uniform = np.empty((2, pairs))
        self._square = np.empty(pairs)

    def make(self, seed: bytes, out: Array) -> None:
        """Fill ``out`` (count,) of float64 or float32."""
        # Here, as whoever reads a message needs none of it.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        if len(seed) != SEED_BYTES:
            raise ConfigError(f"seed has {len(seed)} bytes, expected {SEED_BYTES}")
        cipher = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
        cipher.update_into(self._zeros, self._stream.data)
        # Floor of w / 2^11, as signed words, which become floats faster; the shift keeps the sign,
        # so the mask takes what it copied.
        words = self._words
        words >>= 11
        words &= (1 << 53) - 1
        # The half keeps zero, which has no logarithm, out; next to 1 it is rounded away.
        np.add(words, 0.5, out=self._uniform)
        radius, tangent = self._uniform
        radius *= 2.0**-53
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        # One tangent of half the angle in place of a sine and a cosine, which take six times as
        # long: cos a = 2 / (1 + t^2) - 1, sin a = 2 t / (1 + t^2).
        tangent *= np.pi * 2.0**-53
        np.tan(tangent, out=tangent)
        square = np.multiply(tangent, tangent, out=self._square)
        square += 1
        np.divide(2, square, out=square)
        tangent *= square
        square -= 1
        pairs = len(radius)
        # Into float64 and float32 alike: computed in float64, then rounded.
        np.multiply(radius, square, out=out[:pairs], casting="same_kind")
        rest = len(out) - pairs
        np.multiply(radius[:rest], tangent[:rest], out=out[pairs:], casting="same_kind")

    def wipe(self) -> None:
        """Overwrite what seeds left."""
        for used in (self._stream, self._uniform, self._square):
            used.fill(0)


def to_rows(seeds: Array) -> npt.NDArray[np.int8]:
    """Seeds (rows, 32) uint8 as they travel: the same bytes, contiguous, as int8.

    Raises:
        WireError: another shape or type, or no rows.
    """
    _check(seeds)
    return np.ascontiguousarray(seeds).view(np.int8)


def from_rows(rows: Array) -> list[bytes]:
    """The seeds of rows (rows, 32) as they came, int8, or as the device has them, uint8.

    Raises:
        WireError: another shape or type, or no rows.
    """
    _check(rows)
    return [row.tobytes() for row in rows]


def _check(seeds: Array) -> None:
    if seeds.ndim != 2 or seeds.shape[1] != SEED_BYTES or seeds.itemsize != 1 or not len(seeds):
        raise WireError(
            f"seeds have shape {seeds.shape} of {seeds.dtype}, expected (rows, {SEED_BYTES}) bytes,"
            " not empty"
        )
