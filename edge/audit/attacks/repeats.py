"""The same inputs sent again and again, under fresh noise each time: averaged, then attacked.

In `bounded` the bits of repeats add up, which is why a device has a ledger and a cache
(docs/ledger.md). Without them the average of n copies has noise of sigma / sqrt(n). Each copy has
coefficients of its own, so copies are turned onto each other first: the rotation between two of
them is the polar factor of their products (Schönemann, "A generalized solution of the orthogonal
Procrustes problem", Psychometrika 31, 1966). That is for pictures; evidence for items of a gallery
(`matched-filter`) needs no turning and is added up. Copies are taken to come one after the other,
of each group as many; how many is seen by which items requests speak for. Own combination.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from datamix import wire
from datamix.bundle import BoundedSpec
from edge.audit.attack import Attack, Budget, Claim
from edge.audit.attacks.gradient_ica import GradientIca
from edge.audit.attacks.matched_filter import energy
from edge.audit.features import Array, backgrounds, clipped, flat, noise_sigma, round_features
from edge.audit.observation import Group, Message, Observation, requests
from edge.audit.separation import discount, nearest_orthogonal

_PASSES = 3
_CLEAR = 5.0  # deviations of what pairs have in common, above which they are no chance


@dataclass(frozen=True, slots=True)
class Repeats:
    """Evidence for gallery items summed over copies; pictures from the average of the copies.

    Attributes:
        then: attack on the averages, for pictures and classes; None for neither.
        background: public inputs that tell what all have in common.
    """

    then: Attack | None = GradientIca()  # frozen, so shared
    background: int = 500
    name: str = "repeats"
    title: str = "add up and average copies of the same group"
    modes: frozenset[str] = frozenset({"bounded"})
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        groups = requests(observation)
        scores = self._scores(observation, groups, budget.rng())
        copies = copies_of(scores)
        summed = scores.reshape(-1, copies, scores.shape[1]).sum(axis=1)
        claim = Claim()
        if self.then is not None:
            claim = self.then.run(averaged(observation, groups, copies), budget)

        def for_each(part: Array | None) -> Array | None:
            return None if part is None else np.repeat(part, copies, axis=0)

        return replace(
            claim,
            inputs=for_each(claim.inputs),
            gallery_scores=for_each(summed),
            attributes=for_each(claim.attributes),
            notes=f"{copies} copies of {len(groups) // copies} groups; {claim.notes}",
        )

    def _scores(
        self, observation: Observation, groups: Sequence[Group], rng: np.random.Generator
    ) -> Array:
        """Evidence for each item of the gallery in each request, (groups, g), all rounds."""
        public, sigma = observation.public, noise_sigma(observation)
        items = round_features(public, public.gallery)
        scores = np.zeros((len(groups), len(public.gallery)))
        for index, common in enumerate(backgrounds(observation, self.background, rng)):
            known = discount(flat(clipped(items[index])), common, sigma=sigma)
            for group, total in zip(groups, scores, strict=True):
                sent = discount(flat(group.rounds[index]), common, sigma=sigma)
                total += energy(known, sent)
        return scores


def copies_of(scores: Array) -> int:
    """How often each group was sent, by whether requests speak for the same items (groups, g).

    Requests that speak alike by chance are as often neighbours as not.
    """
    groups = len(scores)
    first, second = np.triu_indices(groups, 1)
    alike = np.corrcoef(scores)[first, second] if groups > 1 else np.zeros(0)
    if not len(alike) or not alike.std():
        return 1
    alike = alike - alike.mean()
    best, copies = _CLEAR * alike.std(), 1
    for count in (n for n in range(2, groups) if groups % n == 0):
        within = alike[first // count == second // count]
        total = float(within.sum() / math.sqrt(len(within)))
        if total > best:
            best, copies = total, count
    return copies


def averaged(observation: Observation, groups: Sequence[Group], copies: int) -> Observation:
    """An observation of one request for each so many copies, whose manifest says the noise left."""
    public = observation.public
    messages: list[Message] = []
    for begin in range(0, len(groups), copies):
        for block in range(len(public.manifest.blocks)):
            messages += _messages(public.manifest.name, block, groups[begin : begin + copies])
    sigma = noise_sigma(observation) / math.sqrt(copies)
    manifest = public.manifest.model_copy(update={"bounded": BoundedSpec(sigma=sigma)})
    return replace(observation, messages=tuple(messages), public=replace(public, manifest=manifest))


def _messages(model: str, block: int, copies: Sequence[Group]) -> tuple[Message, Message]:
    first = copies[0]
    sent = np.stack([flat(copy.rounds[block]) for copy in copies])
    turns = turned(sent)
    answers = np.stack([flat(copy.answers[block]) for copy in copies])
    shapes = first.rounds[block].shape, first.answers[block].shape
    up, down = (
        np.mean(turns @ values, axis=0).astype(np.float32).reshape(shape)
        for values, shape in zip((sent, answers), shapes, strict=True)
    )
    request_id, at_s = first.request_ids[block], first.at_s[block]
    request = wire.encode_request(up, request_id=request_id, dtype="float32", block=block)
    response = wire.encode_response(
        down,
        dtype="float32",
        request_id=request_id,
        model=model,
        model_version="1",
        block=block,
        queue_s=0.0,
        compute_s=0.0,
        batch_rows=len(up),
        close_reason="full",
    )
    return Message("A", "up", at_s, request), Message("A", "down", at_s, response)


def turned(copies: Array) -> Array:
    """Rotations (n, K, K) that turn copies (n, K, d) of the same rows onto the first one."""
    target = copies[0]
    turns: Array = np.stack([np.eye(copies.shape[1])] * len(copies))
    for _ in range(_PASSES):
        turns = np.stack([nearest_orthogonal(target @ copy.T) for copy in copies])
        target = np.mean(turns @ copies, axis=0)
    return turns


ATTACK = Repeats()
