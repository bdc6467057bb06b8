"""The worst case of noise: features plus Gaussian noise, decoded by what was trained on just that.

The mode `split` gives operator A one row for each member, noise and no mixing, so the best estimate
of a picture is the one of its row: principal parts weighed by Wiener's filter, then a network, both
fitted to public features with the same noise. The variance of noise is public.

Of `bounded` it is the bound's own case, A known to the attacker. No observation holds A, so there
separation stands in for it (`gradient-ica` with the same decoder); benchmarks/attacks.py runs this
attack with A undone as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.decoder import train_decoder
from edge.audit.features import logits, noise_sigma
from edge.audit.observation import Observation, pictures, requests
from edge.audit.recovery import known, similarities


@dataclass(frozen=True, slots=True)
class NoisyDecoder:
    """Pictures of single rows.

    Attributes:
        count: public inputs to learn from.
        epochs: of the decoder.
    """

    count: int = 3000
    epochs: int = 5
    name: str = "noisy-decoder"
    title: str = "a decoder trained on features with the mode's noise, row by row"
    modes: frozenset[str] = frozenset({"split"})
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
            sigma=noise_sigma(observation),
            seconds=budget.left_s() * 0.8,
        )
        sent = np.stack([group.rounds[0] for group in requests(observation)])
        decoded = decoder(sent.reshape(-1, *sent.shape[2:]))
        decoded = decoded.reshape(*sent.shape[:2], *decoded.shape[1:])
        items = pictures(public.manifest.preprocessing, public.gallery)
        middle = items.mean(axis=0)
        estimated = decoder.estimate(sent.reshape(-1, *sent.shape[2:]))
        return Claim(
            inputs=decoded,
            gallery_scores=similarities(
                (decoded - middle).reshape(*sent.shape[:2], -1),
                (items - middle).reshape(len(items), -1),
            ),
            attributes=logits(public, estimated).argmax(axis=1).reshape(sent.shape[:2]),
            notes=f"{len(sent)} groups; {len(learnt.features)} public inputs",
        )


ATTACK = NoisyDecoder()
