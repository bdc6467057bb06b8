"""Separation of one group, then a trained decoder: the members' pictures.

Gradient-domain FastICA (:mod:`edge.audit.separation`) on the K mixtures of one group, sharpened by
what public features have in common; each source's sign is the one under which its values look
like features; the decoder (:mod:`edge.audit.decoder`) was trained with crumbs of other inputs, as
separation leaves them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.decoder import train_decoder
from edge.audit.features import clipped, noise_sigma, round_features
from edge.audit.observation import Observation, pictures
from edge.audit.recovery import known, separated, similarities


@dataclass(frozen=True, slots=True)
class GradientIca:
    """Pictures and gallery of one group's separated members.

    Attributes:
        count: public inputs to learn from.
        epochs: of the decoder.
        crumbs: amplitude of others in the decoder's training.
    """

    count: int = 3000
    epochs: int = 6
    crumbs: float = 0.1
    name: str = "gradient-ica"
    title: str = "separate the mixtures of one group by their gradients, then decode"
    modes: frozenset[str] = frozenset({"mix", "bounded"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public = observation.public
        learnt = known(observation, budget, self.count)
        shown = pictures(public.manifest.preprocessing, public.training.inputs[learnt.rows])
        decoder = train_decoder(
            learnt.features,
            shown,
            budget,
            epochs=self.epochs,
            crumbs=self.crumbs,
            sigma=noise_sigma(observation),
            seconds=budget.left_s() * 0.7,
        )
        budget.report("decoder trained")
        found = separated(observation, budget, learnt)
        decoded = decoder(found.reshape(-1, *found.shape[2:]))
        items = round_features(public, public.gallery, rounds=1)[0]
        if observation.mode != "mix":
            items = clipped(items)
        return Claim(
            inputs=decoded.reshape(*found.shape[:2], *decoded.shape[1:]),
            gallery_scores=np.abs(
                similarities(found.reshape(*found.shape[:2], -1), items.reshape(len(items), -1))
            ),
            notes=f"{len(found)} groups; {len(learnt.features)} public inputs",
        )


ATTACK = GradientIca()
