"""What each part of a split model costs: shapes and FLOPs, computed and never typed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datamix.models.split import Shape, SplitModel
from datamix.models.trace import on_meta, trace


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs per input, two per multiply-add.

    Attributes:
        stem: the device's front part.
        blocks: the cloud's part, one number per round, run layer by layer (the cascade).
        bridges: the device's steps between the rounds.
        head: the device's back part.
        collapsed_blocks: the cheapest known way to compute each block; None where it isn't linear.
        mixing: mix and de-mix in every round, for the group size given to :func:`count_flops`.
    """

    stem: int
    blocks: tuple[int, ...]
    bridges: tuple[int, ...]
    head: int
    collapsed_blocks: tuple[int | None, ...]
    mixing: int = 0

    @property
    def edge(self) -> int:
        """What the device computes."""
        return self.stem + sum(self.bridges) + self.head + self.mixing

    @property
    def cloud(self) -> int:
        """What the cloud computes, layer by layer."""
        return sum(self.blocks)

    @property
    def edge_share(self) -> float:
        """The device's share of all FLOPs, 0 to 1."""
        return self.edge / (self.edge + self.cloud)

    @property
    def edge_share_collapsed(self) -> float:
        """The same against collapsed blocks: a cascade of linear layers flatters the cloud."""
        pairs = zip(self.blocks, self.collapsed_blocks, strict=True)
        cloud = sum(cascade if least is None else least for cascade, least in pairs)
        return self.edge / (self.edge + cloud)


def _norm_flops(shape: Shape, *_: Any, **__: Any) -> int:
    """One multiply-add per value: in eval mode a batch norm is one factor and one offset."""
    return 2 * int(torch.Size(shape).numel())


def _measure(part: nn.Module, shape: Shape) -> tuple[int, Shape]:
    """FLOPs and output shape of one part for one input of ``shape``, all on the meta device."""
    norm = torch.ops.aten.native_batch_norm
    # The packet is counted; naming the overload too keeps torch from decomposing it before that.
    counter = FlopCounterMode(
        display=False, custom_mapping={norm: _norm_flops, norm.default: _norm_flops}
    )
    with torch.no_grad(), counter:
        output = part(torch.empty((1, *shape), device="meta"))
    return int(counter.get_total_flops()), tuple(output.shape[1:])


def count_flops(model: SplitModel, *, group_size: int = 0) -> Flops:
    """Count FLOPs per input by running each part on the meta device.

    Convolutions and matrix products are counted by ``torch.utils.flop_counter``, batch norms as
    one multiply-add per value. Activations, pooling and the factors of :class:`ScaleNorm` (they
    fold into the convolutions) are not counted. ``group_size`` K adds the device's 2 K FLOPs per
    value that is mixed or de-mixed; 0 leaves mixing out.
    """
    stem, shape = _measure(on_meta(model.stem), model.input_shape)
    blocks: list[int] = []
    collapsed: list[int | None] = []
    bridges: list[int] = []
    values = 0
    for index, block in enumerate(model.blocks):
        if index:
            cost, shape = _measure(on_meta(model.bridges[index - 1]), shape)
            bridges.append(cost)
        cascade, output = _measure(on_meta(block), shape)
        blocks.append(cascade)
        collapsed.append(_collapsed(block, cascade, shape, output) if model.linear else None)
        values += _numel(shape) + _numel(output)
        shape = output
    head, _ = _measure(on_meta(model.head), shape)
    return Flops(
        stem,
        tuple(blocks),
        tuple(bridges),
        head,
        tuple(collapsed),
        mixing=2 * group_size * values,
    )


def _numel(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def _collapsed(block: nn.Module, cascade: int, inputs: Shape, outputs: Shape) -> int:
    """The least of: layer by layer, one dense matrix, one large convolution.

    The large convolution is counted as if it were exact; at the borders it isn't quite (zero
    padding cuts the inner layers too), so this never counts the cloud too high.
    """
    costs = [cascade, 2 * _numel(inputs) * _numel(outputs)]
    if (reach := trace(block, inputs).reach) is not None:
        height, width = reach.kernel
        costs.append(2 * height * width * inputs[0] * _numel(outputs))
    return min(costs)


def block_shapes(model: SplitModel) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Input and output shape (C, H, W) of each block, by running the model on the meta device."""
    _, shape = _measure(on_meta(model.stem), model.input_shape)
    shapes = []
    for index, block in enumerate(model.blocks):
        if index:
            _, shape = _measure(on_meta(model.bridges[index - 1]), shape)
        _, output = _measure(on_meta(block), shape)
        shapes.append((_chw(shape), _chw(output)))
        shape = output
    return shapes


def _chw(shape: Shape) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
