"""Settings of one training run. Without torch: the command line's help is made from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from datamix.errors import ConfigError
from edge.augment import Augmentation
from edge.laws import LAWS, Law
from edge.methods import METHODS
from edge.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from datamix.models import Architecture

Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "sgd", "muon"]

MAX_GROUP_SIZE = 32
_WORDS: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "law": LAWS,
    "schedule": SCHEDULES,
    "optimizer": get_args(Optimizer),
    "precision": get_args(Precision),
    "device": ("cpu", "cuda"),
}
# (low, high), both allowed.
_RANGES: dict[str, tuple[float, float]] = {
    "group_size": (1, MAX_GROUP_SIZE),
    "noise_sigma": (0, 1e4),
    "curriculum": (0, 1),
    "teacher_weight": (0, 1),
    "temperature": (0.1, 100),
    "epochs": (1, 1e6),
    "batch_size": (1, 1e6),
    "weight_decay": (0, 1e3),
    "momentum": (0, 0.9999),
    "warm_up": (0, 1),
    "label_smoothing": (0, 0.999),
    "ema_decay": (0, 0.99999),
    "clip_norm": (0, 1e9),
    "validate": (0, 0.9),
    "seed": (0, 2**63),
    "threads": (1, 4096),
}


def _convnet() -> Architecture:
    from datamix.models import Architecture

    return Architecture("convnet", {"n_blocks": 2})


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run; the defaults are the recipe of docs/training.md.

    Attributes:
        name: of the bundle.
        version: of the bundle.
        architecture: see :func:`datamix.models.build`.
        method: ``linear``, ``datamix``, ``nonlinear``, ``bounded``, ``unmixed`` or ``edge-only``;
            see docs/training.md.
        group_size: K, inputs mixed together.
        law: of the mixing matrices in training; a device draws Haar ones.
        noise_sigma: deviation of the noise on the mixtures, for the method ``bounded``.
        curriculum: share of the steps in which mixing grows from none to its law.
        teacher: folder of a bundle, or file of weights that training kept, to learn from as well;
            it runs unmixed.
        teacher_weight: of the teacher's loss; the labels' has the rest.
        temperature: of both distributions in the teacher's loss.
        epochs: passes over the training data; the last word unless ``budget_cpu_s`` is given.
        budget_cpu_s: processor seconds to spend, summed over the threads: as many steps are planned
            as fit, by a trial of a few. How many is in the checkpoint, and so is not tried again.
        batch_size: inputs per step, over all workers; a multiple of ``group_size`` when mixing.
        optimizer: ``adamw``, ``sgd`` with Nesterov's momentum, or ``muon`` for the kernels of
            convolutions and AdamW for the rest.
        peak_rate: highest learning rate.
        muon_rate: the same for Muon's kernels, relative to their norm.
        momentum: of ``sgd`` and ``muon``.
        weight_decay: of ``adamw`` and ``sgd``.
        schedule: course of the learning rate, see :func:`edge.schedules.learning_rate`.
        warm_up: share of the steps in which the rate rises.
        label_smoothing: share of the label's weight that is spread over all classes.
        ema_decay: of the moving average of the weights, which is what is evaluated and kept; 0:
            none.
        clip_norm: gradients are scaled down to this norm; 0: never.
        precision: ``bfloat16`` and ``float16`` are autocast's; ``float16`` is for CUDA only.
        channels_last: keep features with their channels last in memory.
        device: ``cpu`` or ``cuda``.
        deterministic: refuse operations that torch knows only in a form that varies.
        augmentation: what may happen to an input.
        validate: last share of the training data to hold out; measured after every epoch and
            recorded, never used to choose.
        seed: of everything random in training.
        threads: torch's; part of the settings because another number rounds differently.
    """

    name: str = "fashion-mnist-mix"
    version: str = "1"
    architecture: Architecture = field(default_factory=_convnet)
    method: str = "linear"
    group_size: int = 4
    law: Law = "haar"
    noise_sigma: float = 0.0
    curriculum: float = 0.0
    teacher: str | None = None
    teacher_weight: float = 0.5
    temperature: float = 2.0
    epochs: int = 12
    budget_cpu_s: float | None = None
    batch_size: int = 256
    optimizer: Optimizer = "adamw"
    peak_rate: float = 3e-3
    muon_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: Schedule = "one-cycle"
    warm_up: float = 0.3
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    clip_norm: float = 0.0
    precision: Precision = "float32"
    channels_last: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    deterministic: bool = False
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(shift=1, flip=True))
    validate: float = 0.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        for key, words in _WORDS.items():
            if getattr(self, key) not in words:
                raise ConfigError(
                    f"{key} is {getattr(self, key)!r}, expected one of {', '.join(words)}"
                )
        for key, (low, high) in _RANGES.items():
            if not low <= getattr(self, key) <= high:  # NaN fails it
                raise ConfigError(f"{key} is {getattr(self, key)}, expected {low:g} to {high:g}")
        for key in ("peak_rate", "muon_rate"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"{key} is {getattr(self, key)}, expected more than 0")
        if self.budget_cpu_s is not None and not 0 < self.budget_cpu_s < float("inf"):
            raise ConfigError(f"budget_cpu_s is {self.budget_cpu_s}, expected more than 0")
        if self.precision == "float16" and self.device != "cuda":
            raise ConfigError("precision is 'float16' on the device 'cpu', expected 'cuda' for it")
        self._check_method()

    def _check_method(self) -> None:
        method = METHODS[self.method]
        if method.mixes and self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected a multiple of group_size"
                f" {self.group_size}, because the method {self.method} is trained mixed"
            )
        if method.noisy != (self.noise_sigma > 0):
            expected = "more than 0" if method.noisy else "0"
            raise ConfigError(
                f"noise_sigma is {self.noise_sigma}, expected {expected} for the method"
                f" {self.method}"
            )
        if method.distils and self.teacher is None and self.teacher_weight > 0:
            raise ConfigError(
                f"the method {self.method} has no teacher, expected a bundle or a file of weights,"
                " or teacher_weight 0 to do without"
            )

    @property
    def budget(self) -> str:
        """What the run may spend, in words."""
        if self.budget_cpu_s is not None:
            return f"{self.budget_cpu_s:g} CPU s"
        return f"{self.epochs} epochs"

    def to_json(self) -> str:
        """All settings, as a checkpoint and a row of results keep them."""
        return json.dumps(asdict(self), sort_keys=True)
