"""Fewer passes over memory for the same function: norms folded into the convolutions before them.

In eval mode a norm is one factor and one offset per channel. After a convolution both disappear in
its weights; elsewhere the factor is computed once and not for every batch.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import torch
from torch import Tensor, nn

from datamix.models import ScaleNorm


class Factor(nn.Module):
    """``x * factor``, one factor per channel: what is left of a :class:`ScaleNorm`."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        """Keep the factors, (C,)."""
        super().__init__()
        self.register_buffer("factor", factor[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> the same shape."""
        return x * self.factor


def fuse(module: nn.Module) -> nn.Module:
    """A copy of a module for inference, in eval mode, with its norms folded where that is possible.

    Looks into every ``nn.Sequential``, whose order of computation is known. Everything else stays
    as it is. Results differ by rounding only.
    """
    copy = deepcopy(module).eval().requires_grad_(False)
    uses = Counter(id(part) for _, part in copy.named_modules(remove_duplicate=False))
    with torch.no_grad():
        return _fused(copy, uses).eval()


def _fused(module: nn.Module, uses: Counter[int]) -> nn.Module:
    for name, child in list(module.named_children()):
        setattr(module, name, _fused(child, uses))
    if isinstance(module, ScaleNorm):
        return Factor(_factor(module).float())
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return nn.Sequential(*_folded(list(module), uses))
    return module


def _folded(parts: list[nn.Module], uses: Counter[int]) -> list[nn.Module]:
    """The parts of a chain, without the norms that follow a convolution."""
    kept: list[nn.Module] = []
    for part in parts:
        before = kept[-1] if kept else None
        # A convolution that stands in several places keeps its weights: they are the others', too.
        if isinstance(before, nn.Conv2d) and uses[id(before)] == 1:
            if isinstance(part, Factor):
                _scale(before, part.factor.flatten().double(), None)
                continue
            if isinstance(part, nn.BatchNorm2d) and part.running_var is not None:
                _scale(before, *_line(part))
                continue
        kept.append(part)
    return kept


def _factor(norm: ScaleNorm) -> Tensor:
    return norm.gain.double() * torch.rsqrt(norm.square.double() + norm.eps)


def _line(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and offset per channel of a batch norm in eval mode, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.affine:
        factor = factor * norm.weight.double()
    offset = -norm.running_mean.double() * factor
    return factor, offset + norm.bias.double() if norm.affine else offset


def _scale(convolution: nn.Conv2d, factor: Tensor, offset: Tensor | None) -> None:
    """Let the convolution give ``factor * output + offset``."""
    weight = convolution.weight
    weight.copy_(weight.double() * factor[:, None, None, None])
    if convolution.bias is not None:
        bias = convolution.bias.double() * factor
        convolution.bias.copy_(bias if offset is None else bias + offset)
    elif offset is not None:
        convolution.bias = nn.Parameter(offset.to(weight.dtype), requires_grad=False)
