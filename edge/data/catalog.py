"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from datamix.errors import ConfigError
from edge.data import celeba, cifar, fashion_mnist, imagenet, speech_commands
from edge.data.dataset import Dataset, Split

_Load = Callable[[Split, str | Path | None], Dataset]

_LOADERS: Mapping[str, tuple[tuple[Split, ...], _Load]] = {
    fashion_mnist.NAME: (("train", "test"), fashion_mnist.load),
    cifar.CIFAR10.name: (("train", "test"), cifar.CIFAR10.load),
    cifar.CIFAR100.name: (("train", "test"), cifar.CIFAR100.load),
    speech_commands.NAME: (("train", "val", "test"), speech_commands.load),
    celeba.NAME: (("train", "val", "test"), celeba.load),
    # The labels of ImageNet's own test set were never published: everybody's test is its val/.
    imagenet.NAME: (("train", "test"), imagenet.load),
}
NAMES = tuple(_LOADERS)


def load_dataset(name: str, split: Split, directory: str | Path | None = None) -> Dataset:
    """Load a data set by name, from files in its published layout (docs/data.md).

    Args:
        name: one of ``NAMES``.
        split: the publisher's; ``val`` only where there is one.
        directory: holds the files, or a folder of the data set's name that does; by default what
            the environment variable ``DATAMIX_DATA`` says.

    Raises:
        ConfigError: an unknown name or split, no directory, a missing or broken file.
    """
    if name not in _LOADERS:
        raise ConfigError(f"data set is {name!r}, expected one of {', '.join(NAMES)}")
    splits, load = _LOADERS[name]
    if split not in splits:
        raise ConfigError(f"split of {name} is {split!r}, expected one of {', '.join(splits)}")
    return load(split, directory)
