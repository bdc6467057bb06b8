"""Claims against the truth: figures with 95% intervals, each beside its floor, and a verdict.

What is claimed of a group's members is unordered, so an oracle matches it with the members, and
matches the floor's guess in the same way (:mod:`edge.audit.floor`). Everything errs towards the
attacker: the matching is the best there is, for each figure its own.

    ssim         mean over members, matched by SSIM                       bootstrap over groups
    psnr_db      mean over members, matched by squared error              bootstrap over groups
    reid_top1    share of members found among the K (or K first) items    Wilson, bootstrap
    attribute    share of members whose class is among the K claimed      Wilson, bootstrap
    linkage_auc  over pairs of groups, with or without a common input     bootstrap over groups

**Verdicts.** Where the figure's interval lies above the floor's interval, an attack "leaks"; with a
mode that bounds what can be learned it is "bounded at X bits" of one input, all rounds together:
it got something, and that is the most there is to get. Else it is "at the floor": this attack told
nothing that guessing does not, which is no proof that another would not. The word "secure" is none
of the verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.audit.attack import Claim
from edge.audit.floor import class_guess, picture_guesses
from edge.audit.intervals import (
    Interval,
    of_chance_auc,
    of_grouped_share,
    of_mean,
    of_pairs,
    of_share,
)
from edge.audit.matching import assign, common
from edge.audit.observation import Public, picture_range, pictures
from edge.audit.ssim import error_matrix, psnr, ssim_matrix

Array = npt.NDArray[Any]
Victims = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one attack.

    Attributes:
        metric: its name, as above.
        found: with its interval.
        floor: what an attacker without the observation reaches, with its interval.
        floor_is: how that was found.
        n: members, or pairs of groups, that it is of.
    """

    metric: str
    found: Interval
    floor: Interval
    floor_is: str
    n: int


def verdict(found: Interval, floor: Interval, bound_bits: float) -> str:
    """See the module's docstring; ``bound_bits`` is infinite where nothing is promised."""
    if found.low <= floor.high:
        return "at the floor"
    if 0 < bound_bits < math.inf:
        return f"bounded at {bound_bits:.3g} bits"
    return "leaks"


