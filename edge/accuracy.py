"""Accuracy of a network in memory, with any mixing and any wire, many groups at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edge.batches import to_device
from edge.data import Dataset
from edge.mixtures import Mixing, logits_of
from edge.preprocess import preprocessor
from edge.settings import TrainConfig

_CHUNK = 512


def accuracy(
    part: nn.Module, data: Dataset, config: TrainConfig, mixing: Mixing | None, *, seed: int = 0
) -> float:
    """Share of right answers, 0 to 1, in eval mode and float32.

    Groups are drawn at random, so that no group is of one class by the file's order; the last one
    is filled up with inputs that are not counted. Where an input may have several classes, each is
    a question of its own.

    Args:
        part: a split model, or a network without a cloud; on the device of ``config``.
        data: inputs and labels.
        config: says device and memory format.
        mixing: None to leave the features as they are.
        seed: of groups, matrices and noise.
    """
    rng = np.random.default_rng((seed, 4))
    order = rng.permutation(len(data))
    size = mixing.group_size if mixing else 1
    step = max(size, _CHUNK // size * size)
    preprocess = preprocessor(data.preprocessing)
    right = 0.0
    part.eval()
    with torch.inference_mode():
        for start in range(0, len(order), step):
            chosen = order[start : start + step]
            filled = np.resize(chosen, -(-len(chosen) // size) * size)
            inputs = torch.from_numpy(preprocess(data.inputs[filled]))
            batch = to_device(inputs, data.labels[chosen], config)
            logits = logits_of(part, batch.inputs, mixing, rng)[: len(chosen)]
            right += _right(logits, batch.labels)
    return right / len(data)


def _right(logits: Tensor, labels: Tensor) -> float:
    if labels.ndim == 2:
        return float(((logits > 0) == (labels > 0.5)).float().mean(dim=1).sum())
    return float((logits.argmax(1) == labels).sum())
