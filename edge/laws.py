"""Laws of the mixing matrix A, for training and for experiments: pure functions of a generator.

Each gives matrices (groups, K, K) and their inverses. A device draws Haar matrices from the
operating system's entropy instead (:mod:`edge.mixing`); the other laws are here to be compared.
No law makes the mixing secret (docs/privacy.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Law = Literal["haar", "gaussian", "dirichlet", "diagonal-dominant"]
LAWS: tuple[Law, ...] = get_args(Law)

Matrices = npt.NDArray[Any]
Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def draw(
    law: Law, rng: np.random.Generator, groups: int, group_size: int, *, strength: float = 1.0
) -> Pair:
    """Draw a matrix per group, and its inverse.

    Args:
        law: ``haar``: uniform over the orthogonal matrices. ``gaussian``: independent standard
            normals, drawn anew while the condition is too bad (:func:`condition_limit`).
            ``dirichlet``: each row uniform over the simplex, drawn anew likewise.
            ``diagonal-dominant``: ones on the diagonal, the rest of a row half as heavy.
        rng: moved on.
        groups: how many.
        group_size: K.
        strength: 0 to 1, of a curriculum: 0 gives identities, 1 the law, and between them A comes
            from ``(1 - strength) I + strength A``, made orthogonal again for ``haar``.

    Returns:
        (groups, K, K) float32 matrices and their inverses, inverted in float64.

    Raises:
        ConfigError: an unknown law, or a strength outside 0..1.
    """
    if law not in _SAMPLERS:
        raise ConfigError(f"law is {law!r}, expected one of {', '.join(LAWS)}")
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength}, expected 0 to 1")

    def blended(count: int) -> Matrices:
        drawn = _SAMPLERS[law](rng, count, group_size)
        blend: Matrices = (1 - strength) * np.eye(group_size) + strength * drawn
        return blend

    if law == "haar":
        matrices = _orthogonal(blended(groups))
        inverses = np.swapaxes(matrices, 1, 2)
    else:
        matrices = _well_conditioned(blended, groups, condition_limit(law, group_size))
        inverses = np.linalg.inv(matrices)
    return matrices.astype(np.float32), np.ascontiguousarray(inverses, np.float32)


def condition_limit(law: Law, group_size: int) -> float:
    """The largest condition number (2-norm) that ``law`` lets pass.

    20, but more where nearly every matrix of the law is worse: the condition of K by K Gaussian
    matrices grows like K (Edelman, SIAM J. Matrix Anal. Appl. 9, 1988) and that of matrices
    with Dirichlet rows, whose common mean is one large singular value, like K^1.5.
    """
    match law:
        case "haar":
            return 1.0
        case "gaussian":
            return max(20.0, 1.25 * group_size)
        case _:
            return max(20.0, group_size * math.sqrt(group_size))


def _normal(rng: np.random.Generator, groups: int, k: int) -> Matrices:
    return rng.standard_normal((groups, k, k))


def _scaled_normal(rng: np.random.Generator, groups: int, k: int) -> Matrices:
    """As heavy as an orthogonal matrix, so that a blend with the identity is half of each."""
    scaled: Matrices = _normal(rng, groups, k) / math.sqrt(k)
    return scaled


def _dirichlet(rng: np.random.Generator, groups: int, k: int) -> Matrices:
    return rng.dirichlet(np.ones(k), (groups, k))


def _diagonal_dominant(rng: np.random.Generator, groups: int, k: int) -> Matrices:
    others = rng.uniform(-1, 1, (groups, k, k))
    others[:, np.arange(k), np.arange(k)] = 0
    heavy = np.abs(others).sum(axis=2, keepdims=True)
    dominated: Matrices = np.eye(k) + 0.5 * others / np.maximum(heavy, 1e-12)
    return dominated


_SAMPLERS: dict[Law, Callable[[np.random.Generator, int, int], Matrices]] = {
    "haar": _scaled_normal,
    "gaussian": _normal,
    "dirichlet": _dirichlet,
    "diagonal-dominant": _diagonal_dominant,
}


def _orthogonal(matrices: Matrices) -> Matrices:
    """The orthogonal factor of each, signs fixed so that Gaussian matrices give the Haar law.

    Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the
    AMS 54, 2007.
    """
    q, r = np.linalg.qr(matrices)
    signs = np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1.0, 1.0)
    fixed: Matrices = q * signs[:, None, :]
    return fixed


def _well_conditioned(sample: Callable[[int], Matrices], groups: int, limit: float) -> Matrices:
    """Draw ``groups`` matrices, those whose condition is ``limit`` or worse again and again."""
    matrices = sample(groups)
    while True:
        singular = np.linalg.svd(matrices, compute_uv=False)
        (bad,) = np.nonzero(~(singular[:, 0] < limit * singular[:, -1]))
        if not len(bad):
            return matrices
        matrices[bad] = sample(len(bad))