class Scorer:
    """Scores claims about one capture; floors are computed once."""

    def __init__(self, public: Public, victims: Victims, seed: int = 0) -> None:
        """Keep the truth.

        Args:
            public: whose gallery the victims are rows of.
            victims: (groups, K).
            seed: of bootstraps, guesses and ties.

        Raises:
            ConfigError: victims that are not in the gallery, or groups of another size than K.
        """
        size = public.manifest.group_size
        if victims.ndim != 2 or victims.shape[1] != size or not len(victims):
            raise ConfigError(f"victims have shape {victims.shape}, expected (groups, {size})")
        if victims.min() < 0 or victims.max() >= len(public.gallery):
            raise ConfigError(f"a victim is not one of the {len(public.gallery)} gallery items")
        self._public = public
        self._victims = victims
        self._seed = seed
        preprocessing = public.manifest.preprocessing
        self._shown = pictures(preprocessing, public.gallery)
        low, high = picture_range(preprocessing)
        self._low, self._high = low, high
        self._guesses = picture_guesses(public, seed)
        self._floors: dict[tuple[str, int], tuple[Interval, str]] = {}

    def score(self, claim: Claim) -> list[Score]:
        """All figures that the claim has something for.

        Raises:
            ConfigError: a claim of another shape, or with values that are not finite.
        """
        return list(self._scores(claim))

    def matched(self, claimed: Array, group: int) -> Array:
        """One group's claimed pictures in the order of its victims, (K, C, H, W)."""
        truth = self._shown[self._victims[group]]
        alike = ssim_matrix(self._cut(claimed), truth, self._high - self._low)
        rows = np.empty(len(truth), np.int64)
        rows[assign(alike)] = np.arange(len(truth))
        shown: Array = self._cut(claimed)[rows]
        return shown

    def originals(self, group: int) -> Array:
        """One group's true pictures, (K, C, H, W)."""
        shown: Array = self._shown[self._victims[group]]
        return shown

    def guess(self, groups: int) -> Array:
        """The floor's pictures for a group, (K, C, H, W): those with the best SSIM."""
        _, name = self._picture_floor("ssim", groups)
        return self._guesses[name]

    def _scores(self, claim: Claim) -> Iterator[Score]:
        size = self._victims.shape[1]
        if claim.inputs is not None:
            shown = self._checked("inputs", claim.inputs, (size, *self._shown.shape[1:]))
            for metric in ("ssim", "psnr_db"):
                by_group = self._likeness(metric, shown)
                floor, name = self._picture_floor(metric, len(shown))
                found = of_mean(by_group, self._seed)
                yield Score(metric, found, floor, name, len(shown) * size)
        if claim.gallery_scores is not None:
            yield self._reid(claim.gallery_scores)
        if claim.attributes is not None:
            yield self._attribute(claim.attributes)
        if claim.pairs is not None and (linkage := self._linkage(claim.pairs)) is not None:
            yield linkage

    def _checked(self, what: str, claimed: Array, shape: tuple[int, ...]) -> Array:
        """The claims for the groups that there is a truth for."""
        if claimed.shape[1:] != shape or not len(claimed):
            raise ConfigError(
                f"claimed {what} have shape {claimed.shape}, expected {('groups', *shape)}"
            )
        if not np.isfinite(claimed).all():
            raise ConfigError(f"claimed {what} hold NaN or Inf, expected finite values")
        return claimed[: len(self._victims)]

    def _cut(self, shown: Array) -> Array:
        return np.clip(shown, self._low, self._high)

    def _likeness(self, metric: str, claimed: Array) -> npt.NDArray[np.float64]:
        """(groups,) the mean over members, each matched."""
        return np.array(
            [
                self._group_likeness(metric, shown, self._shown[members])
                for shown, members in zip(claimed, self._victims, strict=False)
            ]
        )

    def _group_likeness(self, metric: str, claimed: Array, truth: Array) -> float:
        if metric == "ssim":
            gain = ssim_matrix(self._cut(claimed), truth, self._high - self._low)
            return float(gain[np.arange(len(gain)), assign(gain)].mean())
        error = error_matrix(self._cut(claimed), truth)
        best = error[np.arange(len(error)), assign(-error)]
        return float(psnr(best, self._high - self._low).mean())

    def _picture_floor(self, metric: str, groups: int) -> tuple[Interval, str]:
        groups = min(groups, len(self._victims))
        if (metric, groups) not in self._floors:
            found = {
                name: of_mean(
                    self._likeness(metric, np.broadcast_to(guess, (groups, *guess.shape))),
                    self._seed,
                )
                for name, guess in self._guesses.items()
            }
            best = max(found, key=lambda name: found[name].value)
            self._floors[metric, groups] = found[best], best
        return self._floors[metric, groups]

    def _reid(self, claimed: Array) -> Score:
        size, items = self._victims.shape[1], len(self._public.gallery)
        shape = (items,) if claimed.ndim == 2 else (size, items)
        scores = self._checked("gallery_scores", claimed, shape).astype(np.float64)
        rng = np.random.default_rng([self._seed, 4])
        hits = np.empty(len(scores))
        for group, row in enumerate(scores):
            # A random order, then a stable sort: ties fall at random, not by the file's order.
            order = rng.permutation(items)
            ranked = order[np.argsort(-row[..., order], axis=-1, kind="stable")]
            named = ranked[:size] if row.ndim == 1 else np.unique(ranked[:, 0])
            hits[group] = common(named, self._victims[group])
        count = len(scores) * size
        return Score(
            "reid_top1",
            of_grouped_share(hits, size, self._seed),
            of_share(min(1.0, size / items), count),
            f"{size} of {items} at random",
            count,
        )

    def _attribute(self, claimed: Array) -> Score:
        size = self._victims.shape[1]
        classes = self._checked("attributes", claimed, (size,))
        truth = self._public.gallery_labels[self._victims[: len(classes)]]
        labels = self._public.training.labels.astype(np.int64)
        shares = np.bincount(labels, minlength=len(self._public.manifest.class_names)) / len(labels)
        guess = class_guess(shares, size)
        found, floor = (
            of_grouped_share(
                np.array([common(a, b) for a, b in zip(said, truth, strict=True)], np.float64),
                size,
                self._seed,
            )
            for said in (classes, np.broadcast_to(guess, classes.shape))
        )
        return Score("attribute", found, floor, "best classes to guess", classes.size)

    def _linkage(self, claimed: Array) -> Score | None:
        if claimed.shape != (len(claimed), len(claimed)) or not np.isfinite(claimed).all():
            raise ConfigError(f"claimed pairs have shape {claimed.shape}, expected square, finite")
        scores = claimed[: len(self._victims), : len(self._victims)].astype(np.float64)
        victims = self._victims[: len(scores)]
        members = np.zeros((len(victims), len(self._public.gallery)), np.float32)
        np.put_along_axis(members, victims, 1, axis=1)
        linked = members @ members.T > 0
        above = linked[np.triu_indices(len(linked), 1)]
        ups, downs = int(above.sum()), int((~above).sum())
        if not ups or not downs:
            return None  # nothing to tell apart
        found = of_pairs(scores, linked, self._seed)
        return Score("linkage_auc", found, of_chance_auc(ups, downs), "chance", ups + downs)
