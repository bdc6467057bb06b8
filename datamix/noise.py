"""Noise map 1: from a seed of 32 bytes to Gaussian noise, the same on the device and in the cloud.

In the mode split (docs/privacy.md) operator B gets a seed where the device has noise, which takes
32 bytes where the noise would take thousands. Both ends must then make the same noise:

    keystream   ChaCha20 (RFC 8439) under the seed as its key, counter and nonce all zero
    words       the keystream as little-endian unsigned integers of 64 bits; for n values
                p = ceil(n / 2) pairs: the first p words are w0, the next p words are w1
    uniforms    u = (floor(w / 2^11) + 1/2) / 2^53, strictly between 0 and 1
    values      Box and Muller: r = sqrt(-2 ln u0), a = 2 pi u1; first all r cos a, then all
                r sin a, of these the first n, in float64, as an array in C order

Both ends agree to a few units in the last place of float64, however their libraries compute a
logarithm. The cloud then computes in float32. A seed is a key: it is used once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

MAP = "1"
"""What ``datamix.noise`` says on the wire."""

SEED_BYTES = 32

Array = npt.NDArray[Any]


def gaussians(seed: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Expand a seed to standard normal values of ``shape``, float64.

    Raises:
        ConfigError: the seed does not have 32 bytes, or the shape has no values.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    if len(seed) != SEED_BYTES:
        raise ConfigError(f"seed has {len(seed)} bytes, expected {SEED_BYTES}")
    count = math.prod(shape)
    if min(shape, default=0) < 1:
        raise ConfigError(f"shape of noise is {shape}, expected positive sizes")
    pairs = (count + 1) // 2
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(stream.update(bytes(16 * pairs)), "<u8").reshape(2, pairs)
    uniform = ((words >> np.uint64(11)) + np.float64(0.5)) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return values[:count].reshape(shape)


def expand_rows(seeds: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A row of noise for each seed: (rows, 32) uint8 or int8 to (rows, *shape) float32.

    Raises:
        ConfigError: seeds of another shape or type.
    """
    if seeds.ndim != 2 or seeds.shape[1] != SEED_BYTES or seeds.itemsize != 1:
        raise ConfigError(
            f"seeds have shape {seeds.shape} of {seeds.dtype}, expected (rows, {SEED_BYTES}) bytes"
        )
    rows = np.empty((len(seeds), *shape), np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        row[...] = gaussians(seed.tobytes(), shape)
    return rows
