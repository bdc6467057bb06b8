"""One joint separation of several groups' mixtures, their order lost.

A device that shuffles the rows of several groups before sending hides which rows belong together.
Mixing is block-diagonal then, and one independent component analysis of the pool does not need to
know the blocks: it finds all members at once. Within a capture the requests tell the groups anyway;
this attack throws that away, to show that shuffling would not help.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.features import clipped, noise_sigma, round_features
from edge.audit.observation import Observation, requests
from edge.audit.recovery import known, similarities
from edge.audit.separation import separate


@dataclass(frozen=True, slots=True)
class PoolIca:
    """Gallery items in a shuffled pool; every group of a pool is claimed the same.

    Attributes:
        pooled: groups in one pool.
        count: public inputs that teach separation.
    """

    pooled: int = 4
    count: int = 1000
    name: str = "pool-ica"
    title: str = "one joint separation over a shuffled pool of groups"
    modes: frozenset[str] = frozenset({"mix", "bounded"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public, rng = observation.public, budget.rng()
        groups = requests(observation)
        learnt = known(observation, budget, self.count)
        items = round_features(public, public.gallery, rounds=1)[0]
        flat_items = (items if observation.mode == "mix" else clipped(items)).reshape(
            len(items), -1
        )
        scores: list[np.ndarray] = []
        for start in range(0, len(groups), self.pooled):
            if budget.expired():
                break
            pool = groups[start : start + self.pooled]
            rows = np.concatenate([group.rounds[0] for group in pool])
            found = separate(
                rows[rng.permutation(len(rows))],
                rng,
                background=learnt.background,
                sigma=noise_sigma(observation),
                restarts=2,
            ).sources
            close = np.abs(similarities(found.reshape(1, len(found), -1), flat_items))[0]
            scores += [close.max(axis=0)] * len(pool)
        return Claim(
            gallery_scores=np.asarray(scores),
            notes=f"pools of {self.pooled} groups; a member of any group of the pool scores in all",
        )


ATTACK = PoolIca()
