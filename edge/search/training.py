"""The trainer of a search: so many CPU seconds of training, then the accuracy on held-out data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datamix.errors import ConfigError
from datamix.models import Architecture
from edge.accuracy import accuracy
from edge.data import Dataset
from edge.runs import check_fit, fit_method, mixing_of, on_cpu
from edge.search.holdout import hold_out
from edge.search.trial import Measured, Trial
from edge.settings import TrainConfig

# What the trial says, and what only names a bundle.
_NOT_OURS = ("name", "version", "architecture", "seed", "epochs", "budget_cpu_s", "validate")


@dataclass(frozen=True, slots=True)
class HeldOutTrainer:
    """Trains on one part of a training split and measures with the other.

    Attributes:
        load: reads the training split; picklable.
        config: how to train; architecture, CPU seconds and seed are the trial's.
        held_out: share of the split that is measured with.
    """

    load: Callable[[], Dataset]
    config: TrainConfig = field(default_factory=TrainConfig)
    held_out: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}, expected more than 0, less than 1")

    def settings(self, data: str) -> dict[str, Any]:
        """What an accuracy depends on besides the trial; ``data`` names the training split."""
        config = json.loads(self.config.to_json())
        for key in _NOT_OURS:
            del config[key]
        return {"data": data, "held_out": self.held_out, **config}

    def __call__(self, trial: Trial) -> Measured:
        """Train and measure, mixed where the method mixes.

        Raises:
            ConfigError: data or options that cannot be used, or too few seconds for some steps.
        """
        data = self.load()
        training, held = hold_out(data, self.held_out, trial.seed)
        options = dict(trial.candidate.options)
        config = replace(
            self.config,
            architecture=Architecture(trial.candidate.architecture, options),
            budget_cpu_s=trial.seconds,
            seed=trial.seed,
            validate=0.0,
        )
        check_fit(config, training)
        with tempfile.TemporaryDirectory() as folder:
            part, _ = fit_method(
                config,
                training,
                Path(folder) / "checkpoint.pt",
                report=lambda line: None,
                stop=lambda: False,
            )
        found = accuracy(part, held, on_cpu(config), mixing_of(config), seed=trial.seed)
        return Measured(found, len(held))
