"""How long the device's own steps really took, for a table of where an inference's time went.

One object per process: whatever runs between two looks at it belongs to the inference in hand.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge.modes import Mode, Secret
from edge.session import Device

if TYPE_CHECKING:
    from datamix.bundle import Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class Stages:
    """Seconds since the last :meth:`clear`.

    Attributes:
        mix_s: protecting features.
        demix_s: restoring answers, and bridges.
        head_s: the head.
    """

    __slots__ = ("demix_s", "head_s", "mix_s")

    def __init__(self) -> None:
        """Begin with nothing."""
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.mix_s = self.demix_s = self.head_s = 0.0


class TimedMode:
    """A mode that adds what it takes to ``stages``."""

    __slots__ = ("_mode", "_stages")

    def __init__(self, mode: Mode, stages: Stages) -> None:
        """Wrap a mode."""
        self._mode, self._stages = mode, stages

    @property
    def step(self) -> float | None:
        """See :class:`edge.modes.Mode`."""
        return self._mode.step

    def protect(self, block: int, features: Array) -> tuple[Floats, Secret]:
        """See :class:`edge.modes.Mode`."""
        begun_s = perf_counter()
        leaving, secret = self._mode.protect(block, features)
        self._stages.mix_s += perf_counter() - begun_s
        return leaving, _TimedSecret(secret, self._stages)


class _TimedSecret:
    __slots__ = ("_secret", "_stages")

    def __init__(self, secret: Secret, stages: Stages) -> None:
        self._secret, self._stages = secret, stages

    def restore(self, answer: Array) -> Floats:
        begun_s = perf_counter()
        restored = self._secret.restore(answer)
        self._stages.demix_s += perf_counter() - begun_s
        return restored

    def wipe(self) -> None:
        self._secret.wipe()


class TimedDevice:
    """A device that adds what bridges and head take to ``stages``."""

    __slots__ = ("_device", "_stages")

    def __init__(self, device: Device, stages: Stages) -> None:
        """Wrap a device."""
        self._device, self._stages = device, stages

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._device.manifest

    def preprocess(self, raw: Array) -> Floats:
        """See :class:`edge.session.Device`."""
        return self._device.preprocess(raw)

    def stem(self, inputs: Array) -> Floats:
        """See :class:`edge.session.Device`."""
        return self._device.stem(inputs)

    def bridge(self, index: int, features: Array) -> Floats:
        """See :class:`edge.session.Device`."""
        begun_s = perf_counter()
        bridged = self._device.bridge(index, features)
        self._stages.demix_s += perf_counter() - begun_s
        return bridged

    def head(self, features: Array) -> Floats:
        """See :class:`edge.session.Device`."""
        begun_s = perf_counter()
        outputs = self._device.head(features)
        self._stages.head_s += perf_counter() - begun_s
        return outputs
