"""What an attacker without the observation reaches, scored like an attack, on the same groups.

pictures     the best of three guesses from public data: the mean picture for every member; K
             cluster centres of public pictures (an average each, so that the matching finds one
             that fits); K unrelated public pictures
gallery      K different items at random: K of g are right on average, of each K
classes      the K classes that are right most often under the public shares of the classes
linkage      AUC 0.5
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge.audit.observation import Public, pictures

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_PICTURES = 2000
_STEPS = 12


def public_pictures(public: Public, seed: int = 0) -> Floats:
    """Some of the public pictures, (n, C, H, W), at most 2,000."""
    rng = np.random.default_rng([seed, 2])
    chosen = np.sort(rng.permutation(len(public.training))[:_PICTURES])
    return pictures(public.manifest.preprocessing, public.training.inputs[chosen])


def picture_guesses(public: Public, seed: int = 0) -> dict[str, Floats]:
    """The guesses by name, (K, C, H, W) each, one for all groups."""
    shown, size = public_pictures(public, seed), public.manifest.group_size
    rng = np.random.default_rng([seed, 3])
    mean = shown.mean(axis=0)
    return {
        "mean picture": np.broadcast_to(mean, (size, *mean.shape)),
        "cluster centres": centres(shown, size, rng),
        "unrelated pictures": shown[rng.permutation(len(shown))[np.arange(size) % len(shown)]],
    }


def centres(shown: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Cluster centres by Lloyd's algorithm (IEEE Trans. Inf. Theory 28, 1982), (count, C, H, W)."""
    flat = shown.reshape(len(shown), -1)
    found = flat[rng.permutation(len(flat))[np.arange(count) % len(flat)]].copy()
    for _ in range(_STEPS):
        distance = (found**2).sum(axis=1) - 2 * flat @ found.T
        nearest = distance.argmin(axis=1)
        for index in range(count):
            if (members := nearest == index).any():
                found[index] = flat[members].mean(axis=0)
    return found.reshape(count, *shown.shape[1:])


def class_guess(shares: Array, size: int) -> npt.NDArray[np.int64]:
    """The classes to guess for ``size`` unordered members: right most often on average.

    The m-th guess of a class is right when at least m members have it, so each further guess of it
    is worth less, and taking the most valuable one each time is the best.

    Args:
        shares: (classes,) of the public data, sum 1.
        size: K.

    Returns:
        (size,) classes.
    """
    value = np.stack([_at_least(share, size) for share in shares])
    order = np.argsort(-value, axis=None, kind="stable")[:size]
    classes: npt.NDArray[np.int64] = order // size
    return classes


def _at_least(share: float, size: int) -> Array:
    """(size,) how likely at least 1, 2, ... of ``size`` members have a class of this share."""
    exactly = np.zeros(size + 1)
    exactly[0] = 1.0
    for _ in range(size):
        exactly[1:] = exactly[1:] * (1 - share) + exactly[:-1] * share
        exactly[0] *= 1 - share
    tail: Array = exactly[::-1].cumsum()[::-1][1:]
    return tail
