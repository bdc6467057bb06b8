"""Speech Commands: ten words and ``_unknown_``, from the published folders or as parquet.

Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", arXiv:1804.03209,
CC BY 4.0, (c) Google.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.preprocessing import LogMelPreprocessing
from edge.data.dataset import Array, Dataset, Inputs, Split
from edge.data.folder import find_folder, missing, read_lines
from edge.data.wav import Clips

NAME = "speech-commands"
SPEECH_COMMANDS_CLASSES = (
    "yes",
    "no",
    "up",
    "down",
    "left",
    "right",
    "on",
    "off",
    "stop",
    "go",
    "_unknown_",
)
SAMPLE_RATE = 16_000
SAMPLES = 16_000
# Frames of 32 ms, one each 16 ms. Mean and deviation are those of the parquet's training clips.
SPEECH_COMMANDS_PREPROCESSING = LogMelPreprocessing(
    kind="log-mel",
    sample_rate=SAMPLE_RATE,
    samples=SAMPLES,
    n_fft=512,
    hop=256,
    n_mels=40,
    low_hz=20.0,
    high_hz=7_600.0,
    offset=1e-6,
    input_shape=(1, 40, 61),
    mean=(-6.226,),
    std=(4.728,),
)

_UNKNOWN_SHARE = 0.1  # of the ten words' clips, as in the paper's own training code
_PARQUET = "speech-commands-v002-testset.parquet"
_LISTS: dict[Split, str] = {"val": "validation_list.txt", "test": "testing_list.txt"}
_LAYOUT = (
    "WORD/SPEAKER_nohash_N.wav for each word with validation_list.txt and testing_list.txt,"
    f" or {_PARQUET}"
)


def load(split: Split, directory: str | Path | None) -> Dataset:
    """The split of the list files, or that of the parquet's column ``split``.

    Raises:
        ConfigError: a missing or broken file.
    """
    folder = find_folder(NAME, directory, _LAYOUT)
    parquet = folder / _PARQUET
    if parquet.is_file():
        return _load_parquet(split, parquet)
    return _load_folder(split, folder)


def speech_commands(
    inputs: Inputs, labels: npt.NDArray[np.generic], *, speaker: Array, word: Array
) -> Dataset:
    """Clips (n, 16000) int16 and labels (n,) as a data set."""
    return Dataset(
        NAME,
        inputs,
        labels.astype(np.int64),
        SPEECH_COMMANDS_CLASSES,
        SPEECH_COMMANDS_PREPROCESSING,
        {"speaker": speaker, "word": word},
    )


# ------------------------------------------------------------------ parquet


def _load_parquet(split: Split, path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.compute

    from edge.data.parquet import read_columns

    columns = {
        "pcm": pa.list_(pa.field("element", pa.int16())),
        "label": pa.int8(),
        "word": pa.string(),
        "speaker": pa.string(),
        "sample_rate": pa.int32(),
        "split": pa.string(),
    }
    table = read_columns(path, columns)
    table = table.filter(pyarrow.compute.equal(table["split"], split)).combine_chunks()
    if not len(table):
        raise ConfigError(f"{path} has no clip of {split}, expected at least one")
    rates = set(table["sample_rate"].to_pylist())
    if not rates <= {SAMPLE_RATE}:
        raise ConfigError(f"{path} has clips at {sorted(rates)} Hz, expected {SAMPLE_RATE}")
    lengths = set(pyarrow.compute.list_value_length(table["pcm"]).to_pylist())
    if lengths != {SAMPLES}:
        raise ConfigError(
            f"{path} has {split} clips of {sorted(lengths)} samples, expected {SAMPLES}"
        )
    flat = pyarrow.compute.list_flatten(table["pcm"]).combine_chunks()
    if flat.null_count:
        raise ConfigError(f"{path}: column 'pcm' holds nulls, expected none")
    return speech_commands(
        flat.to_numpy(zero_copy_only=False).reshape(-1, SAMPLES),
        table["label"].to_numpy(),
        speaker=np.array(table["speaker"].to_pylist()),
        word=np.array(table["word"].to_pylist()),
    )


# ------------------------------------------------------------------ folders


def _load_folder(split: Split, folder: Path) -> Dataset:
    """Clips of the ten words, and so many of all other words that they are a tenth of those."""
    words = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
    if not set(words) >= set(SPEECH_COMMANDS_CLASSES[:-1]):
        lacking = sorted(set(SPEECH_COMMANDS_CLASSES[:-1]) - set(words))
        raise missing(f"folder {lacking[0]}", folder, _LAYOUT)
    there = {
        f"{word}/{path.name}" for word in words for path in sorted((folder / word).glob("*.wav"))
    }
    listed = {part: _listed(folder / file, there) for part, file in _LISTS.items()}
    if both := sorted(listed["val"] & listed["test"]):
        raise ConfigError(f"{both[0]} is in both {_LISTS['val']} and {_LISTS['test']}")
    names = listed.get(split, there - listed["val"] - listed["test"])
    known = {name for name in names if name.split("/")[0] in SPEECH_COMMANDS_CLASSES}
    # By a hash, so that it is the same choice everywhere, and of all words.
    others = sorted(names - known, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = sorted([*known, *others[: math.ceil(_UNKNOWN_SHARE * len(known))]])
    spoken = [name.split("/")[0] for name in chosen]
    unknown = len(SPEECH_COMMANDS_CLASSES) - 1
    numbers = {word: number for number, word in enumerate(SPEECH_COMMANDS_CLASSES)}
    return speech_commands(
        Clips([folder / name for name in chosen], SAMPLES, SAMPLE_RATE),
        np.array([numbers.get(word, unknown) for word in spoken], np.int64),
        speaker=np.array([name.split("/")[1].split("_nohash_")[0] for name in chosen]),
        word=np.array(spoken),
    )


def _listed(path: Path, there: set[str]) -> set[str]:
    """The clips that a list names, each of which must be there."""
    names = set(read_lines(path, _LAYOUT))
    if absent := sorted(names - there):
        raise ConfigError(f"{path.name} names {absent[0]}, which is not in {path.parent}")
    return names
