"""A part of the training data to choose by, so that the test data stay untouched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.data import Dataset, Inputs

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Some:
    """Some rows of other inputs; nothing is read or copied before it is asked for."""

    inputs: Inputs
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Rows | slice, /) -> npt.NDArray[Any]:
        return self.inputs[self.rows[chosen]]


def hold_out(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Part ``data`` at random into what is learned from and what is measured with.

    Where the speaker of each clip is known, whole speakers are held out: a network that knows a
    voice already would look better than it is.

    Args:
        data: a training split.
        share: of the inputs to hold out, more than 0, less than 1; at least one on each side.
        seed: of the draw; the same seed, the same parts.

    Raises:
        ConfigError: ``share`` is out of range, or there is nothing to part.
    """
    if not 0 < share < 1:
        raise ConfigError(f"held_out is {share}, expected more than 0, less than 1")
    n = len(data)
    speakers = data.attributes.get("speaker", np.arange(n))
    names, owner = np.unique(speakers, return_inverse=True)
    if len(names) < 2:
        raise ConfigError(f"{data.name} cannot be parted, expected two inputs or speakers at least")
    # Speakers in a random order, held out as long as they are needed to reach the share.
    place = np.random.default_rng((seed, 3)).permutation(len(names))
    before = np.cumsum(np.bincount(place[owner], minlength=len(names)))
    last = int(np.clip(np.searchsorted(before, share * n), 0, len(names) - 2))
    held = place[owner] <= last
    return _part(data, ~held), _part(data, held)


def _part(data: Dataset, wanted: npt.NDArray[np.bool_]) -> Dataset:
    rows = np.flatnonzero(wanted)
    return replace(
        data,
        inputs=_Some(data.inputs, rows),
        labels=data.labels[rows],
        attributes={name: values[rows] for name, values in data.attributes.items()},
    )
