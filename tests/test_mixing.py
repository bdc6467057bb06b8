"""Mixing: exact inverses, the Haar law, entropy from the system only, and secrets that stay so."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import pickle
import pprint
import re
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.mixing import Coefficients, decoys, demix, haar, mix

Array = npt.NDArray[Any]

sizes = st.integers(1, 32)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def group(size: int, shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((size, *shape)).astype(dtype)


# --- algebra ------------------------------------------------------------------------------------


@given(
    size=sizes,
    shape=shapes,
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 99),
)
def test_demix_undoes_mix(size: int, shape: tuple[int, ...], dtype: str, seed: int) -> None:
    features = group(size, shape, dtype, seed)
    coefficients = haar(size)
    mixtures = mix(features, coefficients)
    restored = demix(mixtures, coefficients)
    assert mixtures.shape == restored.shape == features.shape
    assert mixtures.dtype == restored.dtype == np.float32
    assert mixtures.flags.c_contiguous
    assert restored.flags.c_contiguous
    assert np.abs(restored - features).max() <= 1e-5 * max(1, np.abs(features).max())


@given(size=sizes, seed=st.integers(0, 99))
def test_a_row_is_the_sum_that_the_docstring_writes(size: int, seed: int) -> None:
    features = group(size, (2, 3), "float32", seed)
    coefficients = haar(size)
    matrix = mix(np.eye(size, dtype=np.float32), coefficients)  # A I = A
    expected = [sum(matrix[i, j] * features[j] for j in range(size)) for i in range(size)]
    assert np.allclose(mix(features, coefficients), expected, atol=1e-5)
    back = [sum(matrix[j, i] * features[j] for j in range(size)) for i in range(size)]
    assert np.allclose(demix(features, coefficients), back, atol=1e-5)


@given(sizes)
def test_coefficients_are_orthogonal(size: int) -> None:
    matrix = mix(np.eye(size), haar(size)).astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-5


@given(size=sizes, seed=st.integers(0, 99))
def test_mixing_amplifies_nothing(size: int, seed: int) -> None:
    features = group(size, (16,), "float32", seed)
    energy = float(np.square(mix(features, haar(size))).sum())
    assert energy == pytest.approx(float(np.square(features).sum()), rel=1e-4)


@given(size=sizes, seed=st.integers(0, 99))
def test_a_linear_block_between_changes_nothing(size: int, seed: int) -> None:
    features = group(size, (6,), "float32", seed)
    weights = group(6, (5,), "float32", seed + 1)
    coefficients = haar(size)
    through = demix(mix(features, coefficients) @ weights, coefficients)
    assert np.allclose(through, features @ weights, atol=1e-4)


def test_the_group_is_not_changed_in_place() -> None:
    features = group(4, (3,), "float32", 0)
    before = features.copy()
    mix(features, haar(4))
    assert np.array_equal(features, before)


@pytest.mark.parametrize("apply", [mix, demix])
@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (0, 2), ()])
def test_a_group_of_another_size_is_refused(
    apply: Callable[[Array, Coefficients], Array], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="expected 4 members"):
        apply(np.zeros(shape, np.float32), haar(4))


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_has_a_member_at_least(size: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        haar(size)


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((2, 2)),
        np.ones((2, 2)),
        1.01 * np.eye(2),
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
    ],
    ids=["zeros", "singular", "scaled", "NaN", "Inf"],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_matrix_that_would_amplify_is_refused(matrix: Array) -> None:
    with pytest.raises(ConfigError, match="not orthogonal"):
        Coefficients(matrix.astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 2, 2)])
def test_coefficients_are_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"\(K, K\)"):
        Coefficients(np.ones(shape, np.float32))


# --- the law ------------------------------------------------------------------------------------


def test_the_law_looks_like_haar() -> None:
    """Moments over 4,000 draws at K = 4, each within 6 standard errors of the Haar law's.

    12 such checks, at most 2e-9 each for a normal mean: fails by chance once in 40 million runs.
    Dropping the sign correction moves the mean of the diagonal by 50 standard errors.
    """
    draws, size = 4000, 4
    every = np.stack([mix(np.eye(size), haar(size)) for _ in range(draws)]).astype(np.float64)
    # A column is a point on the sphere: E x = 0, E x^2 = 1/K, E x^4 = 3 / (K (K + 2)).
    error = 6 / math.sqrt(draws)
    diagonal_mean = np.abs(every[:, range(size), range(size)].mean(axis=0))
    assert np.all(diagonal_mean < error * math.sqrt(1 / size))
    fourth = 3 / (size * (size + 2))
    spread = math.sqrt(fourth - 1 / size**2)
    assert np.all(np.abs((every[:, :, 0] ** 2).mean(axis=0) - 1 / size) < error * spread)
    # trace^2 has mean 1 under Haar; it is at most 16, and E trace^4 = 3: deviation sqrt(2).
    trace = np.trace(every, axis1=1, axis2=2)
    assert abs((trace**2).mean() - 1) < error * math.sqrt(2)
    # Reflections and rotations are equally likely.
    positive = (np.linalg.det(every) > 0).mean()
    assert abs(positive - 0.5) < error * 0.5
    # Different entries are uncorrelated: E x00 x11 = 0 with deviation below 1/K.
    assert abs((every[:, 0, 0] * every[:, 1, 1]).mean()) < error / size
    assert abs((every[:, 0, 1] * every[:, 1, 0]).mean()) < error / size


def test_both_signs_of_a_group_of_one_occur() -> None:
    # All equal in 100 draws: 2 in 2^100.
    signs = {mix(np.ones((1, 1)), haar(1)).item() for _ in range(100)}
    assert signs == {1.0, -1.0}


def test_every_draw_is_fresh() -> None:
    # Two equal 32-bit draws among 50 have a chance below 1e-25.
    drawn = {mix(np.eye(4), haar(4)).tobytes() for _ in range(50)}
    assert len(drawn) == 50


def test_decoys_are_fresh_noise_of_unit_variance() -> None:
    """Mean and variance over 40,000 values within 6 standard errors: by chance 1 in 250 million."""
    noise = decoys(4, (100, 10, 10))
    assert noise.shape == (4, 100, 10, 10)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 6 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / noise.size)
    assert not np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise, decoys(4, (100, 10, 10)))


def test_an_odd_number_of_values_is_drawn_too() -> None:
    assert decoys(1, (3, 1, 1)).shape == (1, 3, 1, 1)
    assert haar(3).group_size == 3


# --- entropy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_all_entropy_comes_from_the_operating_system(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(size)
    stream = generator.bytes(1 << 16)
    asked: list[int] = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return stream[:count]

    monkeypatch.setattr(os, "urandom", urandom)
    np.random.seed(1)
    first = mix(np.eye(size), haar(size))
    np.random.seed(2)
    second = mix(np.eye(size), haar(size))
    assert np.array_equal(first, second)  # the same bytes, so there is no other source
    assert sum(asked) >= 2 * 8 * size * size  # 64 bits for each normal
    assert np.array_equal(decoys(2, (3,)), decoys(2, (3,)))
    generator = np.random.default_rng(99)
    stream = generator.bytes(1 << 16)
    assert not np.array_equal(first, mix(np.eye(size), haar(size))) or size == 1


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_extreme_bytes_give_finite_normals(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: byte * count)
    assert np.isfinite(decoys(2, (3,))).all()


# --- secrecy ------------------------------------------------------------------------------------


def numbers_in(text: str) -> list[float]:
    """Everything in ``text`` that reads as a number with a decimal point."""
    return [float(n) for n in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", text)]


def shows(text: str, coefficients: Coefficients) -> bool:
    """Whether ``text`` holds an entry of the matrix, printed to three digits or more."""
    matrix = mix(np.eye(coefficients.group_size), coefficients)
    entries = np.abs(matrix.ravel())
    return any(np.any(np.abs(entries - abs(number)) < 1e-3) for number in numbers_in(text))


@pytest.fixture
def secret() -> Coefficients:
    return haar(5)


def test_the_check_sees_a_matrix_that_is_shown(secret: Coefficients) -> None:
    matrix = mix(np.eye(5), secret)
    assert shows(repr(matrix), secret)
    assert shows(f"x = {matrix[2, 3]:.4f}", secret)
    assert shows(json.dumps(matrix.tolist()), secret)


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        ascii,
        format,
        pprint.pformat,
        "{}".format,
        "{!r}".format,
        "%s".__mod__,
        "%r".__mod__,
        lambda secret: f"{secret} {secret!r} {secret!s}",
        lambda secret: repr([secret, {"coefficients": secret}]),
        lambda secret: repr(np.array([secret], dtype=object)),
        lambda secret: str(ConfigError(secret)),
    ],
)
def test_no_text_shows_the_values(show: Callable[[Any], str], secret: Coefficients) -> None:
    text = show(secret)
    assert not shows(text, secret)
    assert "secret" in text


@pytest.mark.parametrize(
    "leak",
    [
        copy.copy,
        copy.deepcopy,
        json.dumps,
        vars,
        lambda secret: copy.deepcopy({"state": [secret]}),
        *[lambda secret, p=p: pickle.dumps(secret, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)],
        lambda secret: pickle.dumps({"state": [secret]}),
        lambda secret: list(secret),
        lambda secret: memoryview(secret),
        lambda secret: np.array(secret, np.float32),
        lambda secret: np.linalg.inv(secret),
    ],
)
def test_no_copy_leaves_the_object(leak: Callable[[Any], Any], secret: Coefficients) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        leak(secret)
    assert not shows(str(caught.value), secret)


def test_no_log_shows_the_values(secret: Coefficients, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("edge").warning("%r", secret)
        logging.getLogger("edge").debug("mixing with %s", secret)
        try:
            mix(np.zeros((2, 3)), secret)
        except ConfigError:
            logging.getLogger("edge").exception("failed with %r", secret)
    assert len(caplog.records) == 3
    assert not shows(caplog.text, secret)


@pytest.mark.parametrize("locals_too", [False, True])
@pytest.mark.parametrize(
    "fail",
    [
        lambda secret: mix(np.zeros((2, 3)), secret),
        lambda secret: demix(np.zeros((2, 3)), secret),
        lambda secret: mix(np.zeros(()), secret),
        lambda secret: mix(np.array([["a"]] * 5), secret),
        lambda secret: pickle.dumps(secret),
        lambda secret: copy.deepcopy(secret),
        lambda secret: secret[0],
        lambda secret: secret + 1,
    ],
)
def test_no_traceback_shows_the_values(
    fail: Callable[[Any], Any], locals_too: bool, secret: Coefficients
) -> None:
    # Some handlers of crashes print the local variables of each frame.
    try:
        fail(secret)
    except Exception as error:
        lines = traceback.TracebackException.from_exception(error, capture_locals=locals_too)
        assert not shows("".join(lines.format()), secret)
    else:
        pytest.fail("expected an error")
