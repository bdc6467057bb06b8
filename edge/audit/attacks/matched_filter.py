"""The likelihood of each gallery item, row by row and round by round: the matched filter.

For a known signal in Gaussian noise nothing beats correlation with it (North 1943; Turin, "An
introduction to matched filters", IRE Transactions on Information Theory 6, 1960): the logarithm of
the likelihood ratio of row s for item u is ``(s.u - |u|^2 / 2) / sigma^2``. The gallery's features
of later rounds follow from the public model, and the rounds' noise is independent, so the evidence
is added up: a cross-round attack. Rows keep their places from round to round.

In `bounded` A hides which rows add up, but not the energy along an item: summed over the rows,
``|Y u|^2`` has what ``|U u|^2`` has, plus noise. What all inputs have in common is discounted
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.features import Array, backgrounds, clipped, flat, noise_sigma, round_features
from edge.audit.observation import Observation, requests
from edge.audit.separation import Background, discount


@dataclass(frozen=True, slots=True)
class MatchedFilter:
    """Evidence for each item of the gallery, all rounds together.

    Attributes:
        background: public inputs that tell what all have in common; for `bounded`.
    """

    background: int = 500
    name: str = "matched-filter"
    title: str = "correlate gallery features with each row, added up over the rounds"
    modes: frozenset[str] = frozenset({"split", "bounded"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public, sigma = observation.public, noise_sigma(observation)
        groups = requests(observation)
        items = [flat(clipped(part)) for part in round_features(public, public.gallery)]
        mixed = observation.mode == "bounded"
        common: tuple[Background, ...] = ()
        if mixed:
            common = backgrounds(observation, self.background, budget.rng())
            items = [discount(x, y, sigma=sigma) for x, y in zip(items, common, strict=True)]
        scores: list[Array] = []
        for group in groups:
            if scores and budget.expired():
                break
            total: Array = np.zeros(1)
            for index, sent in enumerate(group.rounds):
                if mixed:
                    rows_sent = discount(flat(sent), common[index], sigma=sigma)
                    total = total + energy(items[index], rows_sent)
                else:
                    total = total + evidence(items[index], flat(sent), sigma)
            scores.append(total)
        return Claim(
            gallery_scores=np.asarray(scores), notes=f"{len(scores)} of {len(groups)} groups"
        )


def evidence(items: Array, rows: Array, sigma: float) -> Array:
    """Log likelihood ratios (K, g) of items (g, d) against no signal, for rows (K, d)."""
    found: Array = (rows @ items.T - np.sum(items**2, axis=1) / 2) / max(sigma, 1e-3) ** 2
    return found


def energy(items: Array, rows: Array) -> Array:
    """Energy (g,) of rows (K, d) along each item (g, d), in deviations of what others have."""
    along = np.sum((items @ rows.T) ** 2, axis=1) / (np.sum(items**2, axis=1) + 1e-12)
    spread: Array = (along - np.median(along)) / (along.std() + 1e-12)
    return spread


ATTACK = MatchedFilter()
