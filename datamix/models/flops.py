"""Shapes and FLOPs of each part of a split model, computed and never typed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datamix.models.collapse import Step, layers_of, least_flops
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


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a split model, for one input.

    Attributes:
        name: ``stem``, ``block 0``, ``bridge 0`` ... ``head``, in the order of computation.
        module: the part; on the meta device, in eval mode.
        input_shape: of what goes in.
        output_shape: of what comes out.
        flops: two per multiply-add.
    """

    name: str
    module: nn.Module
    input_shape: Shape
    output_shape: Shape
    flops: int

    @property
    def on_device(self) -> bool:
        """Whether the device runs it, and not the cloud."""
        return not self.name.startswith("block")


def parts_of(model: SplitModel) -> list[Part]:
    """The parts in the order of computation, each measured by running it on the meta device."""
    modules = [("stem", model.stem)]
    for index, block in enumerate(model.blocks):
        if index:
            modules.append((f"bridge {index - 1}", model.bridges[index - 1]))
        modules.append((f"block {index}", block))
    modules.append(("head", model.head))
    found: list[Part] = []
    shape: Shape = model.input_shape
    for name, module in modules:
        empty = on_meta(module)
        flops, output = _measure(empty, shape)
        found.append(Part(name, empty, shape, output, flops))
        shape = output
    return found


def _measure(part: nn.Module, shape: Shape) -> tuple[int, Shape]:
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
    stem, *middle, head = parts_of(model)
    blocks, bridges = middle[::2], middle[1::2]
    values = sum(values_in(block.input_shape) + values_in(block.output_shape) for block in blocks)
    return Flops(
        stem.flops,
        tuple(block.flops for block in blocks),
        tuple(bridge.flops for bridge in bridges),
        head.flops,
        tuple(collapsed(block) for block in blocks),
        mixing=2 * group_size * values,
    )


def values_in(shape: Shape) -> int:
    """How many values a tensor of this shape has."""
    return int(torch.Size(shape).numel())


def collapsed(block: Part) -> int | None:
    """FLOPs of the cheapest known way to compute a linear block; None if it isn't linear.

    Linearity, and how large the convolution has to be that does the same as a layer, are read off
    the operations that run.
    """
    if trace(block.module, block.input_shape).problem is not None:
        return None
    steps: list[Step] = []
    shape = block.input_shape
    for layer in layers_of(block.module):
        flops, output = _measure(layer, shape)
        steps.append(Step(flops, trace(layer, shape).reach, shape, output))
        shape = output
    return least_flops(steps)


def block_shapes(model: SplitModel) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Input and output shape (C, H, W) of each block, by running the model on the meta device."""
    return [
        (_chw(part.input_shape), _chw(part.output_shape))
        for part in parts_of(model)
        if not part.on_device
    ]


def _chw(shape: Shape) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
