"""Do two requests have an input in common? Nobody needs to know which.

`mix`, `bounded`: each group spans a space; one with a common member meets the other's at a small
principal angle (Björck and Golub, "Numerical methods for computing angles between linear
subspaces", Mathematics of Computation 27, 1973). `split`: the largest correlation between a row of
one and a row of the other. What all inputs have in common is discounted first, and the rounds add
up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import ALL_MODES, Budget, Claim
from edge.audit.features import Array, backgrounds, flat, noise_sigma
from edge.audit.observation import Observation, requests
from edge.audit.separation import discount


@dataclass(frozen=True, slots=True)
class Linkage:
    """Pairs of groups with a common input.

    Attributes:
        background: public inputs that tell what all have in common.
    """

    background: int = 500
    name: str = "linkage"
    title: str = "do two requests have an input in common"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        sigma = noise_sigma(observation)
        groups = requests(observation)
        shared = backgrounds(observation, self.background, budget.rng())
        total = np.zeros((len(groups), len(groups)))
        done = 0
        for index, common in enumerate(shared):
            if done and budget.expired():
                break
            sent = [flat(group.rounds[index]) for group in groups]
            seen = [discount(one, common, sigma=sigma) for one in sent]
            total += meetings(np.stack(seen), mixed=observation.mode != "split")
            done += 1
        return Claim(pairs=total, notes=f"{done} rounds")


def meetings(rows: Array, *, mixed: bool) -> Array:
    """How closely each two groups (groups, K, d) meet, (groups, groups).

    Mixed rows: the largest cosine of principal angles; others: of rows.
    """
    groups, size, width = rows.shape
    if mixed:
        basis = np.linalg.svd(rows, full_matrices=False)[2]
    else:
        basis = rows / (np.linalg.norm(rows, axis=2, keepdims=True) + 1e-12)
    flat = basis.reshape(-1, width)
    cosines = (flat @ flat.T).reshape(groups, size, groups, size).transpose(0, 2, 1, 3)
    if not mixed:
        found: Array = cosines.max(axis=(2, 3))
        return found
    best: Array = np.linalg.norm(cosines, ord=2, axis=(2, 3))
    return best


ATTACK = Linkage()
