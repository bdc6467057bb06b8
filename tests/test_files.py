"""Files for the command line, of each kind that a bundle may take."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamix.bundle import ImagePreprocessing
from datamix.errors import ConfigError
from edge.data.speech_commands import SPEECH_COMMANDS_PREPROCESSING as SPEECH
from edge.files import read_inputs

GREY = ImagePreprocessing(kind="image", input_shape=(1, 8, 6), mean=(0.0,), std=(1.0,))
COLOUR = ImagePreprocessing(kind="image", input_shape=(3, 8, 6), mean=(0.0,) * 3, std=(1.0,) * 3)


def write_wav(path: Path, samples: npt.NDArray[np.int16], rate: int = 16_000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_pictures_and_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    np.save(tmp_path / "two.npy", np.stack([pixels, pixels[::-1]]))
    names, inputs = read_inputs([tmp_path / "one.png", tmp_path / "two.npy"], GREY)
    assert [Path(name).name for name in names] == ["one.png", "two.npy[0]", "two.npy[1]"]
    np.testing.assert_array_equal(inputs[:, 0], [pixels, pixels, pixels[::-1]])
    _, coloured = read_inputs([tmp_path / "one.png"], COLOUR)
    np.testing.assert_array_equal(coloured[0], [pixels] * 3)
    assert read_inputs([], GREY)[1].shape == (0, 1, 8, 6)


def test_sound(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(-3000, 3000, 16_000).astype(np.int16)
    paths = [write_wav(tmp_path / "a.wav", clip), write_wav(tmp_path / "b.wav", clip[:700])]
    np.save(tmp_path / "c.npy", clip)
    names, inputs = read_inputs([*paths, tmp_path / "c.npy"], SPEECH)
    assert [Path(name).name for name in names] == ["a.wav", "b.wav", "c.npy"]
    assert inputs.dtype == np.int16
    np.testing.assert_array_equal(inputs, [clip, np.pad(clip[:700], (0, 15_300)), clip])


def test_sound_that_does_not_fit_gets_one_sentence(tmp_path: Path) -> None:
    clip = np.ones(16_000, np.int16)
    with pytest.raises(ConfigError, match="at 8000 Hz, expected 1 of 16 bits at 16000 Hz"):
        read_inputs([write_wav(tmp_path / "a.wav", clip, rate=8_000)], SPEECH)
    with pytest.raises(ConfigError, match="lasts 2.00 s, expected more than 0 and at most 1.00 s"):
        read_inputs([write_wav(tmp_path / "a.wav", np.tile(clip, 2))], SPEECH)
    with pytest.raises(ConfigError, match="lasts 0.00 s"):
        read_inputs([write_wav(tmp_path / "a.wav", clip[:0])], SPEECH)
    Image.new("L", (6, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no wav file that can be read"):
        read_inputs([tmp_path / "a.png"], SPEECH)
    with pytest.raises(ConfigError, match="no picture that can be read"):
        read_inputs([tmp_path / "a.wav"], GREY)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros(16_000), "holds float64, expected int16"),
        (np.zeros(15_999, np.int16), r"has shape \(15999,\), expected \(n, 16000\)"),
        (np.zeros((1, 1, 16_000), np.int16), r"expected \(n, 16000\)"),
        (np.zeros((), np.int16), r"has shape \(\), expected \(n, 16000\)"),
        (np.array([{}]), "no array that numpy can load"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, array: npt.NDArray[Any], sentence: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ConfigError, match=sentence):
        read_inputs([tmp_path / "x.npy"], SPEECH)
