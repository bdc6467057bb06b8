"""Separation in each round, matched across rounds: what one round leaves open the next one closes.

Fresh coefficients each round hide nothing from an operator who separates each round alone: the
block and the bridge are public, so a separated source of one round predicts its own features in the
next, for one of its two signs. The closest prediction matches sources, fixes the sign, and adds a
second look at the gallery.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.features import (
    Array,
    clipped,
    logits,
    next_features,
    noise_sigma,
    round_features,
)
from edge.audit.observation import Observation, requests
from edge.audit.recovery import known, similarities
from edge.audit.separation import separate


@dataclass(frozen=True, slots=True)
class CrossRound:
    """Gallery and classes from the separations of the first two rounds.

    Attributes:
        count: public inputs that teach separation.
    """

    count: int = 1000
    name: str = "cross-round"
    title: str = "separate each round, match the rounds through the public blocks"
    modes: frozenset[str] = frozenset({"mix", "bounded"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public, sigma, rng = observation.public, noise_sigma(observation), budget.rng()
        if len(public.manifest.blocks) < 2:
            return Claim(notes="one round: nothing to match")
        groups = requests(observation)
        learnt = [known(observation, budget, self.count, block=block) for block in (0, 1)]
        items = round_features(public, public.gallery, rounds=2)
        if observation.mode != "mix":
            items = tuple(clipped(part) for part in items)
        scores: list[Array] = []
        classes: list[Array] = []
        same = 0
        for group in groups:
            if scores and budget.expired():
                break
            first, second = (
                separate(sent, rng, background=part.background, sigma=sigma, restarts=2).sources
                for sent, part in zip(group.rounds, learnt, strict=False)
            )
            if len(first) < len(group.rounds[0]) or len(second) < len(group.rounds[1]):
                break  # a group that is short of rank: nothing to match one by one
            upright, partner = match(
                first,
                next_features(observation.public, 0, first),
                next_features(observation.public, 0, -first),
                second,
            )
            same += int(np.sum(np.sign(np.sum(upright * learnt[0].upright(first), (1, 2, 3))) > 0))
            near = [
                np.abs(similarities(_flat(part)[None], _flat(item))[0])
                for part, item in zip((upright, second[partner]), items, strict=True)
            ]
            scores.append(near[0] + near[1])
            classes.append(logits(public, upright).argmax(axis=1))
        return Claim(
            gallery_scores=np.asarray(scores) if scores else None,
            attributes=np.asarray(classes) if classes else None,
            notes=f"{len(scores)} groups; {same} signs as one round alone has them",
        )


def match(first: Array, plus: Array, minus: Array, second: Array) -> tuple[Array, Array]:
    """Sources of one round upright, and the source of the next that each became.

    Args:
        first: (K, C, H, W) sources of one round, signs unknown.
        plus: (K, ...) their features in the next round, if the sign is right.
        minus: (K, ...) the same if it is wrong.
        second: (K, ...) sources of the next round, signs unknown.

    Returns:
        (K, C, H, W), and (K,) indices into ``second``.
    """
    right, wrong = (
        np.abs(similarities(_flat(part)[None], _flat(second))[0]) for part in (plus, minus)
    )
    turned = wrong.max(axis=1) > right.max(axis=1)
    best = np.where(turned[:, None], wrong, right)
    upright: Array = np.where(turned[:, None, None, None], -first, first)
    return upright, best.argmax(axis=1)


def _flat(maps: Array) -> Array:
    return maps.reshape(len(maps), -1)


ATTACK = CrossRound()
