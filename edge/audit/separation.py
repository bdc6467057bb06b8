"""Blind source separation of one group's mixtures: independent component analysis of gradients.

Differences between neighbours make images and feature maps sparse, which is what independent
component analysis feeds on; a pixel-domain one flatters the defence (docs/privacy.md). Whitening
removes all of A but a rotation, whatever law A has, and symmetric FastICA finds the rotation
(Hyvärinen, "Fast and robust fixed-point algorithms for independent component analysis", IEEE
Transactions on Neural Networks 10, 1999).

Inputs of one kind have much in common, so their features are not independent, and that is what
FastICA loses accuracy to. The operator has public data: :func:`discount` shrinks what these have in
common, in the mixtures as well, since that is a linear map along the other axis than A's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_REST = 0.1  # power of what public data do not cover, as a share of the mean of what they do
_FLOOR = 1e-9  # of the largest eigenvalue: below it there is rounding and no source


@dataclass(frozen=True, slots=True, eq=False)
class Background:
    """What public features have in common: principal parts, mean included.

    Attributes:
        basis: (r, d) orthonormal directions.
        power: (r,) mean square of public features along each.
    """

    basis: Doubles
    power: Doubles


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """Sources up to order and sign.

    Attributes:
        unmixing: (sources, mixtures), rows of unit length, so that ``unmixing @ mixtures`` has the
            scale of the sources where A is orthogonal.
        sources: (sources, C, H, W) float32.
        contrast: how far from Gaussian the sources' gradients are; higher is better separated.
    """

    unmixing: Doubles
    sources: Floats
    contrast: float


def gradients(maps: Array) -> Doubles:
    """Differences along H and along W of each channel: (n, C, H, W) to (n, values) float64.

    Raises:
        ConfigError: ``maps`` has not four axes, or no two neighbours.
    """
    if maps.ndim != 4 or max(maps.shape[2:]) < 2:
        raise ConfigError(f"maps have shape {maps.shape}, expected (n, C, H, W) with neighbours")
    exact = maps.astype(np.float64)
    down, right = np.diff(exact, axis=2), np.diff(exact, axis=3)
    return np.concatenate([down.reshape(len(maps), -1), right.reshape(len(maps), -1)], axis=1)


def separate(
    mixtures: Array,
    rng: np.random.Generator,
    *,
    background: Background | None = None,
    sigma: float = 0.0,
    restarts: int = 4,
    iterations: int = 200,
) -> Separation:
    """Separate the mixtures of one group.

    Args:
        mixtures: (n, C, H, W); n is at least the number of sources.
        rng: starts of the search.
        restarts: how many of them; the one with the highest contrast counts.
        background: of public features of this shape; without it gradients have to do alone.
        sigma: deviation of noise that was added to the mixtures.
        iterations: at most so many in each.

    Raises:
        ConfigError: a wrong shape, or mixtures that hold nothing.
    """
    rows = mixtures.reshape(len(mixtures), -1).astype(np.float64)
    seen = rows if background is None else discount(rows, background, sigma=sigma)
    signals = gradients(seen.reshape(mixtures.shape))
    signals /= np.sqrt(np.mean(signals**2)) or 1.0
    white, whitening = whiten(signals)
    best, best_contrast = np.eye(len(white)), -np.inf
    for _ in range(restarts):
        rotation = fast_ica(white, rng, iterations=iterations)
        contrast = negentropy(rotation @ white)
        if contrast > best_contrast:
            best, best_contrast = rotation, contrast
    unmixing = _unit_rows(best @ whitening)
    sources = (unmixing @ rows).reshape(len(unmixing), *mixtures.shape[1:]).astype(np.float32)
    return Separation(unmixing, sources, best_contrast)


def background_of(rows: Array) -> Background:
    """Principal parts of public features (n, d), n below d: by the small Gram matrix.

    Raises:
        ConfigError: no rows, or all of them zero.
    """
    exact = rows.astype(np.float64)
    if exact.ndim != 2 or not exact.any():
        raise ConfigError(f"public features have shape {rows.shape}, expected (n, d), not zero")
    values, vectors = np.linalg.eigh(exact @ exact.T)
    kept = values > _FLOOR * values[-1]
    basis = (vectors[:, kept] / np.sqrt(values[kept])).T @ exact
    return Background(basis, values[kept] / len(exact))


def discount(rows: Array, background: Background, *, sigma: float = 0.0) -> Doubles:
    """Rows (n, d) with their common parts shrunk to what the others have: a regularised whitening.

    Args:
        rows: features, or mixtures of them.
        background: of public features.
        sigma: deviation of noise in the rows, which is not to be blown up.
    """
    rest = _REST * float(background.power.mean()) + sigma**2
    inside = rows @ background.basis.T
    shrink = np.sqrt(rest / (background.power + rest)) - 1
    whitened: Doubles = rows + (inside * shrink) @ background.basis
    return whitened


def whiten(signals: Doubles) -> tuple[Doubles, Doubles]:
    """Signals (n, values) to (r, values) with identity covariance, and the (r, n) that does it.

    r is the rank: directions with rounding errors only are left out.

    Raises:
        ConfigError: all signals are zero.
    """
    values, vectors = np.linalg.eigh(signals @ signals.T / signals.shape[1])
    kept = values > _FLOOR * max(values[-1], 0.0)
    if not kept.any() or values[-1] <= 0:
        raise ConfigError("mixtures are constant, expected something to separate")
    whitening = (vectors[:, kept] / np.sqrt(values[kept])).T
    return whitening @ signals, whitening


def fast_ica(white: Doubles, rng: np.random.Generator, *, iterations: int = 200) -> Doubles:
    """Symmetric FastICA with tanh: whitened signals (r, values) to a rotation (r, r).

    Stops where no row turns by more than 1e-5 any more.
    """
    rotation = nearest_orthogonal(rng.standard_normal((len(white), len(white))))
    for _ in range(iterations):
        bent = np.tanh(rotation @ white)
        slope = 1 - np.mean(bent**2, axis=1)
        turned = nearest_orthogonal(bent @ white.T / white.shape[1] - slope[:, None] * rotation)
        moved = np.abs(np.abs(np.einsum("ij,ij->i", turned, rotation)) - 1).max()
        rotation = turned
        if moved < 1e-5:
            break
    return rotation


def negentropy(sources: Doubles) -> float:
    """How far from Gaussian sources of unit variance are, as in Hyvärinen 1999, summed."""
    expected = 0.374567  # of log cosh of a standard normal
    return float(np.sum((np.mean(_log_cosh(sources), axis=1) - expected) ** 2))


def nearest_orthogonal(matrix: Doubles) -> Doubles:
    """The orthogonal matrix closest to a square one."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    found: Doubles = left @ right
    return found


def _log_cosh(values: Doubles) -> Doubles:
    size = np.abs(values)
    result: Doubles = size + np.log1p(np.exp(-2 * size)) - np.log(2)
    return result


def _unit_rows(matrix: Doubles) -> Doubles:
    scaled: Doubles = matrix / (np.linalg.norm(matrix, axis=1, keepdims=True) + 1e-300)
    return scaled
