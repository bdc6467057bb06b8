"""Muon: steepest descent for convolutions in the spectral norm, which needs few epochs.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); for image networks
with weights of a fixed norm: Jordan, "94% on CIFAR-10 in 3.29 seconds" (arXiv:2404.00498), from
whose code the coefficients and the rescaling come. ``torch.optim.Muon`` takes matrices only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from datamix.errors import ConfigError

_STEPS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)


def is_hidden_kernel(weight: Tensor) -> bool:
    """Whether Muon is meant for a weight: kernels of convolutions that are not depthwise."""
    return weight.ndim == 4 and weight.shape[1] > 1


def orthogonalise(matrix: Tensor) -> Tensor:
    """A matrix (rows, columns) with the same singular vectors and singular values near 1.

    Five Newton-Schulz steps with a quintic that ends between 0.7 and 1.2, close enough for a
    direction of descent and far cheaper than a decomposition.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    direction: Tensor = x.mT if tall else x
    return direction


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for kernels (outputs, inputs, height, width).

    Each step brings a kernel back to norm ``sqrt(outputs)`` first, so that the rate is a relative
    one and a chain of convolutions without norms keeps the scale of its features.
    """

    def __init__(self, kernels: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.6):
        """Take the kernels; all of them must be such as :func:`is_hidden_kernel` says."""
        super().__init__(kernels, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of Nesterov momentum along the orthogonalised direction; no closure is called.

        Raises:
            ConfigError: a closure was given.
        """
        if closure is not None:
            raise ConfigError("Muon got a closure, expected none")
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(kernel)
                momentum: Tensor = state["momentum"]
                momentum.mul_(group["momentum"]).add_(kernel.grad)
                ahead = kernel.grad.add(momentum, alpha=group["momentum"])
                direction = orthogonalise(ahead.flatten(1)).view_as(kernel)
                kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
                kernel.add_(direction, alpha=-group["lr"])
        return None
