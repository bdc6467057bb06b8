"""The trainer of a search: so many CPU seconds of training, then the accuracy on held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build
from edge.augment import Augmentation, augment
from edge.data import Dataset
from edge.preprocess import preprocessor
from edge.search.holdout import hold_out
from edge.search.trial import Measured, Trial
from edge.train import mixed_logits, one_cycle

_IMAGES = Augmentation(shift=1, flip=True)
_SPEECH = Augmentation(time_shift_ms=100)
_CHUNK = 512
_CYCLE = 1000  # the learning rate's cycle, in parts of the budget


@dataclass(frozen=True, slots=True)
class HeldOutTrainer:
    """Trains on one part of a training split and measures with the other.

    The learning rate follows the CPU seconds that are spent, so that the cycle ends with the
    budget however fast the machine is; two runs therefore differ a little.

    Attributes:
        load: reads the training split; picklable.
        group_size: K, inputs mixed together; matters where a network isn't linear, which is
            trained and measured mixed.
        held_out: share of the split that is measured with.
        batch_size: inputs per step, a multiple of ``group_size``.
        peak_rate: AdamW's highest learning rate.
        weight_decay: AdamW's.
        threads: torch's.
    """

    load: Callable[[], Dataset]
    group_size: int = 4
    held_out: float = 0.1
    batch_size: int = 256
    peak_rate: float = 3e-3
    weight_decay: float = 0.05
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        for key in ("group_size", "batch_size", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}, expected at least 1")
        if self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected a multiple of group_size"
                f" {self.group_size}"
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}, expected more than 0, less than 1")

    def settings(self, data: str) -> dict[str, Any]:
        """What an accuracy depends on besides the trial; ``data`` names the training split."""
        return {
            "data": data,
            "group_size": self.group_size,
            "held_out": self.held_out,
            "batch_size": self.batch_size,
            "peak_rate": self.peak_rate,
            "weight_decay": self.weight_decay,
            "threads": self.threads,
        }

    def __call__(self, trial: Trial) -> Measured:
        """Train and measure.

        Raises:
            ConfigError: data or options that cannot be used.
        """
        torch.set_num_threads(self.threads)
        data = self.load()
        if data.multilabel:
            raise ConfigError(f"{data.name} has several labels per input, expected one")
        training, held = hold_out(data, self.held_out, trial.seed)
        torch.manual_seed(trial.seed)
        options = dict(trial.candidate.options)
        model = build(Architecture(trial.candidate.architecture, options))
        self._fit(model.train(), training, trial)
        return Measured(self._accuracy(model.eval(), held, trial.seed), len(held))

    def _fit(self, model: SplitModel, data: Dataset, trial: Trial) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=self.weight_decay)
        transform = preprocessor(data.preprocessing)
        how = _IMAGES if data.preprocessing.kind == "image" else _SPEECH
        rng = np.random.default_rng((trial.seed, 4))
        started_s = time.process_time()
        for rows in self._batches(len(data), rng):
            spent = (time.process_time() - started_s) / trial.seconds
            if spent >= 1:
                return
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(int(spent * _CYCLE), _CYCLE, self.peak_rate)
            inputs = torch.from_numpy(transform(augment(data.inputs[rows], rng, how)))
            labels = torch.from_numpy(data.labels[rows])
            loss = functional.cross_entropy(self._logits(model, inputs, rng), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def _batches(self, n: int, rng: np.random.Generator) -> Iterator[Any]:
        """Rows of one batch after the other, epoch after epoch, without an end."""
        size = min(self.batch_size, n // self.group_size * self.group_size)
        if not size:
            raise ConfigError(f"{n} inputs are fewer than one group of {self.group_size}")
        while True:
            order = rng.permutation(n)
            for at in range(0, n - size + 1, size):
                yield order[at : at + size]

    def _logits(self, model: SplitModel, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        # Linear blocks commute with mixing: the mixed output is the unmixed one, at less cost.
        if not model.linear:
            return mixed_logits(model, inputs, rng, self.group_size)
        logits: Tensor = model(inputs)
        return logits

    def _accuracy(self, model: SplitModel, data: Dataset, seed: int) -> float:
        transform = preprocessor(data.preprocessing)
        rng = np.random.default_rng((seed, 5))
        right = 0
        step = max(1, _CHUNK // self.group_size) * self.group_size
        with torch.inference_mode():
            for at in range(0, len(data), step):
                rows = np.arange(at, min(at + step, len(data)))
                # The last group is filled up with inputs that are not counted, as on a device.
                filled = np.resize(rows, -(-len(rows) // self.group_size) * self.group_size)
                inputs = torch.from_numpy(transform(data.inputs[filled]))
                guesses = self._logits(model, inputs, rng).argmax(1).numpy()[: len(rows)]
                right += int((guesses == data.labels[rows]).sum())
        return right / len(data)
