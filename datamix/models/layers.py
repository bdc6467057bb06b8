"""Layers that several networks are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CLAMP = 4.0
"""Features leave the device within +-4 deviations, so that float16 and int8 lose little."""


class ScaleNorm(nn.Module):
    """``x * gain / sqrt(mean of x^2)`` per channel: a norm without offset, so a linear one.

    Training uses the batch's mean square and keeps its moving average; eval uses the average
    only, which makes the layer one fixed factor per channel.
    """

    square: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        """Start with mean square 1 and gain 1."""
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.register_buffer("square", torch.ones(channels))
        self.momentum = momentum
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> the same shape."""
        square = self.square
        if self.training:
            # In float32 under autocast, too: the average moves by parts that bfloat16 loses.
            square = x.float().square().mean(dim=(0, 2, 3))
            with torch.no_grad():
                self.square.lerp_(square, self.momentum)
        factor = self.gain * torch.rsqrt(square + self.eps)
        return x * factor.to(x.dtype)[:, None, None]


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride), without a bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class Whiten(nn.Sequential):
    """Zero mean and unit variance per channel, then clamped: what leaves the device."""

    def __init__(self, channels: int) -> None:
        """No learned scale: the wire's rounding is relative to a unit variance."""
        super().__init__(
            nn.BatchNorm2d(channels, affine=False), nn.Hardtanh(min_val=-_CLAMP, max_val=_CLAMP)
        )


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, *inner: nn.Module) -> None:
        """Chain the inner layers; they keep the shape."""
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> the same shape."""
        kept: Tensor = x + self.inner(x)
        return kept


class PReLU(nn.Module):
    """``x`` where it is positive, ``slope * x`` elsewhere, one learned slope per channel.

    The slopes start close to 1, at an almost linear layer: cross-talk between the members of a
    group comes from what is not linear, so training decides how much of it pays.
    """

    def __init__(self, channels: int, start: float = 0.9) -> None:
        """Let all slopes start at ``start``."""
        super().__init__()
        self.slope = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> the same shape."""
        return nn.functional.prelu(x, self.slope.to(x.dtype))
