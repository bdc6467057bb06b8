"""ImageNet, or any pictures in its layout: a folder for each class.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv:1409.0575; for
non-commercial research only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing
from edge.data.dataset import Dataset, Split
from edge.data.folder import find_folder, missing
from edge.data.pictures import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "imagenet"
SIZE = 224
IMAGENET_PREPROCESSING = ImagePreprocessing(
    kind="image",
    input_shape=(3, SIZE, SIZE),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

_CENTRE = 224 / 256  # of the shorter side: the usual resize to 256 and crop to 224, in one step
_SUFFIXES = {".jpeg", ".jpg", ".png"}
_FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}
_LAYOUT = "train/CLASS/*.JPEG and val/CLASS/*.JPEG, CLASS being a WordNet id such as n01440764"


def load(split: Split, directory: str | Path | None) -> Dataset:
    """Pictures cut to their centre and resized to 224x224; ``test`` is the folder ``val``.

    Classes are the folders' names in order.

    Raises:
        ConfigError: a missing folder, or classes that differ between the two.
    """
    folder = find_folder(NAME, directory, _LAYOUT)
    classes = {part: _classes(folder / name) for part, name in _FOLDERS.items()}
    found = classes[split]
    if not found:
        raise missing(f"{_FOLDERS[split]}/CLASS", folder, _LAYOUT)
    # One of the two folders may be absent, but never number the classes otherwise.
    for other in classes.values():
        if other and other != found:
            odd = sorted(set(other) ^ set(found))[0]
            raise ConfigError(f"class {odd} is in only one of train and val of {folder}")
    paths: list[Path] = []
    counts: list[int] = []
    for name in found:
        here = sorted(
            path
            for path in (folder / _FOLDERS[split] / name).iterdir()
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        )
        paths += here
        counts.append(len(here))
    labels = np.repeat(np.arange(len(found)), counts)
    return Dataset(NAME, Pictures(paths, SIZE, _fit), labels, found, IMAGENET_PREPROCESSING)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(
        sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    )


def _fit(picture: Image) -> Image:
    from PIL.Image import Resampling

    side = min(picture.size) * _CENTRE
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((SIZE, SIZE), Resampling.BILINEAR, box=box)
