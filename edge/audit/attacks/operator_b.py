"""What operator B can make of its seeds: 32 bytes for each row, drawn before there was an input.

By construction nothing. What could go wrong is tried: seeds that are a hash of the input, its
features or its place in the gallery, so that a candidate can be checked; seeds that come back;
noise that resembles features.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from datamix.noise import expand_rows
from edge.audit.attack import Budget, Claim
from edge.audit.features import Array, clipped, logits, round_features
from edge.audit.observation import Observation, count_groups, seeds

_CERTAIN = 1e6


@dataclass(frozen=True, slots=True)
class OperatorB:
    """Gallery, classes and repeats from seeds."""

    name: str = "operator-b"
    title: str = "seeds that depend on the data, repeat, or expand to something like features"
    modes: frozenset[str] = frozenset({"split"})
    operators: frozenset[str] = frozenset({"B"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        public = observation.public
        size, groups = public.manifest.group_size, count_groups(observation)
        rows = np.concatenate([item.seeds for item in seeds(observation) if item.block == 0])
        rows = np.ascontiguousarray(rows[: groups * size])
        features = round_features(public, public.gallery, rounds=1)[0]
        named = candidates(public.gallery, features)
        items = clipped(features).reshape(len(features), -1)
        shape = features.shape[1:]
        scores: list[Array] = []
        classes: list[Array] = []
        for start in range(0, len(rows), size):
            if scores and budget.expired():
                break
            noise = expand_rows(rows[start : start + size].view(np.int8), shape)
            near = noise.reshape(size, -1) @ items.T / np.linalg.norm(items, axis=1)
            for place, seed in enumerate(rows[start : start + size]):
                if (item := named.get(seed.tobytes())) is not None:
                    near[place, item] += _CERTAIN
            scores.append(near)
            classes.append(logits(public, noise).argmax(axis=1))
        found = np.asarray(scores)
        return Claim(
            gallery_scores=found,
            attributes=np.asarray(classes),
            pairs=repeats(rows.reshape(groups, size, -1)),
            notes=f"{len(rows) - len(np.unique(rows, axis=0))} seeds repeat;"
            f" {int((found > _CERTAIN / 2).sum())} are hashes of gallery items",
        )


def candidates(raw: Array, features: Array) -> dict[bytes, int]:
    """Seeds that a careless device might derive from each item, and the item."""
    found = {}
    for index, (one, maps) in enumerate(zip(raw, features, strict=True)):
        for body in (one.tobytes(), maps.tobytes(), str(index).encode()):
            found[hashlib.sha256(body).digest()] = index
    return found


def repeats(rows: Array) -> Array:
    """How many seeds each two groups (groups, K, 32) have in common."""
    bags = [Counter(seed.tobytes() for seed in group) for group in rows]
    return np.array([[(one & two).total() for two in bags] for one in bags], np.float32)


ATTACK = OperatorB()
