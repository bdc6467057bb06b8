"""Each variation against what it promises, and its promise to depend on the generator alone."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.augment import (
    Augmentation,
    augment,
    cutout,
    flip,
    mask,
    mask_factors,
    reamplify,
    shift,
    time_shift,
)

SEEDS = st.integers(0, 2**32 - 1)


def images(n: int = 20, side: int = 12) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 256, (n, 3, side, side + 2), dtype=np.uint8)


def clips(n: int = 10, samples: int = 400) -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(1, 3000, (n, samples)).astype(np.int16)


EVERYTHING = Augmentation(
    shift=2, padding="reflect", flip=True, cutout=4, time_shift_ms=5, noise=0.01, gain_db=6
)


@pytest.mark.parametrize("raw", [images(), clips()])
def test_it_repeats_changes_nothing_in_place_and_keeps_shape_and_type(
    raw: npt.NDArray[Any],
) -> None:
    before = raw.copy()
    one, same, other = (augment(raw, np.random.default_rng(s), EVERYTHING) for s in (1, 1, 2))
    np.testing.assert_array_equal(raw, before)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert one.shape == raw.shape and one.dtype == raw.dtype
    np.testing.assert_array_equal(augment(raw, np.random.default_rng(1), Augmentation()), raw)


def test_flip_mirrors_about_half() -> None:
    raw = images(400)
    flipped = flip(raw, np.random.default_rng(0))
    kept = (flipped == raw).all(axis=(1, 2, 3))
    assert 150 < kept.sum() < 250
    np.testing.assert_array_equal(flipped[~kept], raw[~kept, ..., ::-1])


@given(seed=SEEDS, pixels=st.integers(1, 5), padding=st.sampled_from(["zero", "reflect"]))
@settings(max_examples=30, deadline=None)
def test_shift_is_a_crop_of_the_padded_image(
    seed: int, pixels: int, padding: Literal["zero", "reflect"]
) -> None:
    raw = images(4)
    moved = shift(raw, np.random.default_rng(seed), pixels, padding)
    mode: Literal["constant", "reflect"] = "constant" if padding == "zero" else "reflect"
    for before, after in zip(raw, moved, strict=True):
        padded = np.pad(before, ((0, 0), (pixels, pixels), (pixels, pixels)), mode)
        assert any(
            np.array_equal(padded[:, down : down + 12, right : right + 14], after)
            for down in range(2 * pixels + 1)
            for right in range(2 * pixels + 1)
        )


def test_shift_reaches_every_place() -> None:
    raw = np.zeros((500, 1, 9, 9), np.uint8)
    raw[:, 0, 4, 4] = 1
    moved = shift(raw, np.random.default_rng(0), 2, "zero")
    places = {tuple(place) for place in np.argwhere(moved[:, 0])[:, 1:].tolist()}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}


@given(seed=SEEDS, side=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_cutout_paints_one_square_in_the_mean_colour(seed: int, side: int) -> None:
    raw = images(6)
    raw[raw == raw.mean(axis=(0, 2, 3)).round().astype(np.uint8)[:, None, None]] += 1
    colour = raw.mean(axis=(0, 2, 3)).round().astype(np.uint8)
    painted = cutout(raw, np.random.default_rng(seed), side)
    for before, after in zip(raw, painted, strict=True):
        changed = (before != after).any(axis=0)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert 1 <= len(rows) <= side and 1 <= len(columns) <= side
        square = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed.sum() == len(rows) * len(columns)
        assert (square == colour[:, None, None]).all()


def test_cutout_reaches_every_pixel_and_as_often_everywhere() -> None:
    raw = np.zeros((2000, 1, 8, 8), np.uint8)
    raw[::2] = 100
    painted = (cutout(raw, np.random.default_rng(0), 3) != raw).mean(axis=(0, 1))
    # Nine centres of 64 cover an inner pixel, four cover a corner.
    assert np.abs(painted[1:7, 1:7] - 9 / 64).max() < 0.05
    assert abs(float(painted[0, 0]) - 4 / 64) < 0.03


@given(seed=SEEDS, samples=st.sampled_from([1, 30, 399, 400, 5_000]))
@settings(max_examples=30, deadline=None)
def test_time_shift_moves_and_fills_with_silence(seed: int, samples: int) -> None:
    raw = clips(4)
    moved = time_shift(raw, np.random.default_rng(seed), samples)
    for before, after in zip(raw, moved, strict=True):
        sounding = np.flatnonzero(after)  # no sample of the clip is 0
        if not len(sounding):
            assert samples >= 400
            continue
        start, end = sounding[0], sounding[-1] + 1
        assert start == 0 or end == 400
        assert 400 - (end - start) <= samples
        np.testing.assert_array_equal(
            after[start:end], before[: end - start] if start else before[400 - end :]
        )


def test_milliseconds_are_counted_in_samples() -> None:
    raw = np.zeros((300, 400), np.int16)
    raw[:, 200] = 1
    how = Augmentation(time_shift_ms=5, sample_rate=8_000)
    moved = augment(raw, np.random.default_rng(0), how).argmax(axis=1)
    assert moved.min() == 160 and moved.max() == 240


def test_gain_stays_within_its_decibels() -> None:
    raw = np.full((500, 10), 1000, np.int16)
    loud = reamplify(raw, np.random.default_rng(0), 6, 0)
    assert (loud == loud[:, :1]).all()
    assert 501 <= loud.min() < 520 and 1950 < loud.max() <= 1995
    assert reamplify(raw * 30, np.random.default_rng(0), 20, 0).max() == 32_767
    assert reamplify(raw * -30, np.random.default_rng(0), 20, 0).min() == -32_768


def test_noise_has_the_stated_level_and_no_clip_has_another_ones() -> None:
    raw = np.zeros((200, 4000), np.int16)
    noisy = reamplify(raw, np.random.default_rng(0), 0, 0.1) / 32_768
    levels = noisy.std(axis=1)
    assert 0.09 < levels.max() < 0.105 and levels.min() < 0.01
    assert abs(float(levels.mean()) - 0.05) < 0.01
    assert np.abs(noisy.mean(axis=1)).max() < 0.01
    loud = noisy[levels > 0.01]
    alike = np.corrcoef(loud) - np.eye(len(loud))
    assert np.mean(np.abs(alike) > 0.5) < 0.01


@given(seed=SEEDS, mels=st.integers(0, 12), frames=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_masks_are_one_band_and_one_stretch(seed: int, mels: int, frames: int) -> None:
    how = Augmentation(mask_mels=mels, mask_frames=frames)
    factors = mask_factors((5, 1, 8, 15), np.random.default_rng(seed), how)
    assert factors.shape == (5, 1, 8, 15) and factors.dtype == np.float32
    assert set(np.unique(factors).tolist()) <= {0.0, 1.0}
    for one in factors[:, 0]:
        rows, columns = np.flatnonzero(~one.any(axis=1)), np.flatnonzero(~one.any(axis=0))
        if len(rows) == 8 or len(columns) == 15:
            continue  # all is masked: band and stretch can't be told apart
        assert len(rows) <= mels and len(columns) <= frames
        for gone in (rows, columns):
            assert len(gone) == 0 or gone[-1] - gone[0] == len(gone) - 1
        assert (1 - one).sum() == len(rows) * 15 + len(columns) * 8 - len(rows) * len(columns)


def test_masked_features_are_zero_and_others_stay() -> None:
    features = np.random.default_rng(0).normal(1, 0.1, (50, 1, 8, 15)).astype(np.float32)
    how = Augmentation(mask_mels=3, mask_frames=5)
    masked = mask(features, np.random.default_rng(1), how)
    factors = mask_factors(features.shape, np.random.default_rng(1), how)
    assert 0.05 < (factors == 0).mean() < 0.6
    np.testing.assert_array_equal(masked, np.where(factors == 0, 0, features))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shift": -1}, "shift is -1, expected at least 0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"mask_frames": -1}, "mask_frames is -1"),
        ({"sample_rate": 0}, "sample_rate 0"),
        ({"padding": "wrap"}, "padding is 'wrap'"),
    ],
)
def test_odd_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Augmentation(**changes)


def test_odd_inputs_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="shift is 12, expected less than an image's 12"):
        shift(images(2), rng, 12, "reflect")
    for raw in (images().astype(np.float32), clips().astype(np.int32), images()[0], clips()[0]):
        with pytest.raises(ConfigError, match=r"expected \(n, C, H, W\) uint8 or \(n, samples\)"):
            augment(raw, rng, EVERYTHING)
