"""Attribute inference on what separation recovers: the public model itself names the class.

The operator holds blocks, bridges and head, so separated features need no classifier of the
attacker's own: the private answer of the inference is read off with the very model that serves it.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.audit.attack import Budget, Claim
from edge.audit.decoder import Wiener, beside
from edge.audit.features import logits, noise_sigma
from edge.audit.observation import Observation
from edge.audit.recovery import known, separated


@dataclass(frozen=True, slots=True)
class Attributes:
    """Classes of the members.

    Attributes:
        count: public inputs that teach separation.
    """

    count: int = 1500
    name: str = "attributes"
    title: str = "classify separated features with the public model"
    modes: frozenset[str] = frozenset({"mix", "bounded"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        learnt = known(observation, budget, self.count)
        found = separated(observation, budget, learnt)
        rows = found.reshape(-1, *found.shape[2:])
        sigma = noise_sigma(observation)
        if sigma > 0:
            others = learnt.features[1000:].reshape(-1, learnt.features[0].size)
            rows = Wiener(learnt.background, sigma, beside(learnt.background, others))(rows)
        named = logits(observation.public, rows).argmax(axis=1)
        return Claim(attributes=named.reshape(found.shape[:2]), notes=f"{len(found)} groups")


ATTACK = Attributes()
