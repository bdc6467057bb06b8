"""What an audit is made of: public data, a gallery, and victims drawn from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.bundle import Manifest
from datamix.errors import ConfigError
from edge.data import Dataset, load_dataset, sample_for

Array = npt.NDArray[Any]
SAMPLE = "sample"
GALLERY = 200


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Data for one audit.

    Attributes:
        name: of the data set.
        training: public data, disjoint from the gallery; other speakers where there are speakers.
        gallery: (g, *raw_shape) raw inputs.
        gallery_labels: (g,) int64.
    """

    name: str
    training: Dataset
    gallery: Array
    gallery_labels: npt.NDArray[np.int64]

    def digest(self) -> str:
        """sha256 of the gallery, hexadecimal: whether truth and gallery belong together."""
        return hashlib.sha256(np.ascontiguousarray(self.gallery).tobytes()).hexdigest()

    def victims(self, groups: int, size: int, seed: int) -> npt.NDArray[np.int64]:
        """(groups, size) rows of the gallery, drawn with ``seed``; each group's are different.

        One input may stand in several groups: whether the cloud can tell is what linkage asks.

        Raises:
            ConfigError: no group, or more members than the gallery has items.
        """
        if groups < 1 or not 1 <= size <= len(self.gallery):
            raise ConfigError(
                f"{groups} groups of {size} asked for, expected at least one,"
                f" of at most {len(self.gallery)}, the gallery"
            )
        rng = np.random.default_rng([seed, 1])
        return np.stack([rng.permutation(len(self.gallery))[:size] for _ in range(groups)])


def load_material(
    manifest: Manifest, dataset: str, directory: Path | None = None, *, seed: int = 0
) -> Material:
    """Choose data for auditing a bundle.

    Args:
        manifest: the bundle's.
        dataset: a name of :data:`edge.data.NAMES`: training split and test split as published; or
            ``sample``: the shipped one, cut in two.
        directory: of the data set's files; see :func:`edge.data.load_dataset`.
        seed: of the choice.

    Raises:
        ConfigError: data that does not fit the bundle, or cannot be loaded.
    """
    rng = np.random.default_rng([seed, 0])
    if dataset == SAMPLE:
        whole = sample_for(manifest.preprocessing)
        _check(whole, manifest)
        chosen, rest = _cut(whole, rng)
        return _material(whole, chosen, subset(whole, rest))
    whole = load_dataset(dataset, "test", directory)
    _check(whole, manifest)
    chosen = np.sort(rng.permutation(len(whole))[:GALLERY])
    return _material(whole, chosen, load_dataset(dataset, "train", directory))


def subset(data: Dataset, rows: npt.NDArray[np.int64]) -> Dataset:
    """Some rows of a data set, read into memory."""
    attributes: Mapping[str, Array] = {key: v[rows] for key, v in data.attributes.items()}
    return Dataset(
        data.name,
        data.inputs[rows],
        data.labels[rows],
        data.class_names,
        data.preprocessing,
        attributes,
    )


def _material(whole: Dataset, chosen: npt.NDArray[np.int64], training: Dataset) -> Material:
    labels = whole.labels[chosen].astype(np.int64)
    return Material(whole.name, training, np.asarray(whole.inputs[chosen]), labels)


def _cut(
    data: Dataset, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the gallery and of the public rest; no speaker has both."""
    wanted = min(GALLERY, len(data) // 2)
    speakers = data.attributes.get("speaker")
    if speakers is None:
        order = rng.permutation(len(data))
        return np.sort(order[:wanted]), np.sort(order[wanted:])
    inside = np.zeros(len(data), bool)
    for speaker in rng.permutation(np.unique(speakers)):
        if inside.sum() >= wanted:
            break
        inside |= speakers == speaker
    rows = np.flatnonzero(inside)
    return np.sort(rng.permutation(rows)[:wanted]), np.flatnonzero(~inside)


def _check(data: Dataset, manifest: Manifest) -> None:
    raw_shape = manifest.preprocessing.raw_shape
    if data.preprocessing.raw_shape != raw_shape or data.class_names != manifest.class_names:
        raise ConfigError(
            f"{data.name} has inputs of shape {data.preprocessing.raw_shape} in"
            f" {len(data.class_names)} classes, which {manifest.name} does not take"
        )
    if data.multilabel:
        raise ConfigError(f"{data.name} has several labels per input, expected one")
