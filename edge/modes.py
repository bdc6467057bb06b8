"""What leaves the device for each round, and how it becomes the answer: mix, bounded or split.

    mix       Y = A U                        the answer is de-mixed
    bounded   Y = A clip(U) + sigma N        the same; N is never cancelled
    split     S = clip(U) + sigma Z          to operator A; operator B computes on Z, from its seed,
                                             and the device subtracts

``clip`` divides a member by max(1, its root mean square), so that the mean square of whatever
leaves is 1 at most, for every input: the power constraint under which a Gaussian channel carries
at most d/2 log2(1 + 1/sigma^2) bits (Shannon, "Communication in the presence of noise", 1949).
Blocks are linear in these two modes, so the answer is multiplied by the same number again, exactly.

A mode makes a fresh :class:`Secret` for every round and uses it once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from datamix.clipping import clip as clip  # part of this module's interface
from datamix.errors import ConfigError
from datamix.framing import STEPS
from edge.masks import Mask, Masks
from edge.mixing import Coefficients, demix, gaussians, haar, mix, wipe

if TYPE_CHECKING:
    from datamix.bundle import Manifest
    from datamix.bundle import Mode as ModeName
    from datamix.framing import Dtype

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

GRID = 2.0**-10
"""Steps of what leaves in the mode split. The noise is a float64 with holes between its values, by
which floating-point noise has been told apart from its neighbour (Mironov, "On significance of the
least significant bits for differential privacy", CCS 2012); a step holds very many of them."""


REACH = 6.0
"""Deviations of the noise that integers of 16 bits reach to in the mode split. One value in 500
million is further out, and is cut off: the cloud sees a function of the same noisy value then."""


class Secret(Protocol):
    """What the device must keep to itself until the round's answer is there."""

    def restore(self, answer: Array) -> Floats:
        """The cloud's answer (K, *output_shape) to the block's output, (K, *output_shape)."""
        ...

    def wipe(self) -> None:
        """Forget: overwrite what is secret. A second call does nothing."""
        ...


class Mode(Protocol):
    """How a group's features are protected."""

    @property
    def step(self) -> float | None:
        """What leaves is whole multiples of it, to be sent as integers; None for floats."""
        ...

    def protect(self, block: int, features: Array) -> tuple[Floats, Secret]:
        """Features (K, *input_shape) float32 to what may leave, of the same shape, float32."""
        ...


class Mix:
    """Fresh Haar coefficients for each round; see :mod:`edge.mixing`."""

    step = None

    def protect(self, block: int, features: Array) -> tuple[Floats, Secret]:
        """See :class:`Mode`."""
        coefficients = haar(len(features))
        return mix(features, coefficients), _Mixed(coefficients)


class Bounded:
    """Coefficients, and noise from the operating system's entropy that nobody cancels."""

    step = None

    def __init__(self, sigma: float) -> None:
        """Add noise of this deviation to each value.

        Raises:
            ConfigError: ``sigma`` is not positive and finite.
        """
        self._sigma = _check_sigma(sigma)

    def protect(self, block: int, features: Array) -> tuple[Floats, Secret]:
        """See :class:`Mode`."""
        clipped, scale = clip(features)
        coefficients = haar(len(features))
        noise = self._sigma * gaussians(features.size).reshape(features.shape)
        # The sum in float64: what is rounded away is then far finer than what leaves.
        sent = (mix(clipped, coefficients) + noise).astype(np.float32)
        wipe(noise)
        return sent, _Mixed(coefficients, scale)


class Split:
    """Masks for one group, a fresh one for each round; operator B has answered for them before."""

    def __init__(self, sigma: float, masks: Masks, dtype: Dtype = "float32") -> None:
        """Hide features behind noise of this deviation, for a wire of this value type.

        Raises:
            ConfigError: ``sigma`` is not positive and finite.
        """
        self._sigma = _check_sigma(sigma)
        self._masks = masks
        self.step = int16_step(sigma) if dtype == "int16" else None

    def protect(self, block: int, features: Array) -> tuple[Floats, Secret]:
        """See :class:`Mode`.

        Raises:
            ConfigError: the mask of this block was used before, or has another shape.
        """
        mask = self._masks.take(block)
        clipped, scale = clip(features)
        return share(clipped, mask, self._sigma, self.step), _Masked(mask, self._sigma, scale)


def check_mode(manifest: Manifest, mode: str | None) -> ModeName:
    """The mode to use: ``mode``, or the bundle's own where that is None.

    Raises:
        ConfigError: the bundle was not made for it.
    """
    for made in manifest.modes:
        if mode in (None, made):  # its own comes first
            return made
    raise ConfigError(
        f"mode is {mode!r}, but bundle {manifest.name!r} was made for {', '.join(manifest.modes)}"
    )


def mode_of(
    manifest: Manifest, mode: str, masks: Masks | None = None, dtype: Dtype | None = None
) -> Mode:
    """The mode for one group, with the bundle's settings, for a wire as in :func:`wire_dtype`.

    Raises:
        ConfigError: the bundle was not made for it, or the masks are missing or not of use.
    """
    if (check_mode(manifest, mode) == "split") != (masks is not None):
        raise ConfigError(f"mode is {mode!r}, and masks are for 'split', and needed there")
    if masks is not None and manifest.split is not None:
        return Split(manifest.split.sigma, masks, wire_dtype(manifest, mode, dtype))
    if mode == "bounded" and manifest.bounded is not None:
        return Bounded(manifest.bounded.sigma)
    return Mix()


def wire_dtype(manifest: Manifest, mode: str, wanted: Dtype | None = None) -> Dtype:
    """The value type for what leaves: ``wanted``, or the bundle's where that is None.

    Raises:
        ConfigError: in the mode split, one that is coarser than what was measured with.
    """
    if mode != "split" or manifest.split is None:
        return wanted or manifest.wire_dtype
    made: Dtype = manifest.split.wire_dtype
    if wanted is None or wanted in _FINER[_FINER.index(made) :]:
        return wanted or made
    raise ConfigError(
        f"wire_dtype is {wanted!r}, which rounds sums with noise of {manifest.split.sigma:g} times"
        f" the features' deviation beyond the bundle's tolerance, expected {made!r} or finer"
    )


# Value types of sums with noise, the coarsest first.
_FINER: tuple[Dtype, ...] = ("float16", "int16", "float32")


def int16_step(sigma: float) -> float:
    """Step of integers of 16 bits for sums with noise of this deviation, a float32.

    It follows from sigma alone. One that followed from the noise would be worse than none: the
    largest sum less the noise that is known to be the largest is a feature.
    """
    return float(np.float32(REACH * sigma / STEPS["int16"]))


def share(clipped: Array, mask: Mask, sigma: float, step: float | None = None) -> Floats:
    """What operator A gets: ``clipped + sigma * Z``, float32.

    It is rounded to :data:`GRID`, or to multiples of ``step`` that 16 bits hold.

    Raises:
        ConfigError: the mask is not for features of this shape.
    """
    if mask.noise.shape != clipped.shape:
        raise ConfigError(f"mask has shape {mask.noise.shape}, expected {clipped.shape}")
    grid = step or GRID
    total = mask.noise * (sigma / grid)
    total += clipped * np.float32(1 / grid)
    np.rint(total, out=total)
    if step is not None:
        np.clip(total, -STEPS["int16"], STEPS["int16"], out=total)
    total *= grid
    return total.astype(np.float32)


def gaussian_bits(values: int, sigma: float) -> float:
    """Capacity of so many Gaussian channels of mean power 1 and noise sigma, in bits.

    Raises:
        ConfigError: ``sigma`` is not positive and finite.
    """
    return values / 2 * math.log1p(1 / _check_sigma(sigma) ** 2) / math.log(2)


def _check_sigma(sigma: float) -> float:
    if not 0 < sigma < math.inf:
        raise ConfigError(f"sigma is {sigma}, expected more than 0, finite")
    return float(sigma)


class _Kept:
    """A secret that shows nothing and stays here."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__.strip('_')}(values=secret)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("what undoes a mode is secret and cannot be pickled or copied")


class _Mixed(_Kept):
    __slots__ = ("_coefficients", "_scale")

    def __init__(self, coefficients: Coefficients, scale: Floats | None = None) -> None:
        self._coefficients = coefficients
        self._scale = scale

    def restore(self, answer: Array) -> Floats:
        features = demix(answer, self._coefficients)
        if self._scale is not None:
            features *= _column(self._scale, features)
        return features

    def wipe(self) -> None:
        self._coefficients.wipe()
        if self._scale is not None:
            wipe(self._scale)


class _Masked(_Kept):
    __slots__ = ("_mask", "_scale", "_sigma")

    def __init__(self, mask: Mask, sigma: float, scale: Floats) -> None:
        self._mask = mask
        self._sigma = np.float32(sigma)
        self._scale = scale

    def restore(self, answer: Array) -> Floats:
        noise = self._mask.answer * self._sigma
        features: Floats = np.subtract(answer, noise, out=noise)
        features *= _column(self._scale, features)
        return features

    def wipe(self) -> None:
        self._mask.wipe()
        wipe(self._scale)


def _column(scale: Floats, rows: Floats) -> Floats:
    return scale.reshape(-1, *[1] * (rows.ndim - 1))
