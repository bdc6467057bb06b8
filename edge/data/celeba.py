"""CelebA: forty attributes of a face, each there or not.

Liu, Luo, Wang and Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015; for non-commercial
research only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing
from edge.data.dataset import Dataset, Split
from edge.data.folder import find_folder, missing, read_lines
from edge.data.pictures import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "celeba"
SIZE = 64
# From -1 to 1: the set's own figures were not measured.
CELEBA_PREPROCESSING = ImagePreprocessing(
    kind="image", input_shape=(3, SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)

_IMAGES = "img_align_celeba"
_ATTRIBUTES = "list_attr_celeba.txt"
_PARTITION = "list_eval_partition.txt"
_LAYOUT = f"{_IMAGES}/*.jpg, {_ATTRIBUTES} and {_PARTITION}"
_SPLITS: dict[Split, str] = {"train": "0", "val": "1", "test": "2"}


def load(split: Split, directory: str | Path | None) -> Dataset:
    """The publisher's split; pictures cut to their central square and resized to 64x64.

    Raises:
        ConfigError: a missing or broken file, or a list that names one that is not there.
    """
    folder = find_folder(NAME, directory, _LAYOUT)
    names, attributes = _read_attributes(folder / _ATTRIBUTES)
    partition = _read_partition(folder / _PARTITION)
    if partition.keys() != attributes.keys():
        odd = sorted(partition.keys() ^ attributes.keys())[0]
        raise ConfigError(f"{odd} is in only one of {_ATTRIBUTES} and {_PARTITION}")
    chosen = sorted(name for name, part in partition.items() if part == _SPLITS[split])
    images = folder / _IMAGES
    there = {path.name for path in images.glob("*.jpg")} if images.is_dir() else set()
    for name in chosen:
        if name not in there:
            raise missing(name, images, _LAYOUT)
    if not chosen:
        raise ConfigError(f"{_PARTITION} names no picture of {split}, expected at least one")
    return Dataset(
        NAME,
        Pictures([images / name for name in chosen], SIZE, _fit),
        np.array([attributes[name] for name in chosen], np.float32),
        names,
        CELEBA_PREPROCESSING,
    )


def _fit(picture: Image) -> Image:
    from PIL.Image import Resampling

    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((SIZE, SIZE), Resampling.BILINEAR, box=box)


def _read_attributes(path: Path) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """A count, the attributes' names, then per picture its name and 1 or -1 for each."""
    lines = read_lines(path, _LAYOUT)
    if len(lines) < 2 or lines[0] != str(len(lines) - 2):
        raise ConfigError(f"{path.name} does not begin with the number of its pictures")
    names = tuple(lines[1].split())
    values = {"1": 1, "-1": 0}
    found: dict[str, list[int]] = {}
    for line in lines[2:]:
        name, *signs = line.split()
        if len(signs) != len(names) or not set(signs) <= values.keys():
            raise ConfigError(f"{path.name}: {name} needs {len(names)} values, each 1 or -1")
        found[name] = [values[sign] for sign in signs]
    return names, found


def _read_partition(path: Path) -> dict[str, str]:
    """Per picture its name and 0, 1 or 2: train, val or test."""
    found: dict[str, str] = {}
    for line in read_lines(path, _LAYOUT):
        match line.split():
            case [name, ("0" | "1" | "2") as part]:
                found[name] = part
            case _:
                raise ConfigError(f"{path.name} has a line {line[:64]!r}, expected NAME 0, 1 or 2")
    return found
