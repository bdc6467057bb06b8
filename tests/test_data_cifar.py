"""CIFAR in its three forms, on files of a few pictures, whole and broken."""

import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from datamix.errors import ConfigError
from edge.data import load_dataset
from edge.data.pickled import read_pickle

Bytes = npt.NDArray[np.uint8]


def pictures(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def write_binary(folder: Path, labels: list[list[int]], names: list[str]) -> None:
    """The same three pictures in each file; one list of labels per byte before the pixels."""
    folder.mkdir()
    heads = np.array(labels, np.uint8).T
    body = np.concatenate([heads, pictures(3).reshape(3, -1)], axis=1).tobytes()
    for name in names:
        (folder / name).write_bytes(body)


def old_string(body: bytes) -> bytes:
    """A ``str`` as Python 2 pickled it."""
    return b"T" + struct.pack("<i", len(body)) + body


def old_pickle(fields: dict[str, bytes]) -> bytes:
    """A dict as Python 2 pickled it; values are given in the pickle's own code."""
    items = b"".join(old_string(key.encode()) + value for key, value in fields.items())
    return b"\x80\x02}(" + items + b"u."


def old_array(values: Bytes, dtype: bytes = b"u1", body: bytes | None = None) -> bytes:
    """An array as numpy pickled it under Python 2: the form of the published files."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + (b"U\x01b\x87R(K\x01" + b"".join(b"M" + struct.pack("<H", n) for n in values.shape))
        + (b"\x86cnumpy\ndtype\nU\x02" + dtype + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff")
        + (b"J\xff\xff\xff\xffK\x00tb\x89" + old_string(values.tobytes() if body is None else body))
        + b"tb"
    )


def old_list(values: list[int]) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_binary_version(tmp_path: Path, split: Literal["train", "test"]) -> None:
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    write_binary(tmp_path / "cifar-10-batches-bin", [[7, 0, 9]], [*train, "test_batch.bin"])
    for directory in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        data = load_dataset("cifar10", split, directory)
        times = 5 if split == "train" else 1
        np.testing.assert_array_equal(data.inputs[:], np.tile(pictures(3), (times, 1, 1, 1)))
        assert data.labels.tolist() == [7, 0, 9] * times
        assert data.class_names[7] == "horse"


def test_the_binary_version_of_cifar100(tmp_path: Path) -> None:
    write_binary(tmp_path / "cifar-100-binary", [[1, 2, 19], [4, 30, 99]], ["test.bin"])
    data = load_dataset("cifar100", "test", tmp_path)
    np.testing.assert_array_equal(data.inputs[:], pictures(3))
    assert [data.class_names[label] for label in data.labels.tolist()] == [
        "beaver",
        "dolphin",
        "worm",
    ]
    assert data.attributes["coarse_labels"].tolist() == [1, 2, 19]
    assert len(set(data.class_names)) == 100


def test_the_python_version(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    flat = pictures(3).reshape(3, -1)
    old = {"data": old_array(flat), "labels": old_list([7, 0, 9]), "batch_label": old_string(b"x")}
    (folder / "test_batch").write_bytes(old_pickle(old))
    data = load_dataset("cifar10", "test", tmp_path)
    np.testing.assert_array_equal(data.inputs[:], pictures(3))
    assert data.labels.tolist() == [7, 0, 9]
    # What Python 3 and numpy of today write, is read as well.
    new: dict[bytes, Any] = {
        b"data": flat,
        b"fine_labels": [4, 30, 99],
        b"coarse_labels": [1, 2, 3],
    }
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python/test").write_bytes(pickle.dumps(new, protocol=3))
    data = load_dataset("cifar100", "test", tmp_path)
    np.testing.assert_array_equal(data.inputs[:], pictures(3))
    assert data.labels.tolist() == [4, 30, 99]


def test_the_hand_made_pickle_is_one() -> None:
    """Or the test above would prove nothing about files of Python 2."""
    flat = pictures(2).reshape(2, -1)
    found = pickle.loads(old_pickle({"data": old_array(flat)}), encoding="bytes")
    np.testing.assert_array_equal(found[b"data"], flat)


class Touch:
    """Leaves a mark where it is unpickled by Python's own rules."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


FLAT = pictures(1).reshape(1, -1)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "no pickle of arrays and numbers"),
        (b"no pickle", "no pickle of arrays and numbers"),
        (old_pickle({"data": old_array(FLAT)})[:2000], "no pickle of arrays and numbers"),
        (pickle.dumps([1, 2]), "no pickle of arrays and numbers"),
        (pickle.dumps({"data": np.random.default_rng}, 2), r"asks for numpy.random"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.max\x93.", "it asks for numpy.ndarray.max"),
        (b"\x80\x02cevil\ndtype\n.", "it asks for evil.dtype"),
        (
            old_pickle({"data": old_array(FLAT).replace(b"K\x00tb\x89", b"K\x00tb\x88")}),
            "another type than uint8",
        ),
        (old_pickle({"data": old_array(FLAT, b"O8")}), "another type than uint8"),
        (old_pickle({"data": old_array(FLAT, body=b"short")}), "shorter or longer"),
        (old_pickle({"labels": old_list([1])}), r"no array 'data' of \(n, 3072\)"),
        (old_pickle({"data": old_array(FLAT[:, :99])}), r"no array 'data' of \(n, 3072\)"),
        (old_pickle({"data": old_array(FLAT)}), "no list 'labels' of 1"),
        (old_pickle({"data": old_array(FLAT), "labels": old_list([1, 2])}), "no list 'labels'"),
        (old_pickle({"data": old_array(FLAT), "labels": b"]Na"}), "something else than labels"),
        (old_pickle({"data": old_array(FLAT), "labels": old_list([77])}), "outside 0..9"),
    ],
)
def test_a_hostile_or_broken_pickle_does_nothing(
    tmp_path: Path, body: bytes, sentence: str
) -> None:
    (tmp_path / "test_batch").write_bytes(body)
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("cifar10", "test", tmp_path)


