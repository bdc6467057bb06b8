"""Secret coefficients, mixing and de-mixing (DataMix, ECCV 2020, section "mixing").

The device replaces a group of K feature tensors U by K mixtures Y = A U, sends the mixtures, and
applies the inverse of A to what comes back. Where the cloud's block f is linear this is exact:
A^-1 f(A U) = f(U).

A is Haar-distributed over the orthogonal matrices: its inverse is its transpose and de-mixing
amplifies nothing (condition 1). The law of A buys no secrecy, whatever it is (docs/privacy.md).
"""

from __future__ import annotations

import math
import os
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class Coefficients:
    """A secret (K, K) orthogonal matrix for one round of one group.

    Its values never show: not in a repr, not in a pickle, not in an exception. Only :func:`mix`
    and :func:`demix` read them.
    """

    __slots__ = ("_matrix",)

    def __init__(self, matrix: npt.NDArray[np.float32]) -> None:
        """Take ownership of an orthogonal (K, K) float32 matrix.

        Raises:
            ConfigError: the matrix is not square or not orthogonal (within 1e-4).
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ConfigError(f"coefficients have shape {matrix.shape}, expected (K, K)")
        # Not np.allclose, which takes longer than drawing the matrix. NaN fails it too.
        if not np.abs(matrix @ matrix.T - np.eye(len(matrix))).max(initial=0) < 1e-4:
            raise ConfigError("coefficients are not orthogonal, so de-mixing would amplify errors")
        self._matrix = matrix

    @property
    def group_size(self) -> int:
        """K, the number of inputs mixed together."""
        return len(self._matrix)

    def wipe(self) -> None:
        """Overwrite the values: nothing can be mixed or de-mixed afterwards."""
        wipe(self._matrix)
        self._matrix = self._matrix[:0, :0]

    def __repr__(self) -> str:
        """Say the size and nothing else."""
        return f"Coefficients(group_size={self.group_size}, values=secret)"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a pickle leaves the device."""
        raise TypeError("coefficients are secret and cannot be pickled or copied")


def gaussians(count: int) -> npt.NDArray[np.float64]:
    """Draw ``count`` standard normals from the operating system's entropy, by Box and Muller.

    Straight from ``os.urandom``: there is no generator whose state could be recovered.
    """
    pairs = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), np.uint64).reshape(2, pairs)
    uniform = ((bits >> np.uint64(11)) + np.float64(0.5)) * 2.0**-53  # in (0, 1), never 0
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def haar(group_size: int) -> Coefficients:
    """Draw coefficients from the Haar measure over the orthogonal (K, K) matrices.

    QR of a Gaussian matrix, signs fixed so that the law is uniform (Mezzadri, "How to generate
    random matrices from the classical compact groups", Notices of the AMS 54, 2007).

    Raises:
        ConfigError: ``group_size`` is below 1.
    """
    if group_size < 1:
        raise ConfigError(f"group_size is {group_size}, expected at least 1")
    gaussian = gaussians(group_size * group_size).reshape(group_size, group_size)
    orthogonal, triangle = np.linalg.qr(gaussian)
    orthogonal *= np.sign(np.diagonal(triangle))
    return Coefficients(orthogonal.astype(np.float32))


def decoys(count: int, shape: tuple[int, ...]) -> Floats:
    """Features that belong to no input, to fill up a group: ``(count, *shape)`` of unit variance.

    Standard normal noise from the operating system's entropy; the features of a stem have zero mean
    and unit variance too.
    """
    size = math.prod(shape)
    return gaussians(count * size).astype(np.float32).reshape(count, *shape)


def random_order(count: int) -> npt.NDArray[np.int64]:
    """A uniformly random permutation of ``range(count)``, from the operating system's entropy."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return np.argsort(words, kind="stable")  # two equal words: less than count^2 in 2^65


def wipe(values: Array) -> None:
    """Overwrite an array with zeros, where it is ours to write.

    What Python allows: copies that numpy, the allocator or the operating system made on the way are
    out of reach.
    """
    if values.flags.writeable:
        values.fill(0)


def mix(features: Array, coefficients: Coefficients) -> Floats:
    """Mix a group: row i of the result is ``sum_j A[i, j] * features[j]``.

    Args:
        features: (K, *shape), float32.
        coefficients: K by K. Inverse: :func:`demix`.

    Returns:
        (K, *shape) float32, contiguous.

    Raises:
        ConfigError: the group does not have K members.
    """
    return _apply(coefficients, features, inverse=False)


def demix(mixtures: Array, coefficients: Coefficients) -> Floats:
    """Undo :func:`mix`: row i of the result is ``sum_j A[j, i] * mixtures[j]``, as A^-1 = A^T.

    Args:
        mixtures: (K, *shape), float32: what the cloud answered for each mixture.
        coefficients: the ones that :func:`mix` used.

    Returns:
        (K, *shape) float32, contiguous.

    Raises:
        ConfigError: there are not K mixtures.
    """
    return _apply(coefficients, mixtures, inverse=True)


def _apply(coefficients: Coefficients, rows: Array, *, inverse: bool) -> Floats:
    if rows.ndim < 1 or len(rows) != coefficients.group_size:
        raise ConfigError(
            f"group has shape {rows.shape}, expected {coefficients.group_size} members"
        )
    flat = np.ascontiguousarray(rows, np.float32).reshape(len(rows), -1)
    # The matrix gets no local name: some handlers of crashes print the variables of each frame.
    product = (coefficients._matrix.T if inverse else coefficients._matrix) @ flat
    return np.ascontiguousarray(product).reshape(rows.shape)
