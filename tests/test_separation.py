import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.audit.separation import (
    background_of,
    discount,
    fast_ica,
    gradients,
    nearest_orthogonal,
    separate,
    whiten,
)
from tests.observed import haar


def sparse_maps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Maps with few, sharp edges, (count, 2, 24, 24)."""
    maps = np.zeros((count, 2, 24, 24))
    for one in maps.reshape(-1, 24, 24):
        for _ in range(4):
            top, left = rng.integers(0, 18, 2)
            one[top : top + rng.integers(3, 7), left : left + rng.integers(3, 7)] += rng.normal()
    return maps


def likeness(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each true source the largest absolute cosine with a found one."""
    flat = [
        x.reshape(len(x), -1) / np.linalg.norm(x.reshape(len(x), -1), axis=1)[:, None]
        for x in (found, truth)
    ]
    return np.asarray(np.abs(flat[0] @ flat[1].T).max(axis=0))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_sparse_sources_come_out_with_their_scale(count: int) -> None:
    rng = np.random.default_rng(count)
    truth = sparse_maps(rng, count)
    mixed = np.tensordot(haar(count, rng), truth, 1)
    found = separate(mixed, rng)
    assert likeness(found.sources, truth).min() > 0.97
    sizes = [np.sort(np.linalg.norm(x.reshape(count, -1), axis=1)) for x in (found.sources, truth)]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.1)


def test_any_invertible_coefficients_are_no_better_than_orthogonal_ones() -> None:
    rng = np.random.default_rng(5)
    truth = sparse_maps(rng, 4)
    found = separate(np.tensordot(rng.standard_normal((4, 4)), truth, 1), rng)
    assert likeness(found.sources, truth).min() > 0.97


def test_gaussian_sources_stay_mixed() -> None:
    rng = np.random.default_rng(6)
    truth = rng.standard_normal((4, 2, 24, 24))
    found = separate(np.tensordot(haar(4, rng), truth, 1), rng)
    assert likeness(found.sources, truth).mean() < 0.97


def test_public_data_make_up_for_what_sources_share() -> None:
    rng = np.random.default_rng(7)
    common = np.cumsum(rng.standard_normal((1, 2, 24, 24)), axis=3)

    def some(count: int) -> np.ndarray:
        return sparse_maps(rng, count) + common * (1 + rng.normal(size=(count, 1, 1, 1)))

    background = background_of(some(200).reshape(200, -1))
    alone, helped = [], []
    for _ in range(4):
        truth = some(4)
        mixed = np.tensordot(haar(4, rng), truth, 1)
        alone.append(likeness(separate(mixed, rng).sources, truth).mean())
        found = separate(mixed, rng, background=background).sources
        helped.append(likeness(found, truth).mean())
    assert np.mean(helped) > np.mean(alone) + 0.01


def test_gradients_are_differences_of_neighbours() -> None:
    maps = np.arange(12.0).reshape(1, 1, 3, 4)
    np.testing.assert_array_equal(gradients(maps), [[4.0] * 8 + [1.0] * 9])


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_whitened_signals_are_white(rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    signals = rng.standard_normal((6, rank)) @ rng.standard_normal((rank, 500))
    white, whitening = whiten(signals)
    assert len(white) == rank
    np.testing.assert_allclose(white @ white.T / 500, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(whitening @ signals, white, atol=1e-6)


@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_rotation_is_orthogonal(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    white, _ = whiten(rng.laplace(size=(size, 400)))
    for found in (fast_ica(white, rng, iterations=20), nearest_orthogonal(white[:, :size])):
        np.testing.assert_allclose(found @ found.T, np.eye(size), atol=1e-8)


def test_discounting_evens_out_public_directions() -> None:
    rng = np.random.default_rng(8)
    direction = rng.standard_normal(50)
    rows = rng.standard_normal((30, 1)) * 20 * direction + rng.standard_normal((30, 50))
    flat = discount(rows, background_of(rows))
    before, after = (np.linalg.svd(x, compute_uv=False) for x in (rows, flat))
    assert before[0] / before[1] > 20 > 5 > after[0] / after[1]


def test_discounting_acts_on_rows_alone() -> None:
    """Or it would not commute with mixing."""
    rng = np.random.default_rng(9)
    background = background_of(rng.standard_normal((10, 40)))
    rows, turn = rng.standard_normal((4, 40)), haar(4, rng)
    np.testing.assert_allclose(
        discount(turn @ rows, background), turn @ discount(rows, background), atol=1e-10
    )


@pytest.mark.parametrize("shape", [(4, 9), (2, 1, 1, 1)])
def test_maps_without_neighbours_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        gradients(np.ones(shape))


def test_constant_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match="constant"):
        separate(np.ones((3, 1, 4, 4)), np.random.default_rng(0))


def test_no_public_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="public features"):
        background_of(np.zeros((3, 5)))
