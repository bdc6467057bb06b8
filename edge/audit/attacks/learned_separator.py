"""Attribute inference without separation: a network trained on public mixtures.

The classes of a group are a set, and the coefficients an unknown rotation, so the network gets what
neither order nor rotation changes: the Gram matrix ``Y^T Y``, here along the principal parts of
public features (invariants generate all that can be computed: Villar and others, "Scalars are
universal", NeurIPS 2021, for the orthogonal group). It answers with the shares of the classes in
the group, as DeepSets would (Zaheer and others, NeurIPS 2017). A network that gets the mixtures
themselves under random rotations has to learn this first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge.audit.attack import ALL_MODES, Budget, Claim
from edge.audit.features import Array, noise_sigma
from edge.audit.observation import Observation, requests
from edge.audit.recovery import known

if TYPE_CHECKING:
    from torch import nn

_BATCH = 128


@dataclass(frozen=True, slots=True)
class LearnedSeparator:
    """Classes of a group from its Gram matrix.

    Attributes:
        count: public inputs to learn from.
        parts: principal parts in the Gram matrix.
        steps: of training.
        width: of the network.
    """

    count: int = 4000
    parts: int = 32
    steps: int = 1000
    width: int = 256
    name: str = "learned-separator"
    title: str = "a network from a group's Gram matrix to the classes in it"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        import torch

        public, sigma = observation.public, noise_sigma(observation)
        if public.training.multilabel:
            return Claim(notes="labels are sets already")
        learnt = known(observation, budget, self.count)
        order = np.argsort(-learnt.background.power)[: self.parts]
        basis = learnt.background.basis[order]
        scale = 1 / np.sqrt(learnt.background.power[order] + sigma**2)
        parts = learnt.features.reshape(len(learnt.features), -1) @ basis.T
        labels = public.training.labels[learnt.rows].astype(np.int64)
        network = self._train(
            parts, labels, scale, sigma, public.manifest.group_size, observation, budget
        )
        sent = np.stack([group.rounds[0] for group in requests(observation)])
        seen = sent.reshape(*sent.shape[:2], -1) @ basis.T
        with torch.no_grad():
            shares = network(torch.from_numpy(grams(seen * scale))).softmax(dim=1).numpy()
        return Claim(
            attributes=np.stack([likely(row, sent.shape[1]) for row in shares]),
            notes=f"{len(sent)} groups; Gram matrix of {len(order)} principal parts",
        )

    def _train(
        self,
        parts: Array,
        labels: npt.NDArray[np.int64],
        scale: Array,
        sigma: float,
        size: int,
        observation: Observation,
        budget: Budget,
    ) -> nn.Module:
        """Random groups of public inputs, noise in the principal parts, shares of classes."""
        import torch
        from torch import nn

        rng = budget.rng()
        classes = len(observation.public.manifest.class_names)
        inputs = len(scale) * (len(scale) + 1) // 2
        with torch.random.fork_rng():
            torch.manual_seed(budget.seed)
            network = nn.Sequential(
                nn.Linear(inputs, self.width),
                nn.ReLU(),
                nn.Linear(self.width, self.width),
                nn.ReLU(),
                nn.Linear(self.width, classes),
            )
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
        for _ in range(self.steps):
            if budget.expired():
                break
            rows = rng.integers(len(parts), size=(_BATCH, size))
            group = parts[rows] + sigma * rng.standard_normal((_BATCH, size, len(scale)))
            shares = np.eye(classes, dtype=np.float32)[labels[rows]].mean(axis=1)
            said = network(torch.from_numpy(grams(group * scale))).log_softmax(dim=1)
            loss = -(torch.from_numpy(shares) * said).sum(dim=1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return network.eval()


def grams(groups: Array) -> npt.NDArray[np.float32]:
    """Upper triangles of ``Y^T Y`` of each group (n, K, r), signed roots: (n, r (r + 1) / 2)."""
    full = np.einsum("nkr,nks->nrs", groups, groups)
    upper = full[:, *np.triu_indices(full.shape[1])]
    roots: npt.NDArray[np.float32] = (np.sign(upper) * np.sqrt(np.abs(upper))).astype(np.float32)
    return roots


def likely(shares: Array, size: int) -> npt.NDArray[np.int64]:
    """The ``size`` classes that fit shares best: each takes the place that most is left of."""
    left, chosen = shares.astype(np.float64) * size, []
    for _ in range(size):
        chosen.append(int(left.argmax()))
        left[chosen[-1]] -= 1
    return np.asarray(chosen, np.int64)


ATTACK = LearnedSeparator()
