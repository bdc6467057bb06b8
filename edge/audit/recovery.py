"""From one operator's messages to the members' features, as far as separation goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.audit.attack import Budget
from edge.audit.features import leaving, noise_sigma, round_features, some_public
from edge.audit.observation import Observation, requests
from edge.audit.separation import Background, background_of, separate

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_BINS = 64
_EDGE = 4.5  # deviations; a stem's features are clamped below that


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What public features of one round look like.

    Attributes:
        features: (n, C, H, W) float32.
        rows: (n,) where in the public data they come from.
        background: their principal parts.
        densities: (C, bins) logarithms of how frequent values are, from -4.5 to 4.5.
    """

    features: Floats
    rows: npt.NDArray[np.int64]
    background: Background
    densities: npt.NDArray[np.float64]

    def likelihood(self, maps: Array) -> npt.NDArray[np.float64]:
        """Mean log likelihood of each row (n, C, H, W) under the densities of the channels."""
        channel = np.arange(maps.shape[1])[:, None, None]
        found: npt.NDArray[np.float64] = self.densities[channel, _bins(maps)].mean(axis=(1, 2, 3))
        return found

    def upright(self, maps: Array) -> Floats:
        """Each row or its negative: which of the two is more like a feature."""
        turned = self.likelihood(-maps) > self.likelihood(maps)
        fixed: Floats = np.where(turned[:, None, None, None], -maps, maps).astype(np.float32)
        return fixed


def known(observation: Observation, budget: Budget, count: int, *, block: int = 0) -> Known:
    """Public features of a round, as they would leave in this mode but for what hides them."""
    public = observation.public
    rows = some_public(public, count, budget.rng())
    features = round_features(public, public.training.inputs[rows], rounds=block + 1)[block]
    features = np.asarray(leaving(observation, features), np.float32)
    counts = np.ones((features.shape[1], _BINS))
    for channel, bins in enumerate(_bins(features).transpose(1, 0, 2, 3)):
        counts[channel] += np.bincount(bins.ravel(), minlength=_BINS)
    densities = np.log(counts / counts.sum(axis=1, keepdims=True))
    background = background_of(features[:1000].reshape(len(features[:1000]), -1))
    return Known(features, rows, background, densities)


def separated(
    observation: Observation, budget: Budget, public_features: Known, *, spare_s: float = 0.0
) -> Floats:
    """Members' features of the first round, (groups, K, C, H, W), sign and scale put right.

    Groups for which no time is left but ``spare_s`` are missing.
    """
    rng, sigma = budget.rng(), noise_sigma(observation)
    found: list[Array] = []
    for group in requests(observation):
        if found and budget.left_s() <= spare_s:
            break
        sent = group.rounds[0]
        parts = separate(sent, rng, background=public_features.background, sigma=sigma).sources
        whole = np.zeros_like(sent)
        whole[: len(parts)] = public_features.upright(parts)
        found.append(whole)
    return np.asarray(found, np.float32)


def similarities(features: Array, gallery: Array) -> Floats:
    """Cosine of each member with each item: (groups, K, d) and (g, d) to (groups, K, g)."""
    members = features / (np.linalg.norm(features, axis=-1, keepdims=True) + 1e-12)
    items = gallery / (np.linalg.norm(gallery, axis=-1, keepdims=True) + 1e-12)
    scores: Floats = (members @ items.T).astype(np.float32)
    return scores


def _bins(maps: Array) -> npt.NDArray[np.int64]:
    place = (maps + _EDGE) * (_BINS / (2 * _EDGE))
    return np.clip(place, 0, _BINS - 1).astype(np.int64)
