"""How alike two pictures are: SSIM, mean squared error and PSNR, for all pairs at once.

SSIM is Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
structural similarity", IEEE TIP 13(4), 2004: a Gaussian window of 11 by 11 and deviation 1.5,
K1 = 0.01, K2 = 0.03, the mean over those places where the window lies within the picture, and over
channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

WINDOW = 11
DEVIATION = 1.5
BEST_PSNR_DB = 60.0
"""What counts for a picture that is the same, or nearly: its logarithm has no end."""


def ssim_matrix(first: Array, second: Array, value_range: float) -> Doubles:
    """SSIM of every picture of ``first`` with every one of ``second``.

    Args:
        first: (n, C, H, W).
        second: (m, C, H, W).
        value_range: the highest value of a picture minus the lowest, L in the paper.

    Returns:
        (n, m), 1 for the same picture, -1 at the least.

    Raises:
        ConfigError: pictures of different shapes, or a range that is not positive.
    """
    a, b = _checked(first, second)
    if not value_range > 0:
        raise ConfigError(f"range of values is {value_range}, expected more than 0")
    low, high = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    rows, columns = _window(a.shape[2]), _window(a.shape[3])

    def blur(pictures: Doubles) -> Doubles:
        blurred: Doubles = rows @ pictures @ columns.T
        return blurred

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    found = np.empty((len(a), len(b)))
    for index in range(len(a)):
        means = mean_a[index] * mean_b
        covariance = blur(a[index] * b) - means
        likeness = (2 * means + low) * (2 * covariance + high)
        likeness /= (mean_a[index] ** 2 + mean_b**2 + low) * (var_a[index] + var_b + high)
        found[index] = likeness.reshape(len(b), -1).mean(axis=1)
    return found


def error_matrix(first: Array, second: Array) -> Doubles:
    """Mean squared error of every picture of ``first`` with every one of ``second``: (n, m).

    Raises:
        ConfigError: pictures of different shapes.
    """
    a, b = _checked(first, second)
    return np.stack([((row - b) ** 2).reshape(len(b), -1).mean(axis=1) for row in a])


def psnr(error: Array, value_range: float) -> Doubles:
    """Peak signal to noise ratio of mean squared errors, in dB, at most :data:`BEST_PSNR_DB`."""
    least = value_range**2 * 10 ** (-BEST_PSNR_DB / 10)
    found: Doubles = 10 * np.log10(value_range**2 / np.maximum(error, least))
    return found


def _checked(first: Array, second: Array) -> tuple[Doubles, Doubles]:
    if first.ndim != 4 or first.shape[1:] != second.shape[1:] or not first.size or not second.size:
        raise ConfigError(
            f"pictures have shapes {first.shape} and {second.shape}, expected (n, C, H, W) twice"
        )
    return first.astype(np.float64), second.astype(np.float64)


def _window(length: int) -> Doubles:
    """(places, length): each row is the window at one place; a smaller one for small pictures."""
    size = min(WINDOW, length)
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    weights /= weights.sum()
    places = length - size + 1
    found = np.zeros((places, length))
    for place in range(places):
        found[place, place : place + size] = weights
    return found
