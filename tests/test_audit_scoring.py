from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamix.errors import ConfigError
from edge.audit.attack import Budget, Claim
from edge.audit.attacks.constant import ATTACK
from edge.audit.floor import centres, class_guess
from edge.audit.intervals import (
    Interval,
    auc,
    of_grouped_share,
    of_mean,
    of_pairs,
    of_share,
)
from edge.audit.matching import assign, common
from edge.audit.scoring import Scorer, verdict
from edge.audit.ssim import BEST_PSNR_DB, error_matrix, psnr, ssim_matrix
from edge.audit.truth import Truth
from tests.audited import Cheat, Setting, setting

RNG = np.random.default_rng(0)
PICTURES = hnp.arrays(np.float64, (2, 1, 12, 13), elements=st.floats(0, 1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(tmp_path_factory.mktemp("audit"))


# ------------------------------------------------------------------ likeness


@given(PICTURES)
def test_ssim_of_a_picture_with_itself_is_one(shown: np.ndarray) -> None:
    found = ssim_matrix(shown, shown, 1)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-9)
    assert found.max() <= 1 + 1e-9 and found.min() >= -1 - 1e-9


@given(PICTURES, PICTURES)
def test_ssim_is_symmetric(first: np.ndarray, second: np.ndarray) -> None:
    np.testing.assert_allclose(
        ssim_matrix(first, second, 1), ssim_matrix(second, first, 1).T, atol=1e-9
    )


def test_ssim_by_hand() -> None:
    """Flat pictures have no variance: what is left is the term of the means."""
    dark, light = np.full((1, 1, 11, 11), 0.2), np.full((1, 1, 11, 11), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    np.testing.assert_allclose(ssim_matrix(dark, light, 1), [[expected]], atol=1e-12)


def test_ssim_of_one_window_by_hand() -> None:
    a, b = RNG.random((2, 11, 11))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    ma, mb = (weights * a).sum(), (weights * b).sum()
    va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
    cov = (weights * (a - ma) * (b - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    expected /= (ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)
    found = ssim_matrix(a[None, None], b[None, None], 1)
    np.testing.assert_allclose(found, [[expected]], atol=1e-9)


def test_ssim_of_the_opposite_is_negative_and_the_range_counts() -> None:
    a = RNG.random((1, 3, 16, 16))
    assert ssim_matrix(a, 1 - a, 1)[0, 0] < -0.3
    np.testing.assert_allclose(
        ssim_matrix(a, a**2, 1), ssim_matrix(255 * a, 255 * a**2, 255), atol=1e-9
    )


def test_errors_and_psnr_by_hand() -> None:
    zeros = np.zeros((1, 1, 2, 2))
    error = error_matrix(zeros, np.stack([zeros[0], zeros[0] + 0.1]))
    np.testing.assert_allclose(error, [[0, 0.01]], atol=1e-12)
    np.testing.assert_allclose(psnr(error, 1), [[BEST_PSNR_DB, 20]], atol=1e-9)
    np.testing.assert_allclose(psnr(np.array([0.01]), 2), [10 * math.log10(400)], atol=1e-9)


def test_pictures_of_two_shapes_are_refused() -> None:
    with pytest.raises(ConfigError):
        ssim_matrix(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 5)), 1)
    with pytest.raises(ConfigError):
        ssim_matrix(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 4)), 0)


# ------------------------------------------------------------------ matching


