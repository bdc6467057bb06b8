"""Is ``share - u`` a value that the noise map can reach? Floating-point noise has holes.

Mironov, "On significance of the least significant bits for differential privacy" (CCS 2012), told
Laplacian noise of doubles apart from its neighbours by the values that it cannot take. The map of
`split` is public: values come in pairs ``r cos(a), r sin(a)``, halves of a row, with ``a / 2 pi``
and ``exp(-r^2 / 2)`` on a lattice as fine as the uniforms. For the right candidate both fall on the
lattice as far as the wire's rounding lets one see; for a wrong one their phases are spread evenly.

Works against 24-bit uniforms in float32 shares. Against noise map 1 (53 bits, then a grid of
2^-10, or float16) each step of the wire holds very many points of the lattice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.audit.attack import Budget, Claim
from edge.audit.features import Array, clipped, noise_sigma, round_features
from edge.audit.observation import Observation, requests


@dataclass(frozen=True, slots=True)
class NoiseLattice:
    """Candidates whose noise lies on a lattice.

    Attributes:
        bits: of the uniforms that are tried; finer ones than float32 can show are of no use.
    """

    bits: tuple[int, ...] = (16, 20, 23, 24)
    name: str = "noise-lattice"
    title: str = "is the rest, for a candidate, a value that floating-point noise can take"
    modes: frozenset[str] = frozenset({"split"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public, sigma = observation.public, noise_sigma(observation)
        items = clipped(round_features(public, public.gallery, rounds=1)[0])
        flat = items.reshape(len(items), -1).astype(np.float64)
        groups = requests(observation)
        scores: list[list[Array]] = []
        for group in groups:
            if scores and budget.expired():
                break
            rows = group.rounds[0].reshape(len(group.rounds[0]), -1).astype(np.float64)
            scores.append([on_lattice((row - flat) / sigma, self.bits) for row in rows])
        found: Array = np.asarray(scores)
        return Claim(
            gallery_scores=found,
            notes=f"{len(scores)} of {len(groups)} groups; largest deviation {found.max():.1f}",
        )


def on_lattice(noise: Array, bits: tuple[int, ...]) -> Array:
    """How strongly standard noise (n, values) lies on a lattice, in deviations: (n,), >= 0 mostly.

    The map's points are half a step off the multiples of ``2^-bits``.
    """
    pairs = noise.shape[1] // 2
    first = noise[:, :pairs]
    # Of an odd number the last sine was cut off; the second half begins at the middle, rounded up.
    second = noise[:, noise.shape[1] - pairs :]
    turns = np.arctan2(second, first) / (2 * np.pi)
    uniform = np.exp(-(first**2 + second**2) / 2)
    best = np.full(len(noise), -np.inf)
    for count in bits:
        steps = 2.0**count
        for place in (turns, uniform):
            phase = np.cos(2 * np.pi * (place * steps - 0.5))
            best = np.maximum(best, phase.sum(axis=1) / np.sqrt(pairs / 2))
    return best


ATTACK = NoiseLattice()
