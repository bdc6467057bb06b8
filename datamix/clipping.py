"""The power constraint of the modes that add noise: members of mean square 1 at most."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def clip(features: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Divide each member by its root mean square, where that is more than 1.

    Args:
        features: (K, *shape) float32.

    Returns:
        (K, *shape) float32, and what each was divided by, (K,) float32, 1 or more.
    """
    flat = np.ascontiguousarray(features, np.float32).reshape(len(features), -1)
    power = np.einsum("ij,ij->i", flat, flat, dtype=np.float64) / flat.shape[1]
    # A hair more than the root, so that rounding to float32 does not bring it above 1.
    scale = np.maximum(1.0, np.sqrt(power) * (1 + 1e-6)).astype(np.float32)
    return (flat / scale[:, None]).reshape(features.shape), scale
