"""Anybody's ``nn.Sequential`` as a split model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from datamix.errors import ConfigError
from datamix.models.layers import Whiten
from datamix.models.split import Shape, SplitModel
from datamix.models.trace import output_shape, trace
from datamix.models.variants import linear_copy

MakeBridge = Callable[[int], nn.Module]
"""From a number of channels to what the device does with a block's de-mixed output."""


def norm_relu(channels: int) -> nn.Module:
    """What makes up for a linear block: (n, C, H, W) -> the same shape."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def split_model(
    module: nn.Sequential,
    cuts: Sequence[int],
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    linear: bool = False,
    bridge: MakeBridge | None = None,
) -> SplitModel:
    """Split a chain of layers between device and cloud.

    ``cuts`` are the places where the side changes: device, cloud, device, ..., device. ``[a, b]``
    makes the stem ``module[:a]``, one block ``module[a:b]`` and the head ``module[b:]``;
    ``[a, b, c, d]`` makes two blocks, ``module[a:b]`` and ``module[c:d]``, with the bridge
    ``module[b:c]``, which may be empty. Stem, blocks and head may not.

    With ``linear=False`` the parts hold the module's own layers, weights and all, so that the split
    model computes what the module does. With ``linear=True`` the blocks are copies that are exactly
    linear (:func:`datamix.models.variants.linear_copy`), and the device makes up for it: the stem
    ends in :class:`Whiten`, each bridge is norm, ReLU, the module's own layers if any, and
    :class:`Whiten`, and the head starts with norm and ReLU. Such a model has to be trained.

    Args:
        module: (n, *input_shape) -> (n, classes).
        cuts: an even number of indices in ascending order.
        input_shape: (C, H, W) of one input.
        classes: outputs.
        linear: whether to make the blocks linear.
        bridge: what to use for norm and ReLU; with ``linear=False`` it stands before the module's
            own layers of each bridge, where there is nothing else.

    Raises:
        ConfigError: cuts that don't fit the module, a block whose inputs or outputs are not
            (C, H, W), or one that cannot be made linear.
    """
    layers = list(module)
    _check_cuts(cuts, len(layers))
    stem, *middle, head = [layers[start:end] for start, end in pairwise((0, *cuts, len(layers)))]
    return assemble(
        stem,
        middle[::2],
        middle[1::2],
        head,
        input_shape=input_shape,
        classes=classes,
        make_over=linear_copy if linear else None,
        bridge=bridge or (norm_relu if linear else None),
    )


def assemble(
    stem: list[nn.Module],
    blocks: list[list[nn.Module]],
    bridges: list[list[nn.Module]],
    head: list[nn.Module],
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    make_over: Callable[[nn.Module, Shape, str], nn.Module] | None = None,
    bridge: MakeBridge | None = None,
) -> SplitModel:
    """Put lists of layers together as a split model; it finds out whether its blocks are linear.

    Args:
        stem: the layers on the device before the first block.
        blocks: the layers of each block.
        bridges: the layers of each bridge, one list fewer than blocks.
        head: the layers on the device after the last block.
        input_shape: (C, H, W) of one input.
        classes: outputs.
        make_over: from a block, the shape of its input and its name to the block that takes its
            place. The device then whitens what it sends and starts the head with norm and ReLU.
        bridge: what each bridge starts with.

    Raises:
        ConfigError: layers that don't fit each other, or a row that is not (C, H, W).
    """
    fronts: list[nn.Module] = []  # what runs before each block: the stem, then the bridges
    parts: list[nn.Module] = []
    linear, shape = True, input_shape
    for index, (before, layers) in enumerate(zip([stem, *bridges], blocks, strict=True)):
        front = nn.Sequential(*before)
        if index and bridge is not None:
            front.insert(0, bridge(shape[0]))
        shape = _row(front, shape, f"bridge {index - 1}" if index else "the stem")
        part: nn.Module = nn.Sequential(*layers)
        name = f"block {index}"
        after = _row(part, shape, name)
        if make_over is not None:
            front.append(Whiten(shape[0]))
            part = make_over(part, shape, name)
        linear = linear and trace(part, shape).problem is None
        fronts.append(front)
        parts.append(part)
        if not index:
            channels = shape[0]
        shape = after
    end = nn.Sequential(*([] if make_over is None else [norm_relu(shape[0])]), *head)
    found = _output(end, shape, "the head")
    if found != (classes,):
        raise ConfigError(f"the head's output has shape {found}, expected {(classes,)}")
    return SplitModel(
        fronts[0],
        parts,
        fronts[1:],
        end,
        edge_head=lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        ),
        input_shape=input_shape,
        classes=classes,
        linear=linear,
    )


def _output(part: nn.Module, shape: Shape, name: str) -> Shape:
    try:
        return output_shape(part, shape)
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:160]
        raise ConfigError(f"{name} does not take inputs of shape {shape}: {first}") from None


def _row(part: nn.Module, shape: Shape, name: str) -> tuple[int, int, int]:
    """The shape of what a part gives, which must be fit to cross the wire."""
    found = _output(part, shape, name)
    if len(found) != 3:
        raise ConfigError(f"{name} gives rows of shape {found}, expected (C, H, W)")
    return found[0], found[1], found[2]


def _check_cuts(cuts: Sequence[int], layers: int) -> None:
    if len(cuts) < 2 or len(cuts) % 2:
        raise ConfigError(f"got {len(cuts)} cuts, expected an even number of at least 2")
    bounds = (0, *cuts, layers)
    for place, (start, end) in enumerate(pairwise(bounds)):
        # Stem, block, bridge, block, ..., head: only a bridge may be empty.
        is_bridge = place % 2 == 0 and 0 < place < len(cuts)
        if start > end or (start == end and not is_bridge):
            raise ConfigError(
                f"cuts are {list(cuts)}, expected ascending ones from 1 to {layers - 1}"
                " with layers in the stem, each block and the head"
            )