@given(
    st.integers(1, 5).flatmap(
        lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-3, 3) | st.just(1.0))
    )
)
@settings(max_examples=200)
def test_matching_is_the_best_of_all(gain: np.ndarray) -> None:
    n = len(gain)
    found = assign(gain)
    assert sorted(found) == list(range(n))
    best = max(sum(gain[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert gain[np.arange(n), found].sum() == pytest.approx(best, abs=1e-9)


def test_matching_undoes_a_permutation() -> None:
    order = RNG.permutation(32)
    assert (assign(np.eye(32)[order]) == order).all()


@pytest.mark.parametrize("gain", [np.zeros((2, 3)), np.zeros((0, 0)), np.full((2, 2), np.nan)])
def test_matching_refuses(gain: np.ndarray) -> None:
    with pytest.raises(ConfigError):
        assign(gain)


def test_members_in_common() -> None:
    assert common(np.array([1, 1, 2]), np.array([1, 3, 1])) == 2
    assert common(np.array([1, 1, 2]), np.array([1, 2, 2])) == 2
    assert common(np.array([1]), np.array([2])) == 0


# ------------------------------------------------------------------ intervals


def test_wilson_by_hand() -> None:
    found = of_share(0.5, 100)
    assert (found.low, found.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert of_share(0, 10).low == 0 and of_share(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert of_share(1, 10).high == 1


def test_a_bootstrap_covers_the_mean_nearly_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = (rng.random(40) for _ in range(100))
    inside = sum(found.low <= 0.5 <= found.high for found in map(of_mean, draws))
    assert 88 <= inside <= 100


def test_intervals_hold_their_value_and_are_the_same_again() -> None:
    for figures in (np.zeros(3), RNG.random(9), np.ones(1)):
        found = of_mean(figures)
        assert found.low <= found.value <= found.high
        assert found == of_mean(figures)
    with pytest.raises(ConfigError):
        of_mean(np.zeros(0))


def test_groups_that_are_alike_make_no_certainty() -> None:
    found = of_grouped_share(np.full(5, 4.0), 4)
    assert found.value == 1 and found.low == pytest.approx(of_share(1, 20).low)
    apart = of_grouped_share(np.array([0.0, 4.0] * 10), 4)
    assert apart.high - apart.low > of_share(0.5, 80).high - of_share(0.5, 80).low


def test_auc_by_hand() -> None:
    scores, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auc(scores, positive) == pytest.approx(0.75)
    assert auc(np.zeros(4), positive) == 0.5
    with pytest.raises(ConfigError):
        auc(scores, np.ones(4, bool))


def test_pairs_that_are_told_apart() -> None:
    linked = np.zeros((12, 12), bool)
    linked[:6, :6] = linked[6:, 6:] = True
    found = of_pairs(linked.astype(float), linked)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    noise = of_pairs(np.random.default_rng(0).random((12, 12)), linked)
    assert noise.low < 0.5 < noise.high


# ------------------------------------------------------------------ floors


def test_the_best_classes_to_guess() -> None:
    assert list(class_guess(np.array([0.98, 0.01, 0.01]), 3)) == [0, 0, 0]
    assert sorted(class_guess(np.full(4, 0.25), 4)) == [0, 1, 2, 3]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(1, 3))
def test_no_other_guess_of_classes_is_better(weights: list[int], size: int) -> None:
    shares = np.array(weights) / sum(weights)

    def worth(guess: tuple[int, ...]) -> float:
        return sum(
            math.prod(shares[list(members)]) * common(np.array(guess), np.array(members))
            for members in itertools.product(range(len(shares)), repeat=size)
        )

    best = max(map(worth, itertools.combinations_with_replacement(range(len(shares)), size)))
    assert worth(tuple(class_guess(shares, size))) == pytest.approx(best)


def test_centres_find_clusters() -> None:
    rng = np.random.default_rng(0)
    shown = np.concatenate([np.full((20, 1, 2, 2), v) for v in (0.1, 0.9)])
    shown += 0.01 * rng.random(shown.shape)
    found = np.sort(centres(shown.astype(np.float32), 2, np.random.default_rng(3)).mean((1, 2, 3)))
    np.testing.assert_allclose(found, [0.1, 0.9], atol=0.02)


# ------------------------------------------------------------------ claims


def truth_of(small: Setting, groups: int = 20) -> Truth:
    size = small.public.manifest.group_size
    return Truth(small.material.victims(groups, size, 0), small.material.digest(), 0)


def test_who_knows_wins_everything(small: Setting) -> None:
    truth = truth_of(small)
    view = small.view(small.record(groups=1)[0])
    claim = Cheat(lambda: truth).run(view, Budget(1))
    found = {score.metric: score for score in Scorer(small.public, truth.victims).score(claim)}
    assert found["ssim"].found.value == pytest.approx(1, abs=1e-9)
    assert found["psnr_db"].found.value == BEST_PSNR_DB
    assert found["reid_top1"].found.value == found["attribute"].found.value == 1
    assert found["linkage_auc"].found.value == 1
    assert {verdict(s.found, s.floor, math.inf) for s in found.values()} == {"leaks"}


def test_who_says_the_same_is_at_the_floor(small: Setting) -> None:
    capture, truth = small.record(groups=20)
    claim = ATTACK.run(small.view(capture), Budget(1))
    found = Scorer(small.public, truth.victims).score(claim)
    assert {score.metric for score in found} == {
        "ssim", "psnr_db", "reid_top1", "attribute", "linkage_auc",
    }  # fmt: skip
    assert {verdict(s.found, s.floor, math.inf) for s in found} == {"at the floor"}


def test_floors_by_hand(small: Setting) -> None:
    truth = truth_of(small)
    groups, size = truth.victims.shape
    scorer = Scorer(small.public, truth.victims)
    items = len(small.public.gallery)
    (reid,) = scorer.score(Claim(gallery_scores=np.zeros((groups, items))))
    assert reid.floor.value == size / items and reid.n == groups * size
    (linkage,) = scorer.score(Claim(pairs=np.zeros((groups, groups))))
    assert linkage.floor.value == linkage.found.value == 0.5


def test_the_first_items_of_a_group_count(small: Setting) -> None:
    truth = truth_of(small, 3)
    members = np.zeros((3, len(small.public.gallery)))
    np.put_along_axis(members, truth.victims, 1, axis=1)
    members[0, truth.victims[0, 0]] = -1  # one of four is missed
    (found,) = Scorer(small.public, truth.victims).score(Claim(gallery_scores=members))
    assert 11 / 12 <= found.found.value < 1


def test_saying_one_item_for_all_members_counts_once(small: Setting) -> None:
    truth = truth_of(small, 2)
    size, items = truth.victims.shape[1], len(small.public.gallery)
    scores = np.zeros((2, size, items))
    for group in range(2):
        scores[group, :, truth.victims[group, 0]] = 1
    (found,) = Scorer(small.public, truth.victims).score(Claim(gallery_scores=scores))
    assert found.found.value == 1 / size


def test_claims_for_the_first_groups_only_are_scored_on_these(small: Setting) -> None:
    truth = truth_of(small)
    claim = Claim(attributes=small.public.gallery_labels[truth.victims[:7]])
    (found,) = Scorer(small.public, truth.victims).score(claim)
    assert found.n == 28 and found.found.value == 1


@pytest.mark.parametrize(
    "claim",
    [
        lambda k, g, s: Claim(inputs=np.zeros((2, k, *s[:-1], s[-1] + 1))),
        lambda k, g, s: Claim(inputs=np.full((2, k, *s), np.nan)),
        lambda k, g, s: Claim(gallery_scores=np.zeros((2, g + 1))),
        lambda k, g, s: Claim(gallery_scores=np.zeros((2, k + 1, g))),
        lambda k, g, s: Claim(attributes=np.zeros((2, k + 1), int)),
        lambda k, g, s: Claim(attributes=np.zeros((0, k), int)),
        lambda k, g, s: Claim(pairs=np.zeros((2, 3))),
    ],
)
def test_claims_of_another_shape_are_refused(
    small: Setting, claim: Callable[[int, int, tuple[int, ...]], Claim]
) -> None:
    truth = truth_of(small)
    shape = small.public.manifest.preprocessing.input_shape
    made = claim(truth.victims.shape[1], len(small.public.gallery), shape)
    with pytest.raises(ConfigError):
        Scorer(small.public, truth.victims).score(made)


def test_victims_who_are_not_there_are_refused(small: Setting) -> None:
    for victims in (np.full((2, 4), 1000), np.zeros((2, 3), np.int64), np.zeros((0, 4), np.int64)):
        with pytest.raises(ConfigError):
            Scorer(small.public, victims)


@pytest.mark.parametrize(
    ("low", "bits", "expected"),
    [
        (0.5, math.inf, "leaks"),
        (0.5, 0.0, "leaks"),  # operator B is promised to learn nothing
        (0.5, 12.34, "bounded at 12.3 bits"),
        (0.3, math.inf, "at the floor"),  # the intervals touch
        (0.1, 12.34, "at the floor"),
    ],
)
def test_verdicts(low: float, bits: float, expected: str) -> None:
    assert verdict(Interval(0.6, low, 0.7), Interval(0.2, 0.1, 0.3), bits) == expected
