"""What leaves the device in each mode, what comes back, and that secrets are used once."""

from __future__ import annotations

import math
import pickle

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamix import wire
from datamix.errors import ConfigError
from edge.masks import Mask, Masks
from edge.modes import (
    GRID,
    Bounded,
    Mix,
    Mode,
    Split,
    check_mode,
    clip,
    gaussian_bits,
    int16_step,
    mode_of,
    share,
    wire_dtype,
)
from edge.promises import promise
from tests.fake_device import GROUP, SHAPES, compute, make_manifest

Floats = npt.NDArray[np.float32]
SHAPE = SHAPES[0][0]

rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.just(2), st.just(3), st.just(3)),
    elements=st.floats(-1e4, 1e4, width=32),
)


def features(seed: int = 0, scale: float = 1.0) -> Floats:
    values = np.random.default_rng(seed).standard_normal((GROUP, *SHAPE))
    return (scale * values).astype(np.float32)


def masks(seed: int = 1, blocks: int = 1) -> Masks:
    rng = np.random.default_rng(seed)
    made = []
    for block in range(blocks):
        noise = rng.standard_normal((GROUP, *SHAPES[block][0]))
        made.append(Mask(noise, compute(block, noise.astype(np.float32))))
    return Masks(made)


def modes() -> list[Mode]:
    return [Mix(), Bounded(1e-4), Split(50.0, masks())]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_what_a_linear_block_answers_is_restored(which: int, scale: float) -> None:
    mode, given = modes()[which], features(scale=scale)
    leaving, secret = mode.protect(0, given)
    assert leaving.shape == given.shape and leaving.dtype == np.float32
    assert not np.allclose(leaving, given, atol=0.1 * scale)
    restored = secret.restore(compute(0, leaving))
    assert np.abs(restored - compute(0, given)).max() < 0.005 * max(1, scale)


@given(rows)
def test_clipped_members_have_mean_square_one_at_most(given: Floats) -> None:
    clipped, scale = clip(given)
    power = np.square(clipped.reshape(len(given), -1).astype(np.float64)).mean(axis=1)
    assert (power <= 1).all()
    assert (scale >= 1).all()
    assert np.allclose(clipped * scale[:, None, None, None], given, rtol=1e-5, atol=1e-30)
    small = np.square(given.reshape(len(given), -1).astype(np.float64)).mean(axis=1) < 0.99
    assert (scale[small] == 1).all()


def test_a_share_stands_on_the_grid_and_hides_features_in_noise() -> None:
    noise = np.random.default_rng(3).standard_normal((GROUP, *SHAPE))
    given, _ = clip(features())
    sent = share(given, Mask(noise, np.zeros((GROUP, 1), np.float32)), 300.0)
    steps = sent.astype(np.float64) / GRID
    assert (steps == np.rint(steps)).all()
    assert np.abs(sent - (given + 300.0 * noise)).max() <= 0.5001 * GRID + 300 * 2.0**-22


def test_a_share_of_16_bits_is_whole_steps_of_sigma_alone_and_is_cut_off_far_out() -> None:
    step = int16_step(300.0)
    assert step == np.float32(6 * 300 / 32767)
    noise = np.random.default_rng(3).standard_normal((GROUP, *SHAPE))
    noise[0].flat[:2] = 8.6, -8.6
    given, _ = clip(features())
    sent = share(given, Mask(noise, np.zeros((GROUP, 1), np.float32)), 300.0, step)
    steps, scale = wire.quantise(sent, "int16", step=step)
    assert scale is not None and (scale == np.float32(step)).all()
    assert np.array_equal(wire.dequantise(steps, scale), sent)
    assert steps[0].flat[0] == 32767 and steps[0].flat[1] == -32767
    off = np.abs(sent - (given + 300.0 * noise)).ravel()[2:]
    assert off.max() <= 0.5001 * step + 300 * 2.0**-21


def test_the_mode_split_says_its_step_where_the_wire_is_of_integers() -> None:
    kinds: tuple[wire.Dtype, ...] = ("float16", "int16", "float32")
    steps = [Split(300.0, masks(), dtype).step for dtype in kinds]
    assert steps == [None, int16_step(300.0), None]
    assert Bounded(1.0).step is None and Mix().step is None
    manifest = make_manifest(all_modes=True)
    assert manifest.split is not None
    coarse = manifest.model_copy(
        update={"split": manifest.split.model_copy(update={"wire_dtype": "int16"})}
    )
    assert mode_of(coarse, "split", masks()).step == int16_step(manifest.split.sigma)
    assert mode_of(coarse, "split", masks(), "float32").step is None
    assert wire_dtype(coarse, "split") == "int16"
    coarser: tuple[wire.Dtype, ...] = ("float16", "int8")
    for wanted in coarser:
        with pytest.raises(ConfigError, match="expected 'int16' or finer"):
            wire_dtype(coarse, "split", wanted)


