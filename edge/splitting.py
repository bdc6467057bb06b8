"""Sigma, wire type and tolerance of the mode split, chosen together for a network and checked.

More noise leaks less, and what rounds the sum of features and noise costs exactness. So sigma is
the smallest that keeps the bound on what operator A learns of an input, and the wire's type the
coarsest with which the de-noised outputs are as exact as they are told to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from datamix.bundle import MAX_SIGMA, SplitSpec
from datamix.errors import ConfigError
from datamix.models import SplitModel
from datamix.noise import gaussians
from datamix.wire import Dtype, dequantise, quantise
from edge.masks import Mask, Masks, draw_seeds
from edge.modes import Split

Floats = npt.NDArray[np.float32]
WireType = Literal["float16", "int16", "float32"]

BITS_PER_INPUT = 0.05
"""Most that operator A may learn of one input, all rounds together, unless asked otherwise."""

_MOST_BITS = 10  # per value: far more than float16 holds of a feature that noise is added to

CHANGED = 0.01
"""Largest share of inputs that may change their class through the rounding of sums with noise. As
many change for better as for worse, about: the accuracy moves far less."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How exact one combination is.

    Attributes:
        spec: the combination; its tolerance is twice the largest error, as the manifest's is.
        error: root mean square of the errors of the blocks' outputs, the worst block's.
        changed: share of the inputs whose class changes.
    """

    spec: SplitSpec
    error: float
    changed: float


def sigma_for(values: int, bits: float) -> float:
    """The smallest sigma, in two significant digits, at which ``values`` leak ``bits`` at most.

    Solves ``values / 2 * log2(1 + 1 / sigma^2) = bits``.

    Raises:
        ConfigError: ``bits`` is not positive, or more than 10 per value.
    """
    if not 0 < bits <= _MOST_BITS * values:
        raise ConfigError(f"bits is {bits}, expected more than 0, at most {_MOST_BITS} per value")
    exact = 1 / math.sqrt(math.expm1(2 * math.log(2) * bits / values))
    step = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return float(f"{math.ceil(exact / step - 1e-9) * step:.6g}")


def choose(model: SplitModel, inputs: Floats, bits: float = BITS_PER_INPUT) -> SplitSpec | None:
    """The combination for a network with linear blocks; None where no wire is exact enough.

    Args:
        model: in eval mode.
        inputs: (n, *input_shape) float32, preprocessed, to measure errors with; none that the
            network learnt from, of which it is surer than of others.
        bits: most that operator A may learn of one input.

    Raises:
        ConfigError: the blocks are not linear, or ``bits`` makes no sense.
    """
    values = sum(math.prod(shape) for shape in _input_shapes(model, inputs[:1]))
    sigma = sigma_for(values, bits)
    if sigma > MAX_SIGMA:  # sums would leave what float16 holds, and cost float32 three digits
        return None
    for sixteen_bits in ("float16", "int16"):
        found = measure(model, inputs, sigma, sixteen_bits)
        if found.changed <= CHANGED:
            return found.spec
    single = measure(model, inputs, sigma, "float32")
    return single.spec if single.spec.tolerance < 1 else None


def measure(model: SplitModel, inputs: Floats, sigma: float, wire_dtype: WireType) -> Fit:
    """Compare de-noised outputs with exact ones, block by block, errors of earlier rounds included.

    Raises:
        ConfigError: the blocks are not linear.
    """
    if not model.linear:
        raise ConfigError("the blocks are not linear, expected linear ones: noise would not cancel")
    worst, error = 0.0, 0.0
    with torch.inference_mode():
        exact = model.stem(torch.from_numpy(inputs))
        sent = exact.numpy()
        for index, block in enumerate(model.blocks):
            if index:
                exact = model.bridges[index - 1](exact)
                sent = model.bridges[index - 1](torch.from_numpy(sent)).numpy()
            exact = block(exact)
            sent = _round_trip(block, sent, sigma, wire_dtype)
            off = np.abs(sent - exact.numpy())
            worst = max(worst, float((off / np.maximum(1, np.abs(exact.numpy()))).max()))
            error = max(error, float(np.sqrt(np.square(off).mean())))
        changed = model.head(exact).argmax(1) != model.head(torch.from_numpy(sent)).argmax(1)
    tolerance = float(f"{min(1.0, max(1e-6, 2 * worst)):.2g}")
    spec = SplitSpec(sigma=sigma, wire_dtype=wire_dtype, tolerance=tolerance)
    return Fit(spec, error, float(changed.float().mean()))


def local_masks(
    blocks: Sequence[torch.nn.Module], shapes: Sequence[tuple[int, ...]], rows: int
) -> Masks:
    """Masks whose answers are computed here, where there is no second operator to ask.

    For measuring only: a device has no backbone.
    """
    masks = []
    for block, shape in zip(blocks, shapes, strict=True):
        seeds = draw_seeds(rows)
        noise = np.stack([gaussians(seed.tobytes(), shape) for seed in seeds])
        with torch.inference_mode():
            answer = block(torch.from_numpy(noise.astype(np.float32))).numpy()
        masks.append(Mask(noise, answer))
    return Masks(masks)


def rounded(values: Floats, dtype: Dtype, step: float | None = None) -> Floats:
    """What the wire does to values (rows, *shape), each way."""
    return dequantise(*quantise(values, dtype, step=step))


def _round_trip(block: torch.nn.Module, rows: Floats, sigma: float, wire_dtype: WireType) -> Floats:
    masks = local_masks([block], [rows.shape[1:]], len(rows))
    mode = Split(sigma, masks, wire_dtype)
    leaving, secret = mode.protect(0, rows)
    answer = block(torch.from_numpy(rounded(leaving, wire_dtype, mode.step))).numpy()
    return secret.restore(rounded(answer, wire_dtype))


def _input_shapes(model: SplitModel, one: Floats) -> list[tuple[int, ...]]:
    shapes = []
    with torch.inference_mode():
        features = model.stem(torch.from_numpy(one))
        for index, block in enumerate(model.blocks):
            if index:
                features = model.bridges[index - 1](features)
            shapes.append(tuple(features.shape[1:]))
            features = block(features)
    return shapes
