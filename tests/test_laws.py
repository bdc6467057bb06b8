import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.laws import LAWS, Law, condition_limit, draw

SIZES = st.sampled_from([1, 2, 3, 4, 8, 16, 32])


@given(law=st.sampled_from(LAWS), k=SIZES, seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_the_inverse_undoes_the_matrix(law: Law, k: int, seed: int, share: float) -> None:
    a, inverse = draw(law, np.random.default_rng(seed), 3, k, strength=share)
    assert a.shape == inverse.shape == (3, k, k)
    assert a.dtype == inverse.dtype == np.float32
    limit = 1e-6 * condition_limit(law, k) * max(1, k)
    assert np.abs(inverse @ a - np.eye(k)).max() < limit


@given(law=st.sampled_from(LAWS), k=SIZES, seed=st.integers(0, 2**32))
def test_no_matrix_is_worse_than_the_limit(law: Law, k: int, seed: int) -> None:
    a, _ = draw(law, np.random.default_rng(seed), 4, k)
    assert (np.linalg.cond(a.astype(np.float64)) < condition_limit(law, k) * 1.001 + 1e-5).all()


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_gaussian_matrices_have_a_condition_below_20(k: int) -> None:
    a, _ = draw("gaussian", np.random.default_rng(0), 200, k)
    conditions = np.linalg.cond(a.astype(np.float64))
    assert 5 < conditions.max() < 20.01
    # Drawn anew, not clipped: the entries are still about standard normal.
    assert abs(float(a.mean())) < 0.1
    assert 0.8 < float(a.std()) < 1.2


@given(k=SIZES, seed=st.integers(0, 2**32))
def test_each_law_is_what_its_name_says(k: int, seed: int) -> None:
    orthogonal, _ = draw("haar", np.random.default_rng(seed), 3, k)
    assert np.abs(orthogonal @ orthogonal.swapaxes(1, 2) - np.eye(k)).max() < 1e-5
    rows, _ = draw("dirichlet", np.random.default_rng(seed), 3, k)
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=2), 1, rtol=1e-5)
    dominant, _ = draw("diagonal-dominant", np.random.default_rng(seed), 3, k)
    diagonal = np.abs(np.diagonal(dominant, axis1=1, axis2=2))
    rest = np.abs(dominant).sum(axis=2) - diagonal
    assert (rest <= 0.51 * diagonal).all()


def test_haar_is_uniform() -> None:
    """The first column of a Haar matrix is uniform on the sphere: mean 0, covariance I / K."""
    a, _ = draw("haar", np.random.default_rng(0), 20_000, 4)
    column = a[:, :, 0]
    np.testing.assert_allclose(column.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(column.T @ column / len(column), np.eye(4) / 4, atol=0.01)
    assert abs(float(np.linalg.det(a.astype(np.float64)).mean())) < 0.05  # both orientations


@pytest.mark.parametrize("law", LAWS)
def test_a_curriculum_starts_with_no_mixing_and_ends_with_the_law(law: Law) -> None:
    nothing, back = draw(law, np.random.default_rng(0), 5, 4, strength=0)
    np.testing.assert_allclose(nothing, np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-6)
    np.testing.assert_allclose(back, nothing, atol=1e-6)
    a_little, _ = draw(law, np.random.default_rng(0), 500, 4, strength=0.1)
    much, _ = draw(law, np.random.default_rng(0), 500, 4, strength=0.9)
    far = [np.abs(a - np.eye(4)).mean() for a in (a_little, much)]
    assert 0 < far[0] < far[1]
    full, _ = draw(law, np.random.default_rng(0), 5, 4, strength=1)
    plain, _ = draw(law, np.random.default_rng(0), 5, 4)
    np.testing.assert_array_equal(full, plain)


def test_a_law_is_a_function_of_the_generator() -> None:
    for law in LAWS:
        first, again, other = (
            draw(law, np.random.default_rng(seed), 2, 8)[0] for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-3


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="law is 'zipf', expected one of haar, gaussian"):
        draw("zipf", np.random.default_rng(0), 1, 2)  # type: ignore[arg-type]
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="expected 0 to 1"):
            draw("haar", np.random.default_rng(0), 1, 2, strength=strength)
