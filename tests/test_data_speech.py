"""Speech Commands in its two forms, on clips of noise, whole and broken."""

import hashlib
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest

from datamix.errors import ConfigError
from edge.data import load_dataset, load_sample
from edge.data.speech_commands import SPEECH_COMMANDS_CLASSES
from edge.data.wav import read_wav
from edge.preprocess import preprocessor

Samples = npt.NDArray[np.int16]
PARQUET = "speech-commands-v002-testset.parquet"


def noise(seed: int, n: int = 16_000) -> Samples:
    return np.random.default_rng(seed).integers(-3000, 3000, n).astype(np.int16)


def write_wav(
    path: Path, samples: Samples, rate: int = 16_000, channels: int = 1, width: int = 2
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Per word, clips of three speakers: one of training, one of validation, one of test."""
    for number, word in enumerate((*SPEECH_COMMANDS_CLASSES[:-1], "bed", "cat")):
        for part, speaker in enumerate(("aa", "bb", "cc")):
            write_wav(tmp_path / word / f"{speaker}_nohash_0.wav", noise(3 * number + part))
    write_wav(tmp_path / "_background_noise_" / "pink.wav", noise(99, 32_000))
    words = [path.name for path in tmp_path.iterdir() if not path.name.startswith("_")]
    for file, speaker in (("validation_list.txt", "bb"), ("testing_list.txt", "cc")):
        (tmp_path / file).write_text("".join(f"{word}/{speaker}_nohash_0.wav\n" for word in words))
    return tmp_path


def test_the_published_folders(folders: Path) -> None:
    for part, (split, speaker) in enumerate((("train", "aa"), ("val", "bb"), ("test", "cc"))):
        data = load_dataset("speech-commands", split, folders)  # type: ignore[arg-type]
        # Ten words, and a tenth as many of the two others: one clip.
        assert sorted(data.labels.tolist()) == list(range(11))
        assert set(data.attributes["speaker"]) == {speaker}
        for row, label in enumerate(data.labels.tolist()):
            word = data.attributes["word"][row]
            number = label if label < 10 else 10 + ["bed", "cat"].index(word)
            assert label == 10 or SPEECH_COMMANDS_CLASSES[label] == word
            np.testing.assert_array_equal(
                data.inputs[np.array([row])], noise(3 * number + part)[None]
            )
        assert data.inputs[:].shape == (11, 16_000) and data.inputs[:].dtype == np.int16


def test_short_clips_end_in_silence_and_long_ones_are_cut(folders: Path) -> None:
    write_wav(folders / "yes/cc_nohash_0.wav", noise(1, 9_000))
    write_wav(folders / "no/cc_nohash_0.wav", noise(2, 20_000))
    data = load_dataset("speech-commands", "test", folders)
    yes, no = (data.inputs[np.flatnonzero(data.labels == label)][0] for label in (0, 1))
    np.testing.assert_array_equal(yes, np.pad(noise(1, 9_000), (0, 7_000)))
    np.testing.assert_array_equal(no, noise(2, 20_000)[:16_000])


def test_lists_and_folders_that_do_not_fit(folders: Path) -> None:
    listing = folders / "testing_list.txt"
    whole = listing.read_text()
    for line in ("yes/dd_nohash_0.wav", "../secret.wav", "yes/../no/cc_nohash_0.wav"):
        listing.write_text(whole + line + "\n")
        with pytest.raises(ConfigError, match=f"testing_list.txt names {line}, which is not in"):
            load_dataset("speech-commands", "train", folders)
    listing.write_text(whole + "yes/bb_nohash_0.wav\n")
    with pytest.raises(ConfigError, match="yes/bb_nohash_0.wav is in both"):
        load_dataset("speech-commands", "train", folders)
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="testing_list.txt cannot be read"):
        load_dataset("speech-commands", "train", folders)
    listing.unlink()
    with pytest.raises(ConfigError, match="no testing_list.txt in .*; expected WORD/SPEAKER_noh"):
        load_dataset("speech-commands", "train", folders)
    (folders / "go").rename(folders / "walk")
    with pytest.raises(ConfigError, match="no folder go in .*; expected WORD/SPEAKER_nohash_N.wav"):
        load_dataset("speech-commands", "train", folders)


def test_a_wav_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    for kind, found in (
        ({"rate": 8_000}, "1 channels of 16 bits at 8000 Hz"),
        ({"channels": 2}, "2 channels of 16 bits at 16000 Hz"),
        ({"width": 1}, "1 channels of 8 bits at 16000 Hz"),
    ):
        write_wav(path, noise(0), **kind)
        with pytest.raises(ConfigError, match=f"{found}, expected 1 of 16 bits at 16000 Hz"):
            read_wav(path, 16_000)
    write_wav(path, noise(0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ConfigError, match="is cut off: 15500 of 16000 samples"):
        read_wav(path, 16_000)
    for body in (b"", b"RIFF", whole[:30], b"RIFF" + bytes(200)):
        path.write_bytes(body)
        with pytest.raises(ConfigError, match="no wav file that can be read"):
            read_wav(path, 16_000)
    path.unlink()
    with pytest.raises(ConfigError, match="x.wav is not there"):
        read_wav(path, 16_000)


def write_parquet(path: Path, **columns: Any) -> None:
    whole = {
        "pcm": pa.array([noise(i) for i in range(4)], pa.list_(pa.int16())),
        "label": pa.array([0, 10, 3, 9], pa.int8()),
        "word": ["yes", "bed", "down", "go"],
        "speaker": ["a", "b", "c", "d"],
        "sample_rate": pa.array([16_000] * 4, pa.int32()),
        "split": ["train", "test", "train", "val"],
    } | columns
    pyarrow.parquet.write_table(
        pa.table({key: value for key, value in whole.items() if value is not None}), path
    )


def test_the_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / PARQUET)
    data = load_dataset("speech-commands", "train", tmp_path)
    np.testing.assert_array_equal(data.inputs[:], [noise(0), noise(2)])
    assert data.labels.tolist() == [0, 3]
    assert data.attributes["speaker"].tolist() == ["a", "c"]
    assert load_dataset("speech-commands", "test", tmp_path).labels.tolist() == [10]
    assert load_dataset("speech-commands", "val", tmp_path).labels.tolist() == [9]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"speaker": None}, "no column 'speaker'"),
        ({"pcm": [[1.0]] * 4}, "column 'pcm' is list<.*double>, expected list<.*int16>"),
        ({"pcm": pa.array([[1, 2]] * 4, pa.list_(pa.int16()))}, r"clips of \[2\] samples"),
        (
            {"pcm": pa.array([[None] * 16_000] * 4, pa.list_(pa.int16()))},
            "column 'pcm' holds nulls",
        ),
        ({"pcm": pa.array([None] * 4, pa.list_(pa.int16()))}, "column 'pcm' holds nulls"),
        ({"sample_rate": pa.array([8_000] * 4, pa.int32())}, r"clips at \[8000\] Hz"),
        ({"split": ["test"] * 4}, "no clip of train"),
        ({"label": pa.array([11] * 4, pa.int8())}, "outside 0..10"),
    ],
)
def test_a_broken_parquet_gets_one_sentence(
    tmp_path: Path, columns: dict[str, Any], sentence: str
) -> None:
    write_parquet(tmp_path / PARQUET, **columns)
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("speech-commands", "train", tmp_path)


def test_the_shipped_sample() -> None:
    sample = load_sample("speech-commands")
    clips = sample.inputs[:]
    assert clips.shape == (176, 16_000) and clips.dtype == np.int16
    assert np.bincount(sample.labels).tolist() == [16] * 11
    words = sample.attributes["word"]
    for word, label in zip(words, sample.labels.tolist(), strict=True):
        assert (SPEECH_COMMANDS_CLASSES.index(word) if label < 10 else 10) == label
    # The test split by speaker, and the stated normalisation fits.
    hashes = {int(hashlib.sha256(s.encode()).hexdigest(), 16) for s in sample.attributes["speaker"]}
    assert max(h % 100 for h in hashes) < 20
    features = preprocessor(sample.preprocessing)(clips)
    assert abs(float(features.mean())) < 0.1
    assert abs(float(features.std()) - 1) < 0.1
