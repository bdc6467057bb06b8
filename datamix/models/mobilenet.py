"""MobileNetV2 (Sandler et al., arXiv:1801.04381)."""

from __future__ import annotations

from torch import nn

from datamix.models.chain import Chain, take_picture
from datamix.models.layers import Residual
from datamix.models.options import Options

# Expansion, channels, units, stride of the first unit.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(options: Options) -> Chain:
    """A unit is an inverted residual; the last one is the 1x1 convolution before the pooling.

    For pictures of up to 96x96 the entry and the second stage keep the resolution, as is usual.
    ``width`` scales the last convolution, too, which the paper leaves alone below 100.
    """
    picture = take_picture(options)
    channels = picture.wide(32)
    first = 1 if picture.small else 2
    entry = _convolution(picture.channels, channels, 3, first)
    stages: list[list[nn.Module]] = []
    for index, (expansion, published, count, stride) in enumerate(_STAGES):
        outputs = picture.wide(published)
        stages.append([])
        for unit in range(count):
            step = stride if unit == 0 and not (picture.small and index == 1) else 1
            stages[-1].append(_inverted_residual(channels, outputs, expansion, step))
            channels = outputs
    last = picture.wide(1280)
    stages.append([nn.Sequential(*_convolution(channels, last, 1, 1))])
    return Chain(
        entry,
        stages,
        [nn.AdaptiveAvgPool2d(1)],
        [nn.Flatten(), nn.Dropout(0.2), nn.Linear(last, picture.classes)],
        input_shape=picture.shape,
        classes=picture.classes,
    )


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    ]


def _inverted_residual(inputs: int, outputs: int, expansion: int, stride: int) -> nn.Module:
    inner = inputs * expansion
    layers = [] if expansion == 1 else _convolution(inputs, inner, 1, 1)
    layers += _convolution(inner, inner, 3, stride, groups=inner)
    layers += [nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
    if stride == 1 and inputs == outputs:
        return Residual(*layers)
    return nn.Sequential(*layers)
