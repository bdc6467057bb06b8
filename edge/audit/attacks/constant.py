"""The floor as an attack: says the same whatever it sees. If it scores more, scoring is broken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import ALL_MODES, Budget, Claim
from edge.audit.observation import Observation, count_groups, pictures

_PICTURES = 2000


@dataclass(frozen=True, slots=True)
class Constant:
    """Claims the mean public picture, the commonest class, and no difference in the gallery."""

    name: str = "constant"
    title: str = "the mean public picture and the commonest class, whatever was sent"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A", "B"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public = observation.public
        groups, size = count_groups(observation), public.manifest.group_size
        chosen = budget.rng().permutation(len(public.training))[:_PICTURES]
        raw = public.training.inputs[np.sort(chosen)]
        mean = pictures(public.manifest.preprocessing, raw).mean(axis=0)
        commonest = 0
        if not public.training.multilabel:
            commonest = int(np.bincount(public.training.labels.astype(np.int64)).argmax())
        return Claim(
            inputs=np.broadcast_to(mean, (groups, size, *mean.shape)),
            gallery_scores=np.zeros((groups, len(public.gallery)), np.float32),
            attributes=np.full((groups, size), commonest),
            pairs=np.zeros((groups, groups), np.float32),
            notes="a control: it does not look at the messages",
        )


ATTACK = Constant()
