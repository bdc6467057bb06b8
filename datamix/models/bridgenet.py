"""A compact network whose cloud part is linear and whose non-linearity sits in rich bridges.

What a linear block buys grows with its width and not with its depth, because a chain of
convolutions is one convolution. So each block is one wide convolution, and the device spends a few
per cent of the FLOPs on a bridge that is worth two layers: norm, ReLU, 1x1 convolution, norm, ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from datamix.errors import ConfigError
from datamix.models.layers import PReLU, Residual, ScaleNorm, Whiten, conv3x3
from datamix.models.split import SplitModel

Cloud = Literal["linear", "relu", "prelu"]


@dataclass(frozen=True, slots=True)
class BridgeNet:
    """Sizes of the network.

    Attributes:
        input_shape: (C, H, W).
        stem_width: channels of the stem, half as high and wide as the input.
        sent_width: channels of the features that leave the device, by a learned 1x1 projection at
            the stem's end; 0: there is none, and all ``stem_width`` leave. Where noise bounds what
            a value can tell, fewer values tell less.
        stem_units: residual units of a depthwise and a 1x1 convolution in the stem.
        widths: channels of each section of the cloud's part.
        strides: of each section's first convolution.
        depth: 3x3 convolutions per section.
        rounds: trips to the cloud; the sections are dealt out to so many blocks, and what stands
            between two sections of one block is the cloud's.
        bridge: ``pointwise`` as above, or ``relu``: norm and ReLU only.
        neck: channels of a 1x1 convolution at the head's start; 0: there is none.
        hidden: units of the head's hidden layer; 0: average over places, then one layer.
        classes: outputs.
        cloud: what stands between the convolutions of a block: nothing (``linear``), batch norm
            and ReLU (``relu``), or a norm without offset and PReLU (``prelu``).
    """

    input_shape: tuple[int, int, int] = (1, 28, 28)
    stem_width: int = 32
    sent_width: int = 0
    stem_units: int = 2
    widths: tuple[int, ...] = (96, 128, 192)
    strides: tuple[int, ...] = (2, 1, 2)
    depth: int = 1
    rounds: int = 3
    bridge: Literal["pointwise", "relu"] = "pointwise"
    neck: int = 0
    hidden: int = 0
    classes: int = 10
    cloud: Cloud = "linear"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if len(self.widths) != len(self.strides):
            raise ConfigError(
                f"bridgenet: got {len(self.widths)} widths and {len(self.strides)} strides,"
                " expected as many of both"
            )
        if not 1 <= self.rounds <= len(self.widths):
            raise ConfigError(
                f"bridgenet: rounds is {self.rounds}, expected 1 to {len(self.widths)},"
                " the number of widths"
            )

    def build(self) -> SplitModel:
        """The untrained network."""
        width = self._leaving
        sizes = [-(-size // 2) for size in self.input_shape[1:]]
        blocks: list[list[nn.Module]] = []
        bridges: list[nn.Module] = []
        for index, (wider, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            if self._starts_a_block(index):
                if blocks:
                    bridges.append(nn.Sequential(*self._bridge(width), Whiten(width)))
                blocks.append([])
            else:
                blocks[-1] += self._between(width)
            blocks[-1] += self._section(width, wider, stride)
            width, sizes = wider, [-(-size // stride) for size in sizes]
        return SplitModel(
            self._stem(),
            [nn.Sequential(*block) for block in blocks],
            bridges,
            self._head(width, sizes),
            edge_head=self._edge_head,
            input_shape=self.input_shape,
            classes=self.classes,
            linear=self.cloud == "linear",
        )

    @property
    def _leaving(self) -> int:
        """Channels of the stem's output."""
        return self.sent_width or self.stem_width

    def _starts_a_block(self, index: int) -> bool:
        """Whether section ``index`` is the first one of its round; rounds are as even as can be."""
        share = len(self.widths) / self.rounds
        return index == 0 or int(index / share) != int((index - 1) / share)

    def _stem(self) -> nn.Module:
        width = self.stem_width
        units = [
            Residual(*_depthwise(width), *_norm_relu(width), *_pointwise(width, width))
            for _ in range(self.stem_units)
        ]
        entry = conv3x3(self.input_shape[0], width, stride=2)
        projection = [nn.Conv2d(width, self.sent_width, 1, bias=False)] if self.sent_width else []
        last = Whiten(self._leaving)
        return nn.Sequential(entry, *_norm_relu(width), *units, *projection, last)

    def _section(self, inputs: int, width: int, stride: int) -> list[nn.Module]:
        layers: list[nn.Module] = [conv3x3(inputs, width, stride)]
        for _ in range(self.depth - 1):
            layers += [*self._activation(width), conv3x3(width, width)]
        return layers

    def _activation(self, width: int) -> list[nn.Module]:
        match self.cloud:
            case "linear":
                return []
            case "relu":
                return _norm_relu(width)
            case "prelu":
                return [ScaleNorm(width), PReLU(width)]

    def _between(self, width: int) -> list[nn.Module]:
        """What would be a bridge, inside a block: the cloud's activations for the device's."""
        if self.cloud == "linear" or self.bridge == "relu":
            return self._activation(width)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        return [*self._activation(width), pointwise, *self._activation(width)]

    def _bridge(self, width: int) -> list[nn.Module]:
        if self.bridge == "relu":
            return _norm_relu(width)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        return [*_norm_relu(width), pointwise, *_norm_relu(width)]

    def _head(self, width: int, sizes: list[int]) -> nn.Module:
        layers = _norm_relu(width)
        if self.neck:
            layers += [nn.Conv2d(width, self.neck, 1, bias=False), *_norm_relu(self.neck)]
            width = self.neck
        if self.hidden:
            values = width * sizes[0] * sizes[1]
            return nn.Sequential(*layers, nn.Flatten(), *self._layers(values, self.hidden))
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, self.classes)]
        return nn.Sequential(*layers, *pooled)

    def _edge_head(self) -> nn.Module:
        """What the device could do for about the FLOPs of its bridges and head, without a cloud.

        Each section as a depthwise and a 1x1 convolution (MobileNet, arXiv:1704.04861).
        """
        layers: list[nn.Module] = []
        width, sizes = self._leaving, [-(-size // 2) for size in self.input_shape[1:]]
        for wider, stride in zip(self.widths, self.strides, strict=True):
            layers += [*_depthwise(width, stride), *_norm_relu(width)]
            layers.append(nn.Conv2d(width, wider, 1, bias=False))
            layers += _norm_relu(wider)
            width, sizes = wider, [-(-size // stride) for size in sizes]
        # The head begins with a norm and a ReLU of its own.
        return nn.Sequential(*layers[:-2], self._head(width, sizes))

    def _layers(self, values: int, hidden: int) -> list[nn.Module]:
        return [nn.Linear(values, hidden), nn.ReLU(), nn.Linear(hidden, self.classes)]


def _norm_relu(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU()]


def _depthwise(width: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)]


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
