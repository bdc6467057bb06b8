"""Linkage without separation: does a gallery item lie in the span of the mixtures?

K mixtures of K members span the same space as the members do, whatever A is. So the operator
projects the features of each item of a gallery on the row space of what it got; a member leaves no
residual, whatever its sign, scale or partners. Own attack, the strongest known on `mix`: nothing
is estimated, and more mixing or better coefficients do not help. In later rounds the gallery's
features follow from the public model, and the evidence adds up.

Against noise the features are whitened with the covariance of public ones first: what all inputs
have in common says nothing about who is a member.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import ALL_MODES, Budget, Claim
from edge.audit.features import Array, backgrounds, clipped, flat, noise_sigma, round_features
from edge.audit.observation import Observation, requests
from edge.audit.separation import Background, discount

_NOISELESS = 1e-4  # a member's share outside the span, squared, where only rounding is in the way


@dataclass(frozen=True, slots=True)
class Span:
    """Distance of gallery items from the row space of each group's mixtures.

    Attributes:
        background: public inputs whose principal directions are discounted against noise.
    """

    background: int = 500
    name: str = "span"
    title: str = "does a gallery item's feature lie in the row space of the mixtures"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public = observation.public
        groups = requests(observation)
        gallery = [flat(clipped(part)) for part in round_features(public, public.gallery)]
        common: tuple[Background, ...] = ()
        if observation.mode != "mix":
            common = backgrounds(observation, self.background, budget.rng())
        scores: list[Array] = []
        for group in groups:
            if scores and budget.expired():
                break
            total = np.zeros(len(public.gallery))
            for index, sent in enumerate(group.rounds):
                rows_sent, items = flat(sent), gallery[index]
                if common:
                    rows_sent, items = (
                        discount(x, common[index], sigma=noise_sigma(observation))
                        for x in (rows_sent, items)
                    )
                total -= np.log(residual(items, rows_sent) + _NOISELESS)
            scores.append(total)
        return Claim(
            gallery_scores=np.asarray(scores).reshape(-1, len(public.gallery)),
            notes=f"{len(scores)} of {len(groups)} groups",
        )


def residual(items: Array, rows: Array) -> Array:
    """Share of each item's squared length outside the span of the rows: (g, d), (K, d) to (g,)."""
    _, values, basis = np.linalg.svd(rows, full_matrices=False)
    basis = basis[values > 1e-6 * values[0]]
    inside = np.sum((items @ basis.T) ** 2, axis=1)
    share: Array = 1 - inside / (np.sum(items**2, axis=1) + 1e-12)
    return np.clip(share, 0, 1)


ATTACK = Span()
