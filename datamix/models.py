"""Split models: stem | blocks with bridges between them | head, and what each part costs.

The device runs ``stem``, ``bridges`` and ``head``; the cloud runs ``blocks``. In eval mode the
device's parts treat every member of a group on its own (fixed statistics only), and a block of a
linear model is exactly linear: no bias, no activation, norms that only scale. Mixtures then de-mix
to what the unmixed features would have given, for every matrix of coefficients.

    stem -> blocks[0] -> bridges[0] -> blocks[1] -> ... -> blocks[-1] -> head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datamix.errors import ConfigError

Shape = tuple[int, ...]

_CLAMP = 4.0
"""Features leave the device within +-4 deviations, so that float16 and int8 lose little."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A name that :func:`build` knows, and its options; what is left out takes the default."""

    name: str
    options: Mapping[str, int | str] = field(default_factory=dict)


class SplitModel(nn.Module):
    """A network in three parts: stem, blocks with bridges, head.

    Attributes:
        stem: (n, *input_shape) -> (n, C, H, W); runs on the device.
        blocks: each (n, C, H, W) -> (n, C', H', W'); run in the cloud.
        bridges: the device's step between two blocks, one fewer than blocks.
        head: last block's output -> (n, classes) logits; runs on the device.
        edge_head: builds a fresh head for the stem's output: the edge-only baseline's.
        linear: whether every block is exactly linear in eval mode.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: list[nn.Module],
        bridges: list[nn.Module],
        head: nn.Module,
        *,
        edge_head: Callable[[], nn.Module],
        input_shape: tuple[int, int, int],
        classes: int,
        linear: bool,
    ) -> None:
        """Put the parts together; there is one bridge between each two blocks."""
        super().__init__()
        if len(bridges) != len(blocks) - 1:
            raise ConfigError(f"got {len(bridges)} bridges, expected {len(blocks) - 1}")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.bridges = nn.ModuleList(bridges)
        self.head = head
        self.edge_head = edge_head
        self.input_shape: tuple[int, int, int] = input_shape
        self.classes = classes
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        """The unmixed path: (n, *input_shape) float32 -> (n, classes) logits."""
        features = self.blocks[0](self.stem(inputs))
        for bridge, block in zip(self.bridges, list(self.blocks)[1:], strict=True):
            features = block(bridge(features))
        logits: Tensor = self.head(features)
        return logits


# ------------------------------------------------------------------ convnet: linear blocks


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
            square = x.square().mean(dim=(0, 2, 3))
            with torch.no_grad():
                self.square.lerp_(square, self.momentum)
        return x * (self.gain * torch.rsqrt(square + self.eps))[:, None, None]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
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


class LinearBlock(nn.Sequential):
    """A cascade of bias-free convolutions without activations: one linear map.

    An entry convolution, ``depth`` residual pairs, and norms that only scale; the last one brings
    the output back to unit mean square, so that float16 loses little on the way home.
    """

    def __init__(self, inputs: int, width: int, stride: int, depth: int) -> None:
        """(n, inputs, H, W) -> (n, width, H / stride, W / stride)."""
        pairs = [
            Residual(
                _conv3x3(width, width), ScaleNorm(width), _conv3x3(width, width), ScaleNorm(width)
            )
            for _ in range(depth)
        ]
        super().__init__(
            _conv3x3(inputs, width, stride), ScaleNorm(width), *pairs, ScaleNorm(width)
        )
        # The whole cascade as one convolution: each 3x3 after the entry widens the kernel by
        # two of the output's pixels, which are `stride` pixels of the input each.
        self.collapsed_kernel = 3 + 4 * depth * stride


def _convnet_head(shape: tuple[int, int, int], hidden: int, classes: int) -> nn.Sequential:
    channels, height, width = shape
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * height * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def _convnet(
    n_blocks: int, stem_width: int, width: int, depth: int, hidden: int, classes: int
) -> SplitModel:
    """For 1x28x28: stem to (stem_width, 14, 14), every block to (width, 7, 7)."""
    stem = nn.Sequential(
        _conv3x3(1, stem_width, stride=2),
        nn.BatchNorm2d(stem_width),
        nn.ReLU(),
        Residual(
            _conv3x3(stem_width, stem_width),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            _conv3x3(stem_width, stem_width),
            nn.BatchNorm2d(stem_width),
        ),
        Whiten(stem_width),
    )
    blocks: list[nn.Module] = [LinearBlock(stem_width, width, 2, depth)]
    blocks += [LinearBlock(width, width, 1, depth) for _ in range(n_blocks - 1)]
    bridges: list[nn.Module] = [
        nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), Whiten(width)) for _ in range(n_blocks - 1)
    ]
    return SplitModel(
        stem,
        blocks,
        bridges,
        _convnet_head((width, 7, 7), hidden, classes),
        edge_head=lambda: _convnet_head((stem_width, 14, 14), hidden, classes),
        input_shape=(1, 28, 28),
        classes=classes,
        linear=True,
    )


# ------------------------------------------------------------------ ResNet-18: non-linear block


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 (He et al., arXiv:1512.03385), projection where needed."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        super().__init__()
        self.inner = nn.Sequential(
            _conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            _conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        return torch.relu(self.inner(x) + self.shortcut(x))


_RESNET18_STAGES = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))


def _resnet18(cut: int, image_size: int, classes: int) -> SplitModel:
    """Cut after ``cut`` of the four stages (0: right after the first convolution)."""
    entry: list[nn.Module]
    if image_size == 32:
        entry = [_conv3x3(3, 64), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        entry = [
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
    stages = [
        nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))
        for inputs, outputs, stride in _RESNET18_STAGES
    ]
    # Averaging is linear, so it commutes with de-mixing: done in the cloud it makes the answer
    # 16 times (32x32) or 49 times (224x224) smaller.
    block = nn.Sequential(*stages[cut:], nn.AdaptiveAvgPool2d(1))
    channels = 64 if cut == 0 else _RESNET18_STAGES[cut - 1][1]
    return SplitModel(
        nn.Sequential(*entry, *stages[:cut]),
        [block],
        [],
        nn.Sequential(nn.Flatten(), nn.Linear(512, classes)),
        edge_head=lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        ),
        input_shape=(3, image_size, image_size),
        classes=classes,
        linear=False,
    )


# ------------------------------------------------------------------ build


def build(architecture: Architecture) -> SplitModel:
    """Make an untrained model.

    ``convnet`` (1x28x28, linear blocks): n_blocks 1..4 (2), stem_width (16), width (64), depth:
    residual pairs per block (1), hidden (128), classes (10).
    ``resnet18`` (non-linear block): image_size 32 or 224 (32), cut 0..3: stages on the device (1),
    classes (10). A cut after stage 4 is refused: it would leave the cloud nothing but an average.

    Weights come from torch's global generator: seed it first. Under ``torch.device("meta")``
    nothing is allocated.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    match architecture.name:
        case "convnet":
            options = _Options(architecture)
            model = _convnet(
                n_blocks=options.take("n_blocks", 2, 1, 4),
                stem_width=options.take("stem_width", 16, 1, 256),
                width=options.take("width", 64, 1, 1024),
                depth=options.take("depth", 1, 0, 8),
                hidden=options.take("hidden", 128, 1, 4096),
                classes=options.take("classes", 10, 2, 10_000),
            )
        case "resnet18":
            options = _Options(architecture)
            image_size = options.take("image_size", 32, 32, 224)
            if image_size not in (32, 224):
                raise ConfigError(f"resnet18: image_size is {image_size}, expected 32 or 224")
            model = _resnet18(
                cut=options.take("cut", 1, 0, 3),
                image_size=image_size,
                classes=options.take("classes", 10, 2, 10_000),
            )
        case _:
            raise ConfigError(
                f"architecture is {architecture.name!r}, expected 'convnet' or 'resnet18'"
            )
    options.end()
    return model


