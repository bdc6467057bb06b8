"""The noise map: the values it must give everywhere, how they are spread, and what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamix import noise
from datamix.errors import ConfigError, WireError

SEED = bytes(range(32))
# Computed by plain Python over RFC 8439's block function: see reference().
GOLDEN = [
    -0.6502757968488376,
    -1.234788831402196,
    0.29216068541688917,
    1.0113121651019583,
    -1.1570304482920815,
    0.988299934443603,
    0.6038778522454109,
]

seeds = st.binary(min_size=32, max_size=32)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def chacha20(key: bytes, counter: int) -> bytes:
    """One block of RFC 8439's keystream, section 2.3, with a nonce of zeros."""

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> 32 - by) & 0xFFFFFFFF

    words = [int.from_bytes(key[at : at + 4], "little") for at in range(0, 32, 4)]
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *words, counter, 0, 0, 0]
    state = list(start)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) & 0xFFFFFFFF
            state[z] = rotated(state[z] ^ state[x], by)

    for _ in range(10):
        for at in range(4):
            quarter(at, at + 4, at + 8, at + 12)
        for at in range(4):
            quarter(at, (at + 1) % 4 + 4, (at + 2) % 4 + 8, (at + 3) % 4 + 12)
    added = ((a + b) & 0xFFFFFFFF for a, b in zip(start, state, strict=True))
    return b"".join(word.to_bytes(4, "little") for word in added)


def reference(seed: bytes, count: int) -> list[float]:
    """The map once more, as its description says, without numpy and cryptography."""
    pairs = -(-count // 2)
    stream = b"".join(chacha20(seed, block) for block in range(-(-pairs // 4)))
    words = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, 16 * pairs, 8)]
    uniform = [(float(word >> 11) + 0.5) / 2.0**53 for word in words]
    polar = [
        (math.sqrt(-2 * math.log(u)), 2 * math.pi * v)
        for u, v in zip(uniform[:pairs], uniform[pairs:], strict=True)
    ]
    return [*(r * math.cos(a) for r, a in polar), *(r * math.sin(a) for r, a in polar)][:count]


def test_the_map_gives_these_values() -> None:
    np.testing.assert_allclose(noise.gaussians(SEED, (7,)), GOLDEN, rtol=1e-14)
    np.testing.assert_array_equal(
        noise.gaussians(SEED, (7,)).astype(np.float32), np.array(GOLDEN, np.float32)
    )
    rows = np.frombuffer(SEED, np.int8).reshape(1, 32)
    np.testing.assert_array_equal(
        noise.expand_rows(rows, (7,))[0], noise.gaussians(SEED, (7,)).astype(np.float32)
    )


def test_the_reference_is_the_published_cipher() -> None:
    # RFC 8439, appendix A.1, test vector 1: a key of zeros.
    assert chacha20(bytes(32), 0).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08d")


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 60))
def test_the_map_is_what_its_description_says(seed: bytes, count: int) -> None:
    np.testing.assert_allclose(
        noise.gaussians(seed, (count,)), reference(seed, count), rtol=1e-12, atol=1e-14
    )


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(32))), shapes)
def test_rows_are_expanded_one_by_one(drawn: noise.Array, shape: tuple[int, ...]) -> None:
    rows = noise.to_rows(drawn)
    assert rows.dtype == np.int8 and rows.tobytes() == drawn.tobytes()
    assert noise.from_rows(rows) == noise.from_rows(drawn) == [row.tobytes() for row in drawn]
    expanded = noise.expand_rows(rows, shape)
    assert expanded.shape == (len(drawn), *shape) and expanded.dtype == np.float32
    for row, seed in zip(expanded, noise.from_rows(rows), strict=True):
        np.testing.assert_array_equal(row, noise.gaussians(seed, shape).astype(np.float32))
        np.testing.assert_array_equal(
            row.ravel(), noise.gaussians(seed, (row.size,)).astype(np.float32)
        )


def test_seeds_that_do_not_lie_side_by_side_travel_too() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (4, 64), dtype=np.uint8)[::2, ::2]
    assert noise.to_rows(drawn).tobytes() == drawn.tobytes()


# --- how the values are spread ------------------------------------------------------------------


def sample() -> noise.Array:
    drawn = np.random.default_rng(7).integers(0, 256, (20, 32), dtype=np.uint8)
    return noise.expand_rows(drawn, (50_001,)).astype(np.float64)


def test_the_moments_are_those_of_a_normal_distribution() -> None:
    values = sample()
    n = values.size
    # Within 5 standard errors: var of x^k is E x^2k - (E x^k)^2.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(values**power) - mean) < 5 * math.sqrt(variance / n), power


def test_the_distribution_is_normal() -> None:
    values = np.sort(sample().ravel())
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in values[::100]])
    ranks = np.arange(values.size)[::100] / values.size
    # Kolmogorov and Smirnov: exceeded once in 500 by chance (1.86), and coarser by the step.
    assert np.abs(normal - ranks).max() < 1.86 / math.sqrt(values.size) + 100 / values.size


def test_rows_halves_and_neighbours_are_not_alike() -> None:
    values = sample()
    bound = 5 / math.sqrt(values.shape[1])
    correlation = np.corrcoef(values) - np.eye(len(values))
    assert np.abs(correlation).max() < bound
    for row in values:
        half = row.size // 2
        # The two values of a pair, as they are and by size, and neighbours.
        for a, b in ((row[:half], row[half + 1 :]), (row[:-1], row[1:])):
            assert abs(np.corrcoef(a, b)[0, 1]) < 1.5 * bound
            assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 1.5 * bound


@pytest.mark.parametrize("word", [0, (1 << 64) - 1])
def test_the_outermost_words_give_finite_values(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives import ciphers

    class Stuck:
        def __init__(self, *_: object, **__: object) -> None: ...

        def encryptor(self) -> Stuck:
            return self

        def update_into(self, data: bytes, buffer: memoryview) -> None:
            buffer[: len(data)] = word.to_bytes(8, "little") * (len(data) // 8)

    monkeypatch.setattr(ciphers, "Cipher", Stuck)
    values = noise.gaussians(SEED, (2,))
    assert np.isfinite(values).all() and np.abs(values).max() < 8.66
    assert (np.abs(values).max() > 8.65) == (word == 0)


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_seed_has_32_bytes(size: int) -> None:
    with pytest.raises(ConfigError, match=f"seed has {size} bytes, expected 32"):
        noise.gaussians(bytes(size), (2,))


@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_noise_has_a_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="shape of noise is"):
        noise.gaussians(SEED, shape)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 31), np.uint8),
        np.zeros((2, 33), np.int8),
        np.zeros(32, np.uint8),
        np.zeros((1, 2, 32), np.uint8),
        np.zeros((0, 32), np.uint8),
        np.zeros((2, 32), np.float32),
    ],
)
def test_seeds_are_rows_of_32_bytes(rows: noise.Array) -> None:
    for reject in (noise.to_rows, noise.from_rows, lambda rows: noise.expand_rows(rows, (2,))):
        with pytest.raises(WireError, match=r"expected \(rows, 32\) bytes, not empty"):
            reject(rows)


def test_a_message_is_read_without_cryptography() -> None:
    code = "import sys, datamix.wire; assert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
