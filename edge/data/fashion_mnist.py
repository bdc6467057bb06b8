"""Fashion-MNIST from its four original files.

Xiao, Rasul and Vollgraf, arXiv:1708.07747, MIT licence, (c) 2017 Zalando SE.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing
from edge.data.dataset import Dataset, Split
from edge.data.folder import find_folder, missing

NAME = "fashion-mnist"
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
FASHION_MNIST_PREPROCESSING = ImagePreprocessing(
    kind="image", input_shape=(1, 28, 28), mean=(0.2860,), std=(0.3530,)
)

_STEMS: Mapping[Split, str] = {"train": "train", "test": "t10k"}
_LAYOUT = ", ".join(
    f"{stem}-{kind}-ubyte.gz" for stem in _STEMS.values() for kind in ("images-idx3", "labels-idx1")
)


def load(split: Split, directory: str | Path | None) -> Dataset:
    """The original split.

    Raises:
        ConfigError: a missing or broken file.
    """
    folder = find_folder(NAME, directory, _LAYOUT)
    stem = _STEMS[split]
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape[1:] != (28, 28):
        raise ConfigError(f"images are {images.shape[1:]}, expected (28, 28)")
    return fashion_mnist(images, labels)


def fashion_mnist(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Dataset:
    """Images (n, 28, 28) and labels (n,) as a data set."""
    return Dataset(
        NAME,
        images[:, None],
        labels.astype(np.int64),
        FASHION_MNIST_CLASSES,
        FASHION_MNIST_PREPROCESSING,
    )


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
        raise missing(path.name, path.parent, _LAYOUT) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from None
    if len(body) != count:
        raise ConfigError(f"{path.name} holds another number of values than its header says")
    return np.frombuffer(body, np.uint8).reshape(shape)
