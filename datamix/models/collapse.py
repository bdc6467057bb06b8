"""The cheapest known way to compute a linear block: not layer by layer, if that is not it.

A chain of linear layers is one linear map, and so is every stretch of it. A stretch can be
computed layer by layer, as one large convolution, or as one dense matrix; the block's cost is the
least over all ways to part its chain into stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from datamix.models.layers import Residual, ScaleNorm
from datamix.models.split import Shape


@dataclass(frozen=True, slots=True)
class Window:
    """What a layer is, seen as one convolution.

    Attributes:
        kernel: its side.
        stride: of its places.
    """

    kernel: int
    stride: int

    def then(self, other: Window) -> Window:
        """Both layers as one: the second one's window counts in the first one's places."""
        return Window(self.kernel + (other.kernel - 1) * self.stride, self.stride * other.stride)


@dataclass(frozen=True, slots=True)
class Step:
    """One layer of a chain.

    Attributes:
        flops: computed as it is.
        window: see :class:`Window`; None where it is no convolution.
        inputs: shape of what it takes.
        outputs: shape of what it gives.
    """

    flops: int
    window: Window | None
    inputs: Shape
    outputs: Shape


def window(layer: nn.Module) -> Window | None:
    """What ``layer`` is as one convolution; None if it is none that we know."""
    match layer:
        case nn.Conv2d(kernel_size=(side, other), stride=(down, right), dilation=(1, 1)):
            return Window(side, down) if side == other and down == right else None
        case ScaleNorm() | nn.Identity():
            return Window(1, 1)
        case Residual():
            inner = window(layer.inner)
            # The shortcut is a window of one place, which the inner layers' holds.
            return inner if inner is not None and inner.stride == 1 else None
        case nn.Sequential():
            whole = Window(1, 1)
            for part in layer:
                found = window(part)
                if found is None:
                    return None
                whole = whole.then(found)
            return whole
    return None


def least_flops(steps: Sequence[Step]) -> int:
    """FLOPs per input of the cheapest way to part the chain into stretches."""
    least = [0]
    for end in range(1, len(steps) + 1):
        least.append(min(least[start] + _stretch(steps[start:end]) for start in range(end)))
    return least[-1]


def _stretch(steps: Sequence[Step]) -> int:
    """The least of: layer by layer, one dense matrix, one large convolution.

    The large convolution is counted as if it were exact; at the borders it isn't quite (zero
    padding cuts the inner layers too), so this never counts the cloud too high.
    """
    inputs, outputs = steps[0].inputs, math.prod(steps[-1].outputs)
    costs = [sum(step.flops for step in steps), 2 * math.prod(inputs) * outputs]
    whole: Window | None = Window(1, 1)
    for step in steps:
        whole = whole.then(step.window) if whole and step.window else None
    if whole is not None:
        costs.append(2 * whole.kernel**2 * inputs[0] * outputs)
    return min(costs)