def test_a_pickle_that_would_act_is_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({"data": Touch(mark)}))
    with pytest.raises(ConfigError, match="it asks for posix.mkdir"):
        read_pickle(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle is harmless anyway: this test could not fail"


def jpeg(pixels: Bytes) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_parquet(path: Path, **columns: Any) -> None:
    colours = [np.full((32, 32, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 100))]
    whole = {"image": list(map(jpeg, colours)), "label": pa.array([3, 9], pa.int8())} | columns
    pyarrow.parquet.write_table(
        pa.table({key: value for key, value in whole.items() if value is not None}), path
    )


def test_the_parquet_of_jpegs(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cifar10-test.parquet")
    data = load_dataset("cifar10", "test", tmp_path)
    assert data.labels.tolist() == [3, 9]
    images = data.inputs[:].astype(int)
    assert images.shape == (2, 3, 32, 32)
    for image, colour in zip(images, ((200, 0, 0), (0, 0, 100)), strict=True):
        assert np.abs(image - np.reshape(colour, (3, 1, 1))).max() <= 2


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"label": None}, "no column 'label'"),
        ({"label": [1, 2]}, "column 'label' is int64, expected int8"),
        ({"label": pa.array([1, None], pa.int8())}, "column 'label' holds nulls"),
        ({"image": ["a", "b"]}, "column 'image' is string, expected binary"),
        ({"image": [b"", b""]}, "picture 0 is no picture"),
        (
            {
                "image": [jpeg(np.zeros((32, 32, 3), np.uint8))] * 2,
                "label": pa.array([1, 10], pa.int8()),
            },
            "outside 0..9",
        ),
        ({"image": [jpeg(np.zeros((32, 32, 3), np.uint8))[:-300]] * 2}, "no picture"),
        (
            {"image": [jpeg(np.zeros((16, 32, 3), np.uint8))] * 2},
            "picture 0 is 16x32, expected 32x32",
        ),
    ],
)
def test_a_broken_parquet_gets_one_sentence(
    tmp_path: Path, columns: dict[str, Any], sentence: str
) -> None:
    write_parquet(tmp_path / "cifar10-test.parquet", **columns)
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("cifar10", "test", tmp_path)


def test_files_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cifar10 files in .*cifar-10-batches-bin/.*parquet"):
        load_dataset("cifar10", "train", tmp_path)
    (tmp_path / "cifar10-train.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        load_dataset("cifar10", "train", tmp_path)
    names = [f"data_batch_{i}.bin" for i in range(1, 5)]
    write_binary(tmp_path / "cifar-10-batches-bin", [[1, 2, 3]], names)
    with pytest.raises(ConfigError, match="no data_batch_5.bin in"):
        load_dataset("cifar10", "train", tmp_path)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(ConfigError, match="6145 bytes, expected a multiple of 3073"):
        load_dataset("cifar10", "test", tmp_path)
