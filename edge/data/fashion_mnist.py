"""Data sets: Fashion-MNIST from its original files, and the sample that ships with the package.

Fashion-MNIST: Xiao, Rasul and Vollgraf, arXiv:1708.07747, MIT licence, (c) 2017 Zalando SE.
Nothing is downloaded here: the files are the user's to fetch.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from datamix.bundle import Preprocessing
from datamix.errors import ConfigError

Split = Literal["train", "test"]
VARIABLE = "DATAMIX_DATA"

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and deviation of the training pixels, in 0..1.
FASHION_MNIST_PREPROCESSING = Preprocessing(
    kind="image", input_shape=(1, 28, 28), mean=(0.2860,), std=(0.3530,)
)

_STEMS: Mapping[Split, str] = {"train": "train", "test": "t10k"}
_LAYOUT = ", ".join(
    f"{stem}-{kind}-ubyte.gz" for stem in _STEMS.values() for kind in ("images-idx3", "labels-idx1")
)
_SAMPLE = Path(__file__).parent / "samples" / "fashion-mnist-1000.npz"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Labelled images.

    Attributes:
        name: of the data set.
        inputs: raw, as a device gets them: images are (n, C, H, W) uint8.
        labels: (n,) int64, indices into ``class_names``.
        class_names: one per class.
        preprocessing: the normalisation that fits these images.
    """

    name: str
    inputs: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        if len(self.inputs) != len(self.labels) or not len(self.labels):
            raise ConfigError(
                f"{self.name}: {len(self.inputs)} images and {len(self.labels)} labels,"
                " expected as many of both, at least one"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise ConfigError(f"{self.name}: a label is outside 0..{len(self.class_names) - 1}")

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)


def load_dataset(name: str, split: Split, directory: str | Path | None = None) -> Dataset:
    """Load a data set by name; only ``fashion-mnist`` is known.

    Args:
        name: ``fashion-mnist``.
        split: the original one.
        directory: holds the four ``.gz`` files, or a folder ``fashion-mnist`` that does; by default
            what the environment variable ``DATAMIX_DATA`` says.

    Raises:
        ConfigError: an unknown name, no directory, a missing or broken file.
    """
    if name != "fashion-mnist":
        raise ConfigError(f"data set is {name!r}, expected 'fashion-mnist'")
    folder = _folder(directory)
    stem = _STEMS[split]
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape[1:] != (28, 28):
        raise ConfigError(f"images are {images.shape[1:]}, expected (28, 28)")
    return _fashion_mnist(images, labels)


def load_sample() -> Dataset:
    """The first 1,000 test images of Fashion-MNIST, shipped with the package (MIT licence)."""
    with np.load(_SAMPLE, allow_pickle=False) as arrays:
        return _fashion_mnist(arrays["images"], arrays["labels"])


def _fashion_mnist(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Dataset:
    return Dataset(
        "fashion-mnist",
        images[:, None],
        labels.astype(np.int64),
        FASHION_MNIST_CLASSES,
        FASHION_MNIST_PREPROCESSING,
    )


def _folder(directory: str | Path | None) -> Path:
    chosen = directory or os.environ.get(VARIABLE)
    if not chosen:
        raise ConfigError(
            f"no data directory: pass --data DIR or set {VARIABLE}; it needs {_LAYOUT}"
        )
    inner = Path(chosen) / "fashion-mnist"
    return inner if inner.is_dir() else Path(chosen)


def _read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of uint8: 00 00 08 D, then D big-endian sizes, then the values."""
    header_bytes = 4 + 4 * dimensions
    try:
        with gzip.open(path) as stream:
            header = stream.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes((0, 0, 8, dimensions)):
                raise ConfigError(f"{path.name} is no idx file of {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            count = int(np.prod(shape, dtype=object))
            if count > 1 << 30:
                raise ConfigError(f"{path.name} declares {count} bytes, expected at most 2^30")
            body = stream.read(count + 1)
    except FileNotFoundError:
        raise ConfigError(f"no {path.name} in {path.parent}; expected {_LAYOUT}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from None
    if len(body) != count:
        raise ConfigError(f"{path.name} holds another number of values than its header says")
    return np.frombuffer(body, np.uint8).reshape(shape)
