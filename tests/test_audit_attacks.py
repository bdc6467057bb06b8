"""Each attack in a weak setting, where it must succeed; some in one where they must not."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamix import wire
from datamix.bundle import BoundedSpec, SplitSpec
from edge.audit.attack import Budget
from edge.audit.attacks import suite
from edge.audit.attacks.attributes import Attributes
from edge.audit.attacks.cross_round import CrossRound
from edge.audit.attacks.gradient_ica import GradientIca
from edge.audit.attacks.learned_separator import LearnedSeparator, grams
from edge.audit.attacks.linkage import Linkage
from edge.audit.attacks.mask_reuse import MaskReuse
from edge.audit.attacks.matched_filter import MatchedFilter
from edge.audit.attacks.noise_lattice import NoiseLattice
from edge.audit.attacks.noisy_decoder import NoisyDecoder
from edge.audit.attacks.operator_b import OperatorB
from edge.audit.attacks.pool_ica import PoolIca
from edge.audit.attacks.repeats import Repeats, averaged
from edge.audit.attacks.span import Span
from edge.audit.attacks.timing_size import TimingSize
from edge.audit.features import clipped, round_features
from edge.audit.observation import Message, Observation, Public, pictures, requests
from tests.observed import found_ratio, haar, mixed, noisy, observe, public_of

K = 2
HIDDEN = 3000.0  # deviation of noise that hides everything


@pytest.fixture(scope="module")
def public() -> Public:
    torch.set_num_threads(1)
    return public_of(group_size=K)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def members(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(60)[:12].reshape(6, K)


def with_noise(public: Public, mode: str, sigma: float) -> Public:
    spec: dict[str, object] = {"bounded": BoundedSpec(sigma=sigma)}
    if mode == "split":
        spec = {"split": SplitSpec(sigma=sigma, wire_dtype="float32", tolerance=1.0)}
    return replace(public, manifest=public.manifest.model_copy(update=spec))


def split(
    public: Public, members: np.ndarray, sigma: float, rng: np.random.Generator
) -> Observation:
    known = with_noise(public, "split", sigma)
    return observe(known, members, noisy(rng, sigma), mode="split", dtype="float32")


def named(scores: np.ndarray | None, members: np.ndarray) -> float:
    """Share of members that are first of a row's scores (groups, K, g)."""
    assert scores is not None
    return float(
        np.mean([np.isin(m, s.argmax(1)).mean() for m, s in zip(members, scores, strict=True)])
    )


def first_pair(pairs: np.ndarray) -> tuple[int, int]:
    """The two groups whose link is scored highest."""
    row, column = divmod(int(np.triu(pairs, 1).argmax()), len(pairs))
    return row, column


def test_a_name_is_given_once_and_fits() -> None:
    names = [attack.name for attack in suite()]
    assert len(names) == len(set(names)) >= 14
    for attack in suite():
        assert attack.title and attack.modes and attack.operators