class _Options:
    """Hands out options with their ranges checked, and refuses what nobody took."""

    def __init__(self, architecture: Architecture) -> None:
        self._name = architecture.name
        self._left: dict[str, int | str] = dict(architecture.options)

    def take(self, key: str, default: int, low: int, high: int) -> int:
        value = self._left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"{self._name}: {key} is {value!r}, expected an integer from {low} to {high}"
            )
        return value

    def end(self) -> None:
        if self._left:
            raise ConfigError(f"{self._name}: unknown option {min(self._left)!r}")


# ------------------------------------------------------------------ shapes and costs


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


def _on_meta(part: nn.Module) -> nn.Module:
    """A copy in eval mode that holds shapes and no values."""
    return deepcopy(part).to("meta").eval()


def count_flops(model: SplitModel, *, group_size: int = 0) -> Flops:
    """Count FLOPs per input by running each part on the meta device.

    Convolutions and matrix products are counted by ``torch.utils.flop_counter``, batch norms as
    one multiply-add per value. Activations, pooling and the factors of :class:`ScaleNorm` (they
    fold into the convolutions) are not counted. ``group_size`` K adds the device's 2 K FLOPs per
    value that is mixed or de-mixed; 0 leaves mixing out.
    """
    stem, shape = _measure(_on_meta(model.stem), model.input_shape)
    blocks: list[int] = []
    collapsed: list[int | None] = []
    bridges: list[int] = []
    values = 0
    for index, block in enumerate(model.blocks):
        if index:
            cost, shape = _measure(_on_meta(model.bridges[index - 1]), shape)
            bridges.append(cost)
        cascade, output = _measure(_on_meta(block), shape)
        blocks.append(cascade)
        collapsed.append(_collapsed(block, cascade, shape, output) if model.linear else None)
        values += _numel(shape) + _numel(output)
        shape = output
    head, _ = _measure(_on_meta(model.head), shape)
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
    if isinstance(block, LinearBlock):
        costs.append(2 * block.collapsed_kernel**2 * inputs[0] * _numel(outputs))
    return min(costs)


def block_shapes(model: SplitModel) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Input and output shape (C, H, W) of each block, by running the model on the meta device."""
    _, shape = _measure(_on_meta(model.stem), model.input_shape)
    shapes = []
    for index, block in enumerate(model.blocks):
        if index:
            _, shape = _measure(_on_meta(model.bridges[index - 1]), shape)
        _, output = _measure(_on_meta(block), shape)
        shapes.append((_chw(shape), _chw(output)))
        shape = output
    return shapes


def _chw(shape: Shape) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
