"""CIFAR-10 and CIFAR-100: the binary and the Python version, and CIFAR-10 as parquet of JPEGs.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto, 2009.
No licence is stated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing
from edge.data.dataset import Dataset, Split
from edge.data.folder import find_folder, missing
from edge.data.pickled import read_pickle

Bytes = npt.NDArray[np.uint8]
Part = tuple[Bytes, npt.NDArray[np.int64], Mapping[str, npt.NDArray[np.int64]]]

_SHAPE = (3, 32, 32)
_VALUES = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Cifar:
    """One of the two sets.

    Attributes:
        name: of the data set.
        class_names: in the order of the labels.
        mean: of the training pixels per channel, in 0..1.
        std: their deviation.
        label_names: what precedes the pixels, one byte each, in the binary version; by their keys
            in the Python version. The last one is the class.
        binary: folder and files of each split in the binary version.
        pickled: the same in the Python version.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_names: tuple[str, ...]
    binary: tuple[str, Mapping[Split, Sequence[str]]]
    pickled: tuple[str, Mapping[Split, Sequence[str]]]

    @property
    def layout(self) -> str:
        """The files that are looked for, for an error."""
        versions = (
            f"{folder}/{{{','.join([*files['train'], *files['test']])}}}"
            for folder, files in (self.binary, self.pickled)
        )
        parquet = f"{self.name}-{{train,test}}.parquet (image: JPEG bytes, label: int8)"
        return " or ".join((*versions, parquet))

    def load(self, split: Split, directory: str | Path | None) -> Dataset:
        """The original split, from the first version that is there.

        Raises:
            ConfigError: a missing or broken file.
        """
        folder = find_folder(self.name, directory, self.layout)
        images, labels, attributes = self._read(split, folder)
        preprocessing = ImagePreprocessing(
            kind="image", input_shape=_SHAPE, mean=self.mean, std=self.std
        )
        return Dataset(self.name, images, labels, self.class_names, preprocessing, attributes)

    def _read(self, split: Split, folder: Path) -> Part:
        readers: tuple[tuple[tuple[str, Mapping[Split, Sequence[str]]], Any], ...] = (
            (self.binary, self._read_binary),
            (self.pickled, self._read_pickled),
        )
        for (inner, files), read in readers:
            # The folder that the archive unpacks to, or that very folder named by the user.
            place = folder / inner if (folder / inner).is_dir() else folder
            paths = [place / file for file in files[split]]
            if any(path.is_file() for path in paths):
                return self._read_parts(paths, read)
        parquet = folder / f"{self.name}-{split}.parquet"
        if parquet.is_file():
            return self._read_parquet(parquet)
        raise missing(f"{self.name} files", folder, self.layout)

    def _read_parts(self, paths: Sequence[Path], read: Callable[[Path], Part]) -> Part:
        for path in paths:
            if not path.is_file():
                raise missing(path.name, path.parent, self.layout)
        images, labels, attributes = zip(*map(read, paths), strict=True)
        return (
            np.concatenate(images),
            np.concatenate(labels),
            {key: np.concatenate([part[key] for part in attributes]) for key in attributes[0]},
        )

    def _read_binary(self, path: Path) -> Part:
        """Records of a byte per label, then 3,072 of pixels: red, green, blue, each by rows."""
        record = len(self.label_names) + _VALUES
        body = np.fromfile(path, np.uint8)
        if not len(body) or len(body) % record:
            raise ConfigError(f"{path} has {len(body)} bytes, expected a multiple of {record}")
        records = body.reshape(-1, record)
        labels, pixels = np.split(records, [len(self.label_names)], axis=1)
        return self._part(pixels, labels.astype(np.int64).T)

    def _read_pickled(self, path: Path) -> Part:
        found = read_pickle(path)
        pixels = found.get("data")
        if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (_VALUES,):
            raise ConfigError(f"{path} has no array 'data' of (n, {_VALUES}) uint8")
        labels = np.empty((len(self.label_names), len(pixels)), np.int64)
        for row, name in zip(labels, self.label_names, strict=True):
            values = found.get(name)
            if not isinstance(values, list) or len(values) != len(pixels):
                raise ConfigError(f"{path} has no list {name!r} of {len(pixels)} labels")
            if not all(type(value) is int and 0 <= value < 256 for value in values):
                raise ConfigError(f"{path}: {name!r} holds something else than labels")
            row[:] = values
        return self._part(pixels, labels)

    def _part(self, pixels: Bytes, labels: npt.NDArray[np.int64]) -> Part:
        attributes = dict(zip(self.label_names[:-1], labels[:-1], strict=True))
        return pixels.reshape(-1, *_SHAPE), labels[-1], attributes

    def _read_parquet(self, path: Path) -> Part:
        import pyarrow as pa

        from edge.data.parquet import read_columns
        from edge.data.pictures import decode

        table = read_columns(path, {"image": pa.binary(), "label": pa.int8()})
        images = decode(table["image"].to_pylist(), _SHAPE[1:])
        return np.ascontiguousarray(images), table["label"].to_numpy().astype(np.int64), {}


CIFAR10 = Cifar(
    name="cifar10",
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    label_names=("labels",),
    binary=(
        "cifar-10-batches-bin",
        {
            "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
            "test": ["test_batch.bin"],
        },
    ),
    pickled=(
        "cifar-10-batches-py",
        {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    ),
)

# fmt: off
_CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup",
    "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house",
    "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
    "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy",
    "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal",
    "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar",
    "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman",
    "worm",
)
# fmt: on

CIFAR100 = Cifar(
    name="cifar100",
    class_names=_CIFAR100_CLASSES,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    label_names=("coarse_labels", "fine_labels"),
    binary=("cifar-100-binary", {"train": ["train.bin"], "test": ["test.bin"]}),
    pickled=("cifar-100-python", {"train": ["train"], "test": ["test"]}),
)
