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
    # Here, as whoever reads a message needs none of it.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    if len(seed) != SEED_BYTES:
        raise ConfigError(f"seed has {len(seed)} bytes, expected {SEED_BYTES}")
    if min(shape, default=0) < 1:
        raise ConfigError(f"shape of noise is {shape}, expected positive sizes")
    count = math.prod(shape)
    pairs = (count + 1) // 2
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(stream.update(bytes(16 * pairs)), "<u8").reshape(2, pairs)
    # In place, since memory that is fresh costs as much as the arithmetic. The half keeps zero,
    # which has no logarithm, out; next to 1 it is rounded away.
    uniform = np.add(words >> np.uint64(11), 0.5)
    uniform *= 2.0**-53
    radius, angle = uniform
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle *= 2 * np.pi
    values = np.empty((2, pairs))
    np.cos(angle, out=values[0])
    np.sin(angle, out=values[1])
    values *= radius
    return values.reshape(-1)[:count].reshape(shape)


def expand_rows(rows: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A row of noise for each seed: (rows, 32) uint8 or int8 to (rows, *shape) float32.

    Raises:
        ConfigError: the shape has no values.
        WireError: seeds of another shape or type.
    """
    noise = np.empty((len(rows), *shape), np.float32)
    for row, seed in zip(noise, from_rows(rows), strict=True):
        row[...] = gaussians(seed, shape)
    return noise


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
