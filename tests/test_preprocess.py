"""The log-mel formula against one written out by hand, and its twin in torch."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from datamix.bundle import LogMelPreprocessing
from datamix.errors import ConfigError
from edge.data.speech_commands import SPEECH_COMMANDS_PREPROCESSING as SPEECH
from edge.logmel import LogMel
from edge.preprocess import mel_filters, preprocessor


def spec(**changes: Any) -> LogMelPreprocessing:
    fields = {
        "kind": "log-mel",
        "sample_rate": 8_000,
        "samples": 200,
        "n_fft": 64,
        "hop": 40,
        "n_mels": 5,
        "low_hz": 100.0,
        "high_hz": 4_000.0,
        "offset": 1e-5,
        "input_shape": (1, 5, 4),
        "mean": (-3.0,),
        "std": (2.0,),
    }
    return LogMelPreprocessing.model_validate(fields | changes)


def by_hand(clip: list[float], spec: LogMelPreprocessing, mel: int, frame: int) -> float:
    """One value of the features, by the definition and without numpy's transforms."""
    n, rate = spec.n_fft, spec.sample_rate
    start = frame * spec.hop
    windowed = [x * math.sin(math.pi * i / n) ** 2 for i, x in enumerate(clip[start : start + n])]
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (spec.low_hz, spec.high_hz))
    step = (high - low) / (spec.n_mels + 1)
    left, peak, right = (700 * (10 ** ((low + (mel + i) * step) / 2595) - 1) for i in range(3))
    total = 0.0
    for k in range(n // 2 + 1):
        hz = k * rate / n
        weight = max(0.0, min((hz - left) / (peak - left), (right - hz) / (right - peak)))
        value = sum(
            x * complex(math.cos(a), -math.sin(a))
            for i, x in enumerate(windowed)
            for a in [2 * math.pi * k * i / n]
        )
        total += weight * abs(value) ** 2
    return (math.log(total + spec.offset) - spec.mean[0]) / spec.std[0]


def test_log_mel_is_the_stated_formula() -> None:
    clips = np.random.default_rng(0).integers(-32_768, 32_768, (2, 200)).astype(np.int16)
    features = preprocessor(spec())(clips)
    assert features.shape == (2, 1, 5, 4) and features.dtype == np.float32
    for clip, mel, frame in ((0, 0, 0), (0, 4, 3), (1, 2, 1), (1, 3, 2)):
        expected = by_hand((clips[clip] / 32_768).tolist(), spec(), mel, frame)
        assert features[clip, 0, mel, frame] == pytest.approx(expected, abs=1e-4)


def test_a_tone_is_where_it_should_be() -> None:
    """1 kHz lies at 1000 mel, which is the HTK scale's fixed point."""
    time = np.arange(16_000) / 16_000
    tone = (10_000 * np.sin(2 * np.pi * 1000 * time)).astype(np.int16)
    features = preprocessor(SPEECH)(tone[None])
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (SPEECH.low_hz, SPEECH.high_hz))
    nearest = round((1000 - low) / (high - low) * (SPEECH.n_mels + 1)) - 1
    assert set(features[0, 0].argmax(axis=0).tolist()) == {nearest}


def test_int16_and_float32_of_full_scale_1_are_the_same() -> None:
    clips = np.random.default_rng(1).integers(-32_768, 32_768, (3, 16_000)).astype(np.int16)
    make = preprocessor(SPEECH)
    np.testing.assert_array_equal(make(clips), make((clips / 32_768).astype(np.float32)))
    # However many clips are given at once, and none.
    many = make(np.tile(clips, (30, 1)))
    np.testing.assert_allclose(many, np.tile(make(clips), (30, 1, 1, 1)), atol=1e-5)
    assert make(clips[:0]).shape == (0, 1, 40, 61)


def test_silence_is_finite() -> None:
    features = preprocessor(SPEECH)(np.zeros((1, 16_000), np.int16))
    expected = (math.log(SPEECH.offset) - SPEECH.mean[0]) / SPEECH.std[0]
    np.testing.assert_allclose(features, expected, rtol=1e-5)


@pytest.mark.parametrize("loudness", [1, 30, 3_000, 32_000])
def test_torch_gives_the_same_numbers(loudness: int) -> None:
    rng = np.random.default_rng(loudness)
    clips = rng.integers(-loudness, loudness + 1, (4, 16_000)).astype(np.int16)
    clips[0, 4_000:9_000] = 0
    expected = preprocessor(SPEECH)(clips)
    layer = LogMel(SPEECH)
    np.testing.assert_allclose(layer(torch.from_numpy(clips)).numpy(), expected, atol=1e-4)
    waves = torch.from_numpy((clips / 32_768).astype(np.float32))
    np.testing.assert_allclose(layer(waves).numpy(), expected, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(layer(waves).numpy(), expected, atol=1e-4)
    assert layer.state_dict() == {}, "the formula's constants belong into no checkpoint"


def test_torchaudio_has_the_same_filters() -> None:
    torchaudio = pytest.importorskip("torchaudio")
    bank = torchaudio.functional.melscale_fbanks(
        SPEECH.n_fft // 2 + 1, SPEECH.low_hz, SPEECH.high_hz, SPEECH.n_mels, SPEECH.sample_rate
    )
    np.testing.assert_allclose(mel_filters(SPEECH), bank.T.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (np.zeros((2, 199), np.int16), r"shape \(2, 199\), expected \('n', 200\)"),
        (np.zeros(200, np.int16), r"shape \(200,\), expected \('n', 200\)"),
        (np.zeros((2, 1, 200), np.int16), "expected"),
        (np.zeros((2, 200), np.uint8), "dtype uint8, expected int16 or float32"),
        (np.full((2, 200), -1.01, np.float32), "outside -1..1"),
        (np.full((2, 200), np.nan, np.float32), "outside -1..1"),
    ],
)
def test_odd_audio_is_refused(raw: np.ndarray[Any, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        preprocessor(spec())(raw)


def test_odd_tensors_are_refused() -> None:
    layer = LogMel(spec())
    with pytest.raises(ConfigError, match=r"shape \(2, 199\), expected \('n', 200\)"):
        layer(torch.zeros(2, 199))
    with pytest.raises(ConfigError, match=r"dtype torch.float64, expected int16 or float32"):
        layer(torch.zeros(2, 200, dtype=torch.float64))


def test_a_filter_without_a_frequency_is_refused() -> None:
    crowded = spec(n_mels=60, input_shape=(1, 60, 4))
    with pytest.raises(ConfigError, match="60 mel filters are too many for frames of 64 samples"):
        preprocessor(crowded)
