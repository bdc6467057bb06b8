"""Was a mask used twice? Then the difference of two shares is the difference of two inputs.

The two-time pad (known since VENONA; Mason and others, "A natural language approach to automated
cryptanalysis of two-time pads", CCS 2006). Shares with masks of their own differ by noise of
``2 sigma^2`` and more; shares with one mask by features alone. Every two rows of a round are
compared, of all requests, and what is found is matched with the gallery.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.features import Array, clipped, noise_sigma, round_features
from edge.audit.observation import Observation, requests


@dataclass(frozen=True, slots=True)
class MaskReuse:
    """Pairs of rows under one mask, and whose they are.

    Attributes:
        rows: at most so many are compared with each other.
    """

    rows: int = 4000
    name: str = "mask-reuse"
    title: str = "do two rows carry the same noise, so that it cancels in their difference"
    modes: frozenset[str] = frozenset({"split"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public, sigma = observation.public, noise_sigma(observation)
        groups = requests(observation)
        size, items = public.manifest.group_size, len(public.gallery)
        groups = groups[: max(1, self.rows // size)]
        features = round_features(public, public.gallery)
        scores = np.zeros((len(groups) * size, items))
        pairs = 0
        for index, part in enumerate(features):
            known = clipped(part).reshape(items, -1).astype(np.float64)
            known -= known.mean(axis=0)
            sent = np.concatenate([group.rounds[index] for group in groups])
            rows = sent.reshape(len(sent), -1).astype(np.float64)
            for first, second in reused(rows, sigma):
                pairs += 1
                along = (rows[first] - rows[second]) @ known.T / known.shape[1]
                half = np.sum(known**2, axis=1) / (2 * known.shape[1])
                scores[first] += along - half
                scores[second] -= along + half
        return Claim(
            gallery_scores=scores.reshape(len(groups), size, items),
            notes=f"{pairs} pairs of rows share a mask, of {len(groups)} groups",
        )


def reused(rows: Array, sigma: float) -> list[tuple[int, int]]:
    """Pairs of rows (n, d) that are closer than noise of their own would let them be.

    Independent noise puts ``2 sigma^2`` between two rows, in the mean square, give or take a few
    percent; features put 4 there at most. Half way between decides.
    """
    power = np.mean(rows**2, axis=1)
    apart = power[:, None] + power - 2 * (rows @ rows.T) / rows.shape[1]
    close = np.argwhere(np.triu(apart < sigma**2, 1))
    return [(int(first), int(second)) for first, second in close]


ATTACK = MaskReuse()