def test_noise_of_the_mode_bounded_is_fresh_and_has_its_deviation() -> None:
    mode, given = Bounded(2.0), np.zeros((GROUP, 20, 20, 20), np.float32)
    first, second = mode.protect(0, given)[0], mode.protect(0, given)[0]
    assert not np.array_equal(first, second)
    assert first.std() == pytest.approx(2.0, rel=0.02)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03


def test_a_mask_is_used_once() -> None:
    mode = Split(50.0, masks())
    mode.protect(0, features())
    with pytest.raises(ConfigError, match="was used, expected a fresh one"):
        mode.protect(0, features(2))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask has shape"):
        Split(50.0, masks()).protect(0, np.zeros((GROUP, 1, 2, 2), np.float32))


@pytest.mark.parametrize("which", range(3))
def test_a_wiped_secret_restores_nothing(which: int) -> None:
    given = features()
    leaving, secret = modes()[which].protect(0, given)
    secret.wipe()
    secret.wipe()
    answer = compute(0, leaving)
    try:
        restored = secret.restore(answer)
    except ConfigError:
        return
    assert not np.allclose(restored, compute(0, given), atol=0.1)


@pytest.mark.parametrize("which", range(3))
def test_secrets_show_nothing_and_cannot_be_pickled(which: int) -> None:
    _, secret = modes()[which].protect(0, features())
    assert "values=secret" in repr(secret)
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(secret)


def test_masks_show_nothing_and_cannot_be_pickled() -> None:
    of_group = masks(blocks=2)
    assert repr(of_group) == "Masks(left=2, values=secret)"
    mask = of_group.take(0)
    assert repr(mask) == "Mask(values=secret)"
    for kept in (of_group, mask):
        with pytest.raises(TypeError, match="secret"):
            pickle.dumps(kept)
    of_group.wipe()
    with pytest.raises(ConfigError, match="was used"):
        of_group.take(1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_sigma_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        Bounded(sigma)
    with pytest.raises(ConfigError, match="sigma"):
        Split(sigma, masks())


def test_bits_are_those_of_the_gaussian_channel() -> None:
    assert gaussian_bits(2, 1.0) == pytest.approx(1.0)
    assert gaussian_bits(4096, 1000.0) == pytest.approx(0.00295, rel=0.01)
    assert gaussian_bits(3136, 0.3) == pytest.approx(5642, rel=0.01)


# --- what a bundle was made for -----------------------------------------------------------------


def test_a_manifest_tells_the_modes_it_was_made_for() -> None:
    assert make_manifest().modes == ("mix",)
    assert make_manifest(all_modes=True).modes == ("mix", "bounded", "split")
    assert make_manifest(mode="split", all_modes=True).modes == ("split", "bounded")
    with pytest.raises(ValueError, match="there is no 'split' entry"):
        make_manifest(mode="split")


def test_a_mode_the_bundle_was_not_made_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="was made for mix"):
        check_mode(make_manifest(), "split")
    with pytest.raises(ConfigError, match="was made for mix"):
        mode_of(make_manifest(), "bounded")
    with pytest.raises(ConfigError, match="masks"):
        mode_of(make_manifest(all_modes=True), "split")
    with pytest.raises(ConfigError, match="masks"):
        mode_of(make_manifest(all_modes=True), "mix", masks())


def test_a_coarser_wire_than_measured_is_refused() -> None:
    manifest = make_manifest(all_modes=True)
    assert wire_dtype(manifest, "split") == wire_dtype(manifest, "split", "float32") == "float32"
    assert wire_dtype(manifest, "mix") == "float16"
    assert wire_dtype(manifest, "mix", "int8") == "int8"
    for coarse in ("float16", "int8"):
        with pytest.raises(ConfigError, match="beyond the bundle's tolerance"):
            wire_dtype(manifest, "split", coarse)


def test_promises_are_in_bits_and_name_their_break() -> None:
    manifest = make_manifest(all_modes=True)
    values = sum(math.prod(block.input_shape) for block in manifest.blocks)
    split = promise(manifest, "split")
    assert split.bits_per_input == pytest.approx(gaussian_bits(values, 100.0))
    assert "operator B nothing" in split.text and "together" in split.known_break
    assert promise(manifest, "bounded").bits_per_input == pytest.approx(gaussian_bits(values, 0.5))
    mix = promise(manifest)
    assert (mix.mode, mix.bits_per_input) == ("mix", math.inf)
    assert "no bound" in mix.text and "source separation" in mix.known_break
