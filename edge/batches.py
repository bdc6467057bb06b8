"""Batches: what a step learns from, as a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamix.errors import ConfigError
from datamix.preprocessing import LogMelPreprocessing
from edge.augment import augment, mask_factors
from edge.data import Dataset, Inputs
from edge.logmel import LogMel
from edge.preprocess import preprocessor
from edge.settings import TrainConfig

_CLIPS = 16
_ASIDE = 20_200_823  # any number: which inputs are held out is no choice of a run


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs (n, C, H, W) float32, preprocessed, and labels, on the device that computes."""

    inputs: Tensor
    labels: Tensor


def sample_rng(config: TrainConfig, purpose: int, *of: int) -> np.random.Generator:
    """The random numbers of one purpose at one place; 0: order, 1: augmentation, 3: mixing."""
    return np.random.default_rng((config.seed, purpose, *of))


class Batches:
    """Draws the batch of any step; keeps nothing but the order of the running epoch."""

    def __init__(self, data: Dataset, config: TrainConfig, rank: int = 0, size: int = 1) -> None:
        """Batches of ``data``; of each, this worker gets the share ``rank`` of ``size``.

        Together the workers' shares are the batch that one worker alone would get.

        Raises:
            ConfigError: not enough data for one batch, or a batch that cannot be shared out.
        """
        if len(data) < config.batch_size:
            raise ConfigError(f"{len(data)} inputs are fewer than one batch of {config.batch_size}")
        if config.batch_size % size:
            raise ConfigError(
                f"batch_size is {config.batch_size}, expected a multiple of the {size} workers"
            )
        self.per_epoch = len(data) // config.batch_size
        self._data, self._config = data, config
        self._rank, self._share = rank, config.batch_size // size
        self._preprocess = _training_preprocessor(data, config)
        self._audio = isinstance(data.preprocessing, LogMelPreprocessing)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, augmented."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = sample_rng(self._config, 0, epoch).permutation(len(self._data))
        start = index * self._config.batch_size + self._rank * self._share
        chosen = self._order[start : start + self._share]
        # Each worker draws its own, or all would draw those of the whole batch.
        rng = sample_rng(self._config, 1, step, self._rank)
        how = self._config.augmentation
        inputs = self._preprocess(augment(self._data.inputs[chosen], rng, how))
        if self._audio and (how.mask_mels or how.mask_frames):
            kept = mask_factors(tuple(inputs.shape), rng, how)
            inputs = inputs * torch.from_numpy(kept).to(inputs.device)
        labels = self._data.labels[chosen]
        return to_device(inputs, labels, self._config)


def _training_preprocessor(
    data: Dataset, config: TrainConfig
) -> Callable[[npt.NDArray[Any]], Tensor]:
    """From raw inputs to tensors: torch's log-mel for sound, which takes a seventh of the time."""
    if not isinstance(data.preprocessing, LogMelPreprocessing):
        plain = preprocessor(data.preprocessing)
        return lambda raw: torch.from_numpy(plain(raw))
    log_mel = LogMel(data.preprocessing).to(config.device)
    # On a processor the frames of a few clips stay in its cache.
    rows = _CLIPS if config.device == "cpu" else config.batch_size

    def features(raw: npt.NDArray[Any]) -> Tensor:
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(raw).to(config.device), rows)
            return torch.cat([log_mel(part) for part in parts])

    return features


def to_device(inputs: Tensor, labels: npt.NDArray[np.generic], config: TrainConfig) -> Batch:
    """Inputs and labels where and how the network wants them."""
    tensor = inputs.to(config.device)
    if config.channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return Batch(tensor, torch.from_numpy(labels).to(config.device))


class _Some:
    """Some rows of inputs, which may be files: nothing is read before it is asked for."""

    def __init__(self, inputs: Inputs, rows: npt.NDArray[np.int64]) -> None:
        self._inputs, self._rows = inputs, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: npt.NDArray[np.int64] | slice, /) -> npt.NDArray[Any]:
        return self._inputs[self._rows[rows]]


def held_out(data: Dataset, share: float) -> tuple[Dataset, Dataset | None]:
    """Set ``share`` of ``data`` aside; None where that is nothing.

    Which ones is the same for every seed, and does not follow the files, which may be in the
    order of the classes.

    Raises:
        ConfigError: a share too small to hold an input.
    """
    if not share:
        return data, None
    count = int(share * len(data))
    if not 0 < count < len(data):
        raise ConfigError(f"validate is {share}, expected a share that holds an input")
    order = np.random.default_rng(_ASIDE).permutation(len(data))
    return _some(data, np.sort(order[count:])), _some(data, np.sort(order[:count]))


def _some(data: Dataset, rows: npt.NDArray[np.int64]) -> Dataset:
    attributes = {key: values[rows] for key, values in data.attributes.items()}
    return replace(
        data, inputs=_Some(data.inputs, rows), labels=data.labels[rows], attributes=attributes
    )
