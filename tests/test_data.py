import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from datamix.errors import ConfigError
from edge.data import FASHION_MNIST_CLASSES, Dataset, load_dataset, load_sample


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, n in (("train", 7), ("t10k", 5)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_original_files_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    data = load_dataset("fashion-mnist", "train", folder)
    np.testing.assert_array_equal(data.inputs, images[:, None])
    assert data.labels.dtype == np.int64
    assert len(load_dataset("fashion-mnist", "test", folder)) == 5
    monkeypatch.setenv("DATAMIX_DATA", str(folder))
    np.testing.assert_array_equal(load_dataset("fashion-mnist", "train").labels, data.labels)
    inner = folder / "fashion-mnist"
    inner.mkdir()
    for file in folder.glob("*.gz"):
        file.rename(inner / file.name)
    assert len(load_dataset("fashion-mnist", "train", folder)) == 7


def test_the_shipped_sample() -> None:
    sample = load_sample()
    images = sample.inputs[:]
    assert images.shape == (1000, 1, 28, 28)
    assert images.dtype == np.uint8
    assert sample.class_names == FASHION_MNIST_CLASSES
    # The test split begins with an ankle boot, a pullover and two trousers.
    assert sample.labels[:4].tolist() == [9, 2, 1, 1]
    assert np.bincount(sample.labels, minlength=10).min() > 80
    # The stated normalisation fits: about zero mean, about unit deviation.
    mean, std = sample.preprocessing.mean[0], sample.preprocessing.std[0]
    pixels = (images / 255 - mean) / std
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def test_a_missing_directory_or_file_says_what_is_expected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATAMIX_DATA", raising=False)
    with pytest.raises(ConfigError, match="pass --data DIR or set DATAMIX_DATA"):
        load_dataset("fashion-mnist", "train")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match="no t10k-labels-idx1-ubyte.gz in .*; expected train-im"):
        load_dataset("fashion-mnist", "test", folder)
    with pytest.raises(ConfigError, match="no folder .*/nowhere; pass --data DIR or set"):
        load_dataset("fashion-mnist", "test", folder / "nowhere")
    with pytest.raises(ConfigError, match="data set is 'mnist', expected one of fashion-mnist, ci"):
        load_dataset("mnist", "test", folder)
    with pytest.raises(ConfigError, match="split of fashion-mnist is 'val', expected one of train"):
        load_dataset("fashion-mnist", "val", folder)


IMAGES = np.zeros((7, 28, 28), np.uint8).tobytes()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"not gzip at all", "cannot be read"),
        (gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 7, 28, 28) + IMAGES)[:-40], "read"),
        (gzip.compress(b""), "no idx file of 3 dimensions"),
        (gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 7) + bytes(7 + 8)), "3 dimensions"),
        (gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 7, 28, 28)), "another number"),
        (gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 6, 28, 28) + IMAGES), "another"),
        (gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 12), "expected at most 2"),
        (
            gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 7, 14, 56) + IMAGES),
            r"\(28, 28\)",
        ),
        (
            gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 28, 28) + bytes(784)),
            "1 inputs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_files_get_one_sentence(folder: Path, body: bytes, sentence: str) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(body)
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("fashion-mnist", "train", folder)


def test_labels_outside_the_classes_are_refused() -> None:
    sample = load_sample()
    with pytest.raises(ConfigError, match="a label is outside 0..9"):
        Dataset("x", sample.inputs, sample.labels + 1, sample.class_names, sample.preprocessing)


def test_a_data_set_of_several_labels_says_so() -> None:
    sample = load_sample()
    spec, names = sample.preprocessing, sample.class_names
    labels = np.eye(10, dtype=np.float32)[sample.labels]
    several = Dataset("x", sample.inputs, labels, names, spec)
    assert several.multilabel and not sample.multilabel
    with pytest.raises(ConfigError, match=r"labels have shape \(1000, 9\), expected \(1000, 10\)"):
        Dataset("x", sample.inputs, labels[:, 1:], names, spec)
    with pytest.raises(ConfigError, match="a label is neither 0 nor 1"):
        Dataset("x", sample.inputs, labels * np.float32(0.5), names, spec)


def test_attributes_are_one_per_input() -> None:
    sample = load_sample("speech-commands")
    with pytest.raises(ConfigError, match="175 values of 'speaker', expected 176"):
        dataclasses.replace(sample, attributes={"speaker": sample.attributes["speaker"][1:]})


def test_an_unknown_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample is 'cifar10', expected 'fashion-mnist' or"):
        load_sample("cifar10")