def test_span_finds_members_in_mixtures(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    claim = Span().run(observe(public, members, mixed(rng)), Budget(60))
    assert found_ratio(claim.gallery_scores, members) == 1


def test_span_finds_nothing_in_noise(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    claim = Span(background=100).run(split(public, members, HIDDEN, rng), Budget(60))
    assert found_ratio(claim.gallery_scores, members) < 0.4


def test_gradient_ica_shows_pictures(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    observation = observe(public, members, mixed(rng))
    claim = GradientIca(count=300, epochs=3).run(observation, Budget(60))
    assert claim.inputs is not None
    assert named(claim.gallery_scores, members) > 0.9
    shown = pictures(public.manifest.preprocessing, public.gallery)
    error = [
        np.mean((claim.inputs[g][:, None] - shown[m]) ** 2, axis=(2, 3, 4)).min(0)
        for g, m in enumerate(members)
    ]
    assert np.mean(error) < np.var(shown - shown.mean(axis=0)) / 2


def test_pool_ica_separates_shuffled_groups(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    claim = PoolIca(pooled=2, count=300).run(observe(public, members, mixed(rng)), Budget(60))
    assert named(claim.gallery_scores, members) > 0.6


def test_a_decoder_sees_through_little_noise(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    attack = NoisyDecoder(count=300, epochs=12)
    claim = attack.run(split(public, members, 0.3, rng), Budget(60))
    assert named(claim.gallery_scores, members) > 0.7
    claim = attack.run(split(public, members, HIDDEN, rng), Budget(60))
    assert named(claim.gallery_scores, members) < 0.4


@pytest.mark.parametrize("mode", ["split", "bounded"])
def test_a_matched_filter_sees_through_some_noise(
    public: Public, members: np.ndarray, rng: np.random.Generator, mode: str
) -> None:
    sigma = 3.0 if mode == "split" else 0.3
    known = with_noise(public, mode, sigma)
    protect = noisy(rng, sigma, mix=mode == "bounded")
    observation = observe(known, members, protect, mode=mode, dtype="float32")
    scores = MatchedFilter(background=200).run(observation, Budget(60)).gallery_scores
    assert scores is not None
    found = named(scores, members) if mode == "split" else found_ratio(scores, members)
    assert found > 0.9


def test_a_matched_filter_finds_nothing_in_noise(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    claim = MatchedFilter().run(split(public, members, HIDDEN, rng), Budget(60))
    assert named(claim.gallery_scores, members) < 0.4


def test_repeats_are_recognised_and_averaged_and_show_what_one_copy_hides(
    public: Public, rng: np.random.Generator
) -> None:
    members = rng.permutation(60)[:8].reshape(4, K)
    sent, sigma = np.repeat(members, 12, axis=0), 15.0
    known = with_noise(public, "bounded", sigma)
    view = observe(known, sent, noisy(rng, sigma, mix=True), mode="bounded", dtype="float32")
    claim = Repeats(then=None).run(view, Budget(60))
    assert claim.notes.startswith("12 copies of 4 groups; ")
    assert claim.gallery_scores is not None and len(claim.gallery_scores) == 48
    once = found_ratio(MatchedFilter().run(view, Budget(60)).gallery_scores, sent)
    assert found_ratio(claim.gallery_scores, sent) > max(0.9, once + 0.2)


def test_copies_are_turned_onto_each_other_and_averaged(
    public: Public, rng: np.random.Generator
) -> None:
    members = rng.permutation(60)[:4].reshape(2, K)
    known = with_noise(public, "bounded", 0.5)
    protect = noisy(rng, 0.5, mix=True)
    sent = np.repeat(members, 9, axis=0)
    view = observe(known, sent, protect, mode="bounded", dtype="float32")
    less = averaged(view, requests(view), 9)
    assert less.public.manifest.bounded is not None
    assert less.public.manifest.bounded.sigma == pytest.approx(0.5 / 3)
    found = requests(less)
    assert len(found) == 2
    for group, rows in zip(found, members, strict=True):
        true = clipped(round_features(public, public.gallery[rows])[0]).reshape(K, -1)
        got = group.rounds[0].reshape(K, -1)
        outside = np.linalg.norm(got - got @ np.linalg.pinv(true) @ true) / np.sqrt(got.size)
        assert outside == pytest.approx(0.5 / 3, rel=0.1)


def test_groups_that_differ_are_no_repeats(public: Public, rng: np.random.Generator) -> None:
    members = np.stack([rng.permutation(60)[:K] for _ in range(8)])
    members[1:, 0] = members[0, 0]  # they have one of two in common
    known = with_noise(public, "bounded", 1.0)
    view = observe(known, members, noisy(rng, 1.0, mix=True), mode="bounded", dtype="float32")
    assert Repeats(then=None).run(view, Budget(60)).notes.startswith("1 copies of 8 groups")


def test_classes_are_read_off_separated_features(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    observation = observe(public, members, mixed(rng))
    claims = [
        Attributes(count=300).run(observation, Budget(60)),
        CrossRound(count=300).run(observation, Budget(60)),
    ]
    for claim in claims:
        assert claim.attributes is not None
        truth = np.sort(public.gallery_labels[members], axis=1)
        assert np.mean(np.sort(claim.attributes, axis=1) == truth) > 0.7
    assert named(claims[1].gallery_scores, members) > 0.9


def test_a_learned_separator_names_classes(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    attack = LearnedSeparator(count=600, steps=200, width=128)
    claim = attack.run(observe(public, members, mixed(rng)), Budget(60))
    assert claim.attributes is not None
    truth = public.gallery_labels[members]
    hits = [len(np.intersect1d(a, b)) for a, b in zip(claim.attributes, truth, strict=True)]
    assert np.sum(hits) >= 6  # of 12; two classes of ten are right 2.4 times at random


def test_a_gram_matrix_does_not_see_coefficients(rng: np.random.Generator) -> None:
    group = rng.standard_normal((1, 4, 6))
    np.testing.assert_allclose(grams(haar(4, rng) @ group), grams(group), atol=1e-3)


@pytest.mark.parametrize(("mode", "sigma"), [("mix", 0.0), ("bounded", 0.3), ("split", 1.0)])
def test_requests_with_a_common_input_are_linked(
    public: Public, rng: np.random.Generator, mode: str, sigma: float
) -> None:
    members = np.array([[0, 1], [2, 3], [4, 5], [1, 6]])
    known = with_noise(public, mode, sigma) if sigma else public
    protect = noisy(rng, sigma, mix=mode != "split") if sigma else mixed(rng)
    observation = observe(known, members, protect, mode=mode, dtype="float32")
    pairs = Linkage(background=200).run(observation, Budget(60)).pairs
    assert pairs is not None
    assert first_pair(pairs) == (0, 3)


def test_value_types_that_depend_on_the_input_link_requests(
    public: Public, members: np.ndarray, rng: np.random.Generator
) -> None:
    plain = observe(public, members, mixed(rng))
    wide = observe(public, members, mixed(rng), dtype="float32")
    each = 4  # messages of a group: two rounds, up and down
    messages = [
        (wide if index // each in (1, 4) else plain).messages[index]
        for index in range(len(plain.messages))
    ]
    pairs = TimingSize().run(replace(plain, messages=tuple(messages)), Budget(60)).pairs
    assert pairs is not None
    assert first_pair(pairs) == (1, 4)
    claim = TimingSize().run(plain, Budget(60))
    assert claim.notes.startswith("1 patterns of sizes, 1 of counts")


def box_muller(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The map of datamix.noise with uniforms of so many bits, float32 for 24 of them."""
    rows = []
    for _ in range(shape[0]):
        half = int(np.prod(shape[1:])) // 2
        first, second = (rng.integers(2**bits, size=half) + 0.5 for _ in range(2))
        radius, angle = np.sqrt(-2 * np.log(first * 2.0**-bits)), 2 * np.pi * second * 2.0**-bits
        rows.append(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]))
    return np.asarray(rows).reshape(shape)


@pytest.mark.parametrize(("bits", "grid", "broken"), [(24, 0.0, True), (52, 2.0**-10, False)])
def test_a_coarse_lattice_of_noise_gives_candidates_away(
    public: Public,
    members: np.ndarray,
    rng: np.random.Generator,
    bits: int,
    grid: float,
    broken: bool,
) -> None:
    sigma = 70.0

    def protect(features: np.ndarray, block: int) -> np.ndarray:
        sent = clipped(features) + sigma * box_muller(rng, features.shape, bits)
        return np.rint(sent / grid) * grid if grid else sent

    known = with_noise(public, "split", sigma)
    observation = observe(known, members, protect, mode="split", dtype="float32")
    scores = NoiseLattice().run(observation, Budget(60)).gallery_scores
    found = named(scores, members)
    assert found == 1 if broken else found < 0.4


@pytest.mark.parametrize("reused", [True, False])
def test_a_mask_that_is_used_twice_gives_both_inputs_away(
    public: Public, rng: np.random.Generator, reused: bool
) -> None:
    sigma = 300.0
    masks: dict[int, np.ndarray] = {}
    members = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])

    def protect(features: np.ndarray, block: int) -> np.ndarray:
        fresh = sigma * rng.standard_normal(features.shape)
        noise = masks.setdefault(block, fresh) if reused else fresh
        return clipped(features) + noise

    known = with_noise(public, "split", sigma)
    observation = observe(known, members, protect, mode="split", dtype="float32")
    claim = MaskReuse().run(observation, Budget(60))
    assert claim.notes.startswith("24 pairs" if reused else "0 pairs")
    assert claim.gallery_scores is not None
    if reused:
        assert named(claim.gallery_scores, members) > 0.7
    else:
        assert not claim.gallery_scores.any()


@pytest.mark.parametrize("careless", [True, False])
def test_seeds_that_are_hashes_give_inputs_away(
    public: Public, rng: np.random.Generator, careless: bool
) -> None:
    members = np.array([[0, 1], [2, 3], [1, 5]])
    messages = []
    for index, rows in enumerate(members):
        bodies = [
            hashlib.sha256(public.gallery[row].tobytes()).digest() if careless else rng.bytes(32)
            for row in rows
        ]
        body = wire.encode_noise_request(
            np.frombuffer(b"".join(bodies), np.uint8).reshape(K, 32), request_id=f"b{index}"
        )
        messages.append(Message("B", "up", float(index), body))
    known = with_noise(public, "split", 70.0)
    claim = OperatorB().run(Observation("split", "B", tuple(messages), known), Budget(60))
    assert claim.pairs is not None
    if careless:
        assert named(claim.gallery_scores, members) == 1
        assert claim.pairs[0, 2] == 1
    else:
        assert named(claim.gallery_scores, members) < 0.7
        assert not np.triu(claim.pairs, 1).any()
