"""From log-mel features back to something to listen to; phases are guessed.

Griffin and Lim, "Signal estimation from modified short-time Fourier transform", IEEE TASSP 32(2),
1984: from the magnitudes, phases are made consistent by going to the waveform and back.
"""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.bundle import LogMelPreprocessing
from datamix.errors import ConfigError
from edge.preprocess import frame_window, mel_filters

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

_STEPS = 30
_NONNEGATIVE_STEPS = 60


def listen(preprocessing: LogMelPreprocessing, features: Array, *, steps: int = _STEPS) -> Doubles:
    """A clip (samples,) from -1 to 1 that has nearly these features.

    Args:
        preprocessing: the bundle's.
        features: (1, n_mels, frames), as the stem takes them.
        steps: of Griffin and Lim.

    Raises:
        ConfigError: features of another shape.
    """
    if features.shape != preprocessing.input_shape:
        raise ConfigError(
            f"features have shape {features.shape}, expected {preprocessing.input_shape}"
        )
    levels = features[0].T * preprocessing.std[0] + preprocessing.mean[0]
    power = np.maximum(np.exp(np.minimum(levels.astype(np.float64), 60)) - preprocessing.offset, 0)
    magnitude = np.sqrt(_spectrum(power, mel_filters(preprocessing).astype(np.float64)))
    window = frame_window(preprocessing.n_fft).astype(np.float64)
    rng = np.random.default_rng(0)
    phase = np.exp(2j * np.pi * rng.random(magnitude.shape))
    clip = _overlap(magnitude * phase, window, preprocessing)
    for _ in range(steps):
        frames = np.lib.stride_tricks.sliding_window_view(clip, len(window))[:: preprocessing.hop]
        spectrum = np.fft.rfft(frames[: len(magnitude)] * window)
        phase = spectrum / np.maximum(np.abs(spectrum), 1e-12)
        clip = _overlap(magnitude * phase, window, preprocessing)
    return clip


def wav_bytes(clip: Array, sample_rate: int) -> bytes:
    """A clip (samples,) as a WAV file of 16 bits, one channel; its loudest sample is full scale.

    Silence stays silence.
    """
    loudest = float(np.abs(clip).max(initial=0)) or 1.0
    samples = np.rint(np.asarray(clip, np.float64) / loudest * 32_767).astype("<i2")
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


def _spectrum(power: Doubles, filters: Doubles) -> Doubles:
    """(frames, bins) power that the filters would have made this of, none of it negative.

    Multiplicative updates (Lee and Seung, NIPS 2000) keep what is positive positive.
    """
    shares = filters / np.maximum(filters.sum(axis=1, keepdims=True), 1e-12)
    found: Doubles = power @ shares + 1e-12
    for _ in range(_NONNEGATIVE_STEPS):
        found *= (power @ filters) / np.maximum(found @ filters.T @ filters, 1e-12)
    return found


def _overlap(spectrum: Array, window: Doubles, preprocessing: LogMelPreprocessing) -> Doubles:
    """The clip whose frames are nearest to these, in squares."""
    frames = np.fft.irfft(spectrum, preprocessing.n_fft) * window
    clip, weight = np.zeros(preprocessing.samples), np.zeros(preprocessing.samples)
    for index, frame in enumerate(frames):
        place = slice(index * preprocessing.hop, index * preprocessing.hop + preprocessing.n_fft)
        clip[place] += frame
        weight[place] += window**2
    found: Doubles = clip / np.maximum(weight, 1e-3)
    return found
