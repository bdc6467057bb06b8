"""One joint separation of several groups' mixtures, their order lost.

A device that shuffles the rows of several groups before sending hides which rows belong together.
Mixing is block-diagonal then, and one independent component analysis of the pool does not need to
know the blocks: it finds all members at once. Within a capture the requests tell the groups anyway;
this attack separates without that, to show that shuffling would not help, and looks at it again
only to say which source belongs to which group: the one whose rows it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge.audit.attack import Budget, Claim
from edge.audit.features import Array, clipped, noise_sigma, round_features
from edge.audit.observation import Observation, requests
from edge.audit.recovery import known, similarities
from edge.audit.separation import separate


@dataclass(frozen=True, slots=True)
class PoolIca:
    """Gallery items of a shuffled pool.

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
        scores: list[Array] = []
        for start in range(0, len(groups), self.pooled):
            if scores and budget.expired():
                break
            pool = groups[start : start + self.pooled]
            rows = np.concatenate([group.rounds[0] for group in pool])
            order = rng.permutation(len(rows))
            found = separate(
                rows[order],
                rng,
                background=learnt.background,
                sigma=noise_sigma(observation),
                restarts=2,
            )
            made_of = np.empty((len(found.sources), len(rows)))
            made_of[:, order] = found.unmixing**2
            close = np.abs(similarities(found.sources.reshape(1, len(made_of), -1), flat_items))[0]
            scores += [close[rows] for rows in owners(made_of, len(pool))]
        return Claim(
            gallery_scores=np.asarray(scores),
            notes=f"{len(scores)} groups, {self.pooled} in a pool",
        )


def owners(made_of: Array, groups: int) -> list[npt.NDArray[np.int64]]:
    """For each group the K sources that are made of its rows most.

    Args:
        made_of: (sources, groups * K) weight of each row in each source.
        groups: how many.
    """
    size = made_of.shape[1] // groups
    share = made_of.reshape(len(made_of), groups, size).sum(axis=2)
    share = share / (share.sum(axis=1, keepdims=True) + 1e-12)
    return [np.argsort(-share[:, group], kind="stable")[:size] for group in range(groups)]


ATTACK = PoolIca()
