"""What the wire's value types do to features, in torch: the numbers of :mod:`datamix.wire`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Wire = Literal["float32", "float16", "int8"]
_TINY = torch.finfo(torch.float32).tiny


def rounded(rows: Tensor, wire: Wire) -> Tensor:
    """Rows (n, *shape) as they arrive: float16 rounds, int8 has 127 steps each way per row."""
    match wire:
        case "float32":
            return rows
        case "float16":
            return rows.half().float()
        case "int8":
            flat = rows.reshape(len(rows), -1).float()
            scale = (flat.abs().amax(dim=1, keepdim=True) / 127).clamp(min=_TINY)
            return ((flat / scale).round() * scale).reshape(rows.shape)
