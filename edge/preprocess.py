"""From raw inputs to what the stem takes, on numpy alone: a device needs no torch for it.

    image     (pixel / 255 - mean) / std, per channel
    log-mel   frames -> periodic Hann window -> |rfft|^2 -> mel filters -> log(. + offset)
              -> (. - mean) / std

Mel filters are triangles over frequency with peak 1, their corners evenly spaced on the HTK scale
``2595 log10(1 + hz / 700)``: torchaudio's ``melscale_fbanks(norm=None, mel_scale="htk")``. Audio
counts from -1 to 1. This file is the formula's only home; :mod:`edge.logmel` takes window and
filters from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing, LogMelPreprocessing, Preprocessing

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FULL_SCALE = 32_768
"""What int16 samples are divided by."""
_CHUNK = 16  # clips at a time, so that their frames stay in the cache


def preprocessor(preprocessing: Preprocessing) -> Callable[[Array], Floats]:
    """Make the function that a bundle's preprocessing describes.

    Images: (n, C, H, W), uint8 in 0..255 or float32 in 0..1. Audio: (n, samples), int16, or
    float32 in -1..1. The function returns (n, *input_shape) float32, and raises ConfigError at
    another shape, type or range.

    Raises:
        ConfigError: a filter bank in which a filter has no frequency.
    """
    if isinstance(preprocessing, ImagePreprocessing):
        return _image(preprocessing)
    return _log_mel(preprocessing)


def frame_window(n_fft: int) -> Floats:
    """(n_fft,) periodic Hann window."""
    phase = 2 * np.pi * np.arange(n_fft) / n_fft
    window: Floats = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
    return window


def mel_filters(preprocessing: LogMelPreprocessing) -> Floats:
    """(n_mels, n_fft // 2 + 1) weights of the spectrum's bins in each filter.

    Raises:
        ConfigError: a filter falls between two bins: too many of them, or too short a frame.
    """
    bins = np.arange(preprocessing.n_fft // 2 + 1) * preprocessing.sample_rate / preprocessing.n_fft
    ends = _mel(np.array([preprocessing.low_hz, preprocessing.high_hz]))
    corners = _hz(np.linspace(ends[0], ends[1], preprocessing.n_mels + 2))
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - left) / (peak - left), (right - bins) / (right - peak)
    filters = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    if not filters.any(axis=1).all():
        raise ConfigError(
            f"{preprocessing.n_mels} mel filters are too many for frames of {preprocessing.n_fft}"
            " samples, expected each to hold a frequency of the spectrum"
        )
    return filters


def _mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 2595 * np.log10(1 + hz / 700)


def _hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 700 * (10 ** (mel / 2595) - 1)


def _image(preprocessing: ImagePreprocessing) -> Callable[[Array], Floats]:
    mean = np.asarray(preprocessing.mean, np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, np.float32)[:, None, None]

    def normalise(raw: Array) -> Floats:
        pixels = _scaled(raw, preprocessing.raw_shape, np.dtype(np.uint8), 255, low=0)
        return np.asarray((pixels - mean) / std, np.float32)

    return normalise


def _log_mel(preprocessing: LogMelPreprocessing) -> Callable[[Array], Floats]:
    n_fft, hop = preprocessing.n_fft, preprocessing.hop
    window, filters = frame_window(n_fft), mel_filters(preprocessing).T.copy()
    offset = np.float32(preprocessing.offset)
    mean, std = np.float32(preprocessing.mean[0]), np.float32(preprocessing.std[0])

    def some(waves: Floats) -> Floats:
        frames = np.lib.stride_tricks.sliding_window_view(waves, n_fft, axis=1)[:, ::hop]
        spectrum = np.fft.rfft(frames * window)
        power = spectrum.real**2 + spectrum.imag**2
        # One product for all clips, or each would wake the BLAS's threads anew.
        levels: Floats = np.log(power.reshape(-1, power.shape[-1]) @ filters + offset)
        return levels.reshape(len(waves), -1, levels.shape[1])

    def transform(raw: Array) -> Floats:
        waves = _scaled(raw, preprocessing.raw_shape, np.dtype(np.int16), FULL_SCALE, low=-1)
        features = np.empty((len(waves), *preprocessing.input_shape), np.float32)
        for start in range(0, len(waves), _CHUNK):
            part = slice(start, start + _CHUNK)
            features[part, 0] = some(waves[part]).transpose(0, 2, 1)
        features -= mean
        features /= std
        return features

    return transform


def _scaled(
    raw: Array, shape: tuple[int, ...], integer: np.dtype[Any], full_scale: int, *, low: int
) -> Floats:
    """Check raw inputs and bring them to float32 in ``low``..1."""
    if raw.shape[1:] != shape or raw.ndim != len(shape) + 1:
        raise ConfigError(f"inputs have shape {raw.shape}, expected {('n', *shape)}")
    if raw.dtype == integer:
        return np.asarray(raw.astype(np.float32) / np.float32(full_scale), np.float32)
    if raw.dtype == np.float32:
        if raw.size and not (raw.min() >= low and raw.max() <= 1):  # NaN fails both
            raise ConfigError(f"float32 inputs hold values outside {low}..1")
        return raw
    raise ConfigError(f"inputs have dtype {raw.dtype}, expected {integer} or float32")
