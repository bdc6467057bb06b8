"""Named experiments: settings, and the methods that are compared with them.

``datamix train --preset NAME`` trains the settings; ``datamix experiment NAME`` all arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datamix.errors import ConfigError
from datamix.models import Architecture
from edge.augment import Augmentation
from edge.laws import Law
from edge.methods import METHODS
from edge.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class Arm:
    """One method in an experiment.

    Attributes:
        label: tells arms apart, ``[a-z0-9-]``.
        method: see :data:`edge.methods.METHODS`.
        group_sizes: K to measure, and to train where training depends on it.
        laws: likewise.
        sigmas: deviations of the noise to train at, one network each; none for methods without.
        options: of the architecture, over the preset's.
        changes: further settings, over the preset's.
        teacher: label of the arm whose network of the same seed is the teacher.
    """

    label: str
    method: str
    group_sizes: tuple[int, ...] = (8,)
    laws: tuple[Law, ...] = ("haar",)
    sigmas: tuple[float, ...] = ()
    options: Mapping[str, int | str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings for one data set, and the arms of its experiment.

    Attributes:
        name: of the preset.
        dataset: see :data:`edge.data.NAMES`.
        config: settings of the method that we recommend.
        arms: in the order in which they are trained; a teacher before its students.
    """

    name: str
    dataset: str
    config: TrainConfig
    arms: tuple[Arm, ...]

    def settings(self, arm: Arm, seed: int, **changes: Any) -> TrainConfig:
        """Settings of one arm; ``changes`` go over everything else."""
        architecture = replace(
            self.config.architecture,
            options={**self.config.architecture.options, **arm.options},
        )
        values = {"method": arm.method, "architecture": architecture, "seed": seed}
        return replace(self.config, **{**values, **arm.changes, **changes})


_ALL_SIZES = (2, 4, 8, 16, 32)
_PAPERS_SIZES = (8, 4, 2)
_SIGMAS = (0.3, 1.0, 2.0, 4.0)


def _arms(widths: str) -> tuple[Arm, ...]:
    """The arms that every experiment has: baselines, ours, the paper's, the best non-linear one.

    Networks with a non-linear cloud have two convolutions per section, at ``widths`` that cost the
    cloud what the one wide convolution of the preset's linear blocks does: a stronger opponent
    than the linear network with activations would be. They need no bridges and make one round.
    """
    deep: Mapping[str, int | str] = {"widths": widths, "depth": 2, "rounds": 1}
    return (
        Arm("unmixed", "unmixed", options=deep),
        Arm("edge-only", "edge-only"),
        Arm("linear", "linear", _ALL_SIZES),
        Arm("linear-taught", "linear", teacher="unmixed"),
        Arm("linear-laws", "linear", (8,), ("gaussian", "dirichlet", "diagonal-dominant")),
        Arm("linear-one-round", "linear", (4, 8), options={"rounds": 1}),
        Arm("datamix", "datamix", _PAPERS_SIZES, options=deep),
        Arm("nonlinear", "nonlinear", (8,), options={**deep, "rounds": 3}, teacher="unmixed"),
        # Bits add up over values and rounds, so there is one round, and few values leave.
        Arm("bounded", "bounded", (4,), sigmas=_SIGMAS, options={"rounds": 1, "sent_width": 8}),
        Arm(
            "bounded-narrow",
            "bounded",
            (4,),
            sigmas=_SIGMAS,
            options={"rounds": 1, "sent_width": 1},
        ),
    )


# What all experiments share; docs/decisions/0009 tells of the trials.
_COMMON: Mapping[str, Any] = {
    "group_size": 8,
    "optimizer": "muon",
    "peak_rate": 3e-3,
    "muon_rate": 0.1,
    "momentum": 0.6,
    "weight_decay": 0.01,
    "schedule": "triangle",
    "warm_up": 0.25,
    "label_smoothing": 0.1,
    "precision": "bfloat16",
    "channels_last": True,
}
_FASHION_MNIST = TrainConfig(
    name="fashion-mnist-mix",
    architecture=Architecture(
        "bridgenet", {"input": "1,28,28", "stem_units": 1, "neck": 96, "hidden": 128}
    ),
    epochs=12,
    batch_size=512,
    augmentation=Augmentation(shift=1, padding="reflect", flip=True),
    **_COMMON,
)
_CIFAR10 = TrainConfig(
    name="cifar10-mix",
    architecture=Architecture("bridgenet", {"input": "3,32,32", "stem_units": 1, "neck": 96}),
    # About ten minutes of one core's time, for the linear network and for the unmixed one.
    epochs=20,
    batch_size=512,
    augmentation=Augmentation(shift=2, padding="reflect", flip=True),
    **_COMMON,
)
_SPEECH_COMMANDS = TrainConfig(
    name="speech-commands-mix",
    architecture=Architecture(
        "bridgenet",
        {
            "input": "1,40,61",
            "stem_width": 16,
            "stem_units": 1,
            "widths": "64,96,128",
            "neck": 64,
            "classes": 11,
        },
    ),
    epochs=40,
    batch_size=128,
    augmentation=Augmentation(
        time_shift_ms=100, noise=0.01, gain_db=6, mask_mels=6, mask_frames=12
    ),
    **_COMMON,
)

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("fashion-mnist", "fashion-mnist", _FASHION_MNIST, _arms("64,80,128")),
        Preset("cifar10", "cifar10", _CIFAR10, _arms("64,80,128")),
        Preset("speech-commands", "speech-commands", _SPEECH_COMMANDS, _arms("40,64,88")),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check_preset(preset: Preset) -> None:
    """Refuse arms that cannot be told apart or trained, and teachers that come too late.

    Raises:
        ConfigError: one of these.
    """
    before: dict[str, Arm] = {}
    for arm in preset.arms:
        if arm.label in before:
            raise ConfigError(f"two arms of {preset.name} are labelled {arm.label!r}")
        if arm.method not in METHODS:
            raise ConfigError(f"method of {arm.label} is {arm.method!r}, expected a known one")
        if arm.sigmas and not METHODS[arm.method].noisy:
            raise ConfigError(f"{arm.label} has sigmas, expected none: {arm.method} adds no noise")
        if arm.teacher is not None and arm.teacher not in before:
            raise ConfigError(f"{arm.label} learns from {arm.teacher!r}, expected an arm before it")
        if arm.teacher is not None and METHODS[before[arm.teacher].method].mixes:
            raise ConfigError(
                f"{arm.label} learns from {arm.teacher!r}, expected one without mixing"
            )
        before[arm.label] = arm
