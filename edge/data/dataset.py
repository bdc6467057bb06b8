"""What every data set is, whatever its files look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.preprocessing import Preprocessing

Split = Literal["train", "val", "test"]
Array = npt.NDArray[Any]


class Inputs(Protocol):
    """Raw inputs, as a device gets them: an array, or files that are read when asked for."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, rows: npt.NDArray[np.int64] | slice, /) -> Array:
        """Some of them: (n, C, H, W) uint8 images, or (n, samples) int16 audio."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """Labelled inputs.

    Attributes:
        name: of the data set.
        inputs: raw; images (n, C, H, W) uint8, audio (n, samples) int16.
        labels: (n,) int64, indices into ``class_names``; or, where one input has several of them,
            (n, classes) float32, each 0 or 1.
        class_names: one per class.
        preprocessing: what fits these inputs.
        attributes: further facts about each input, (n,) each, by name: ``speaker`` for instance.
            Nothing is trained on them; a privacy audit asks whether the cloud can tell them.
    """

    name: str
    inputs: Inputs
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    attributes: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        n = len(self.labels)
        if len(self.inputs) != n or not n:
            raise ConfigError(
                f"{self.name}: {len(self.inputs)} inputs and {n} labels,"
                " expected as many of both, at least one"
            )
        if self.multilabel:
            if self.labels.shape != (n, len(self.class_names)):
                raise ConfigError(
                    f"{self.name}: labels have shape {self.labels.shape},"
                    f" expected {(n, len(self.class_names))}"
                )
            if not np.isin(self.labels, (0, 1)).all():
                raise ConfigError(f"{self.name}: a label is neither 0 nor 1")
        elif self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise ConfigError(f"{self.name}: a label is outside 0..{len(self.class_names) - 1}")
        for key, values in self.attributes.items():
            if len(values) != n:
                raise ConfigError(f"{self.name}: {len(values)} values of {key!r}, expected {n}")

    def __len__(self) -> int:
        """How many inputs."""
        return len(self.labels)

    @property
    def multilabel(self) -> bool:
        """Whether an input may have several classes at once, or none."""
        return self.labels.ndim == 2
