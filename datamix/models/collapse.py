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

from datamix.models.split import Shape
from datamix.models.trace import Reach


@dataclass(frozen=True, slots=True)
class Step:
    """One layer of a chain.

    Attributes:
        flops: computed as it is.
        reach: of what it gives (:class:`datamix.models.trace.Reach`); None where it is no
            convolution.
        inputs: shape of what it takes.
        outputs: shape of what it gives.
    """

    flops: int
    reach: Reach | None
    inputs: Shape
    outputs: Shape


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a chain whose order of computation is known; else the module itself."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [layer for child in module for layer in layers_of(child)]
    return [module]


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
    whole: Reach | None = Reach()
    for step in steps:
        whole = whole.then(step.reach) if whole and step.reach else None
    if whole is not None:
        costs.append(2 * math.prod(whole.kernel) * inputs[0] * outputs)
    return min(costs)
