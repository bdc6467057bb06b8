"""Training inputs, varied: pure functions of a batch, a generator and what to do.

Images stay uint8 and audio stays int16, so that whatever comes next sees what a device would see.
Masks are for log-mel features, after preprocessing (SpecAugment: Park et al., arXiv:1904.08779).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.preprocess import FULL_SCALE

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may happen to an input; the defaults leave it as it is.

    Attributes:
        shift: images are moved by up to so many pixels each way.
        padding: what comes in from beyond the border.
        flip: half of the images are mirrored.
        cutout: side of a square in each image that takes the batch's mean colour, in pixels; its
            centre may be anywhere, so part of it may lie outside.
        time_shift_ms: clips are moved by up to so many milliseconds each way, silence comes in.
        noise: largest deviation of Gaussian noise, as a share of full scale; each clip draws its
            own from 0 up to this.
        gain_db: clips become louder or softer by up to so many decibels; what leaves int16 is cut.
        mask_mels: up to so many neighbouring filters are masked in each clip's features.
        mask_frames: up to so many neighbouring frames are.
        sample_rate: of the audio, per second.
    """

    shift: int = 0
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    cutout: int = 0
    time_shift_ms: float = 0
    noise: float = 0
    gain_db: float = 0
    mask_mels: int = 0
    mask_frames: int = 0
    sample_rate: int = 16_000

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for key in ("shift", "cutout", "time_shift_ms", "noise", "gain_db", "mask_mels"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} is {getattr(self, key)}, expected at least 0")
        if self.mask_frames < 0 or self.sample_rate < 1:
            raise ConfigError(
                f"mask_frames is {self.mask_frames} and sample_rate {self.sample_rate},"
                " expected at least 0 and at least 1"
            )
        if self.padding not in ("zero", "reflect"):
            raise ConfigError(f"padding is {self.padding!r}, expected 'zero' or 'reflect'")


def augment(raw: Array, rng: np.random.Generator, how: Augmentation) -> Array:
    """Vary raw inputs: images (n, C, H, W) uint8 or audio (n, samples) int16.

    The result has the shape and type of ``raw``, which is not changed; where nothing is to be
    done it may be ``raw`` itself.

    Raises:
        ConfigError: neither images nor audio, or images too small for what is asked.
    """
    if raw.dtype == np.uint8 and raw.ndim == 4:
        images: Bytes = raw
        if how.flip:
            images = flip(images, rng)
        if how.shift:
            images = shift(images, rng, how.shift, how.padding)
        if how.cutout:
            images = cutout(images, rng, how.cutout)
        return images
    if raw.dtype == np.int16 and raw.ndim == 2:
        clips: Samples = raw
        if how.time_shift_ms:
            clips = time_shift(clips, rng, round(how.time_shift_ms * how.sample_rate / 1000))
        if how.gain_db or how.noise:
            clips = reamplify(clips, rng, how.gain_db, how.noise)
        return clips
    raise ConfigError(
        f"inputs are {raw.shape} {raw.dtype}, expected (n, C, H, W) uint8 or (n, samples) int16"
    )


def flip(images: Bytes, rng: np.random.Generator) -> Bytes:
    """Mirror half of the images."""
    mirrored = rng.random(len(images)) < 0.5
    flipped = images.copy()
    flipped[mirrored] = images[mirrored, ..., ::-1]
    return flipped


def shift(
    images: Bytes, rng: np.random.Generator, pixels: int, padding: Literal["zero", "reflect"]
) -> Bytes:
    """Move each image by up to ``pixels`` each way: a random crop of the padded one."""
    height, width = images.shape[2:]
    if padding == "reflect" and pixels >= min(height, width):
        raise ConfigError(f"shift is {pixels}, expected less than an image's {min(height, width)}")
    mode: Literal["constant", "reflect"] = "constant" if padding == "zero" else "reflect"
    padded = np.pad(images, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)), mode)
    down, right = rng.integers(0, 2 * pixels + 1, (2, len(images)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    moved: Bytes = windows[np.arange(len(images)), :, down, right]
    return moved


def cutout(images: Bytes, rng: np.random.Generator, side: int) -> Bytes:
    """Paint a square of each image with the batch's mean colour (arXiv:1708.04552)."""
    n, _, height, width = images.shape
    colour = images.mean(axis=(0, 2, 3)).round().astype(np.uint8)
    tops = rng.integers(0, height, (n,)) - side // 2
    lefts = rng.integers(0, width, (n,)) - side // 2
    painted = images.copy()
    for image, top, left in zip(painted, tops, lefts, strict=True):
        rows, columns = slice(max(0, top), top + side), slice(max(0, left), left + side)
        image[:, rows, columns] = colour[:, None, None]
    return painted


def time_shift(clips: Samples, rng: np.random.Generator, samples: int) -> Samples:
    """Move each clip by up to ``samples`` each way; silence comes in."""
    length = clips.shape[1]
    samples = min(samples, length)
    padded = np.pad(clips, ((0, 0), (samples, samples)))
    starts = rng.integers(0, 2 * samples + 1, len(clips))
    windows = np.lib.stride_tricks.sliding_window_view(padded, length, axis=1)
    moved: Samples = windows[np.arange(len(clips)), starts]
    return moved


def reamplify(clips: Samples, rng: np.random.Generator, gain_db: float, noise: float) -> Samples:
    """Change the loudness of each clip and add Gaussian noise to it.

    The clips of a batch take their noise from different places of one strip: drawing as many
    normal numbers as there are samples would take longer than all the rest.
    """
    n, length = clips.shape
    gains = np.power(10, rng.uniform(-gain_db, gain_db, (n, 1)) / 20, dtype=np.float32)
    waves = clips * gains
    if noise:
        strip = rng.standard_normal(4 * length, np.float32) * np.float32(FULL_SCALE)
        levels = rng.uniform(0, noise, (n,)).astype(np.float32)
        starts = rng.integers(0, 3 * length + 1, (n,))
        for wave, level, start in zip(waves, levels, starts.tolist(), strict=True):
            wave += level * strip[start : start + length]
    np.rint(waves, out=waves)
    np.clip(waves, -FULL_SCALE, FULL_SCALE - 1, out=waves)
    return waves.astype(np.int16)


def mask_factors(shape: tuple[int, ...], rng: np.random.Generator, how: Augmentation) -> Floats:
    """What features (n, 1, mels, frames) of ``shape`` are multiplied with: 0 masked, 1 kept.

    One band of filters and one stretch of frames per clip, each of a width drawn from 0 up to the
    largest. Normalised features have mean 0, so a mask tells nothing, not even silence.
    """
    n, _, mels, frames = shape
    kept = _band(rng, n, mels, how.mask_mels)[:, None, :, None]
    kept = kept & _band(rng, n, frames, how.mask_frames)[:, None, None, :]
    return kept.astype(np.float32)


def mask(features: Floats, rng: np.random.Generator, how: Augmentation) -> Floats:
    """Mask log-mel features (n, 1, mels, frames), preprocessed; see :func:`mask_factors`."""
    masked: Floats = features * mask_factors(features.shape, rng, how)
    return masked


def _band(rng: np.random.Generator, n: int, length: int, widest: int) -> npt.NDArray[np.bool_]:
    """(n, length): False in a band of each row."""
    widths = rng.integers(0, min(widest, length) + 1, (n, 1))
    starts = rng.integers(0, length - widths + 1)
    places = np.arange(length)
    kept: npt.NDArray[np.bool_] = (places < starts) | (places >= starts + widths)
    return kept
