"""ResNet-18, -34 and -50 (He et al., arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from datamix.models.chain import Chain, take_picture
from datamix.models.layers import conv3x3
from datamix.models.options import Options


class BasicBlock(nn.Module):
    """The residual unit of ResNet-18 and -34, projection where needed."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        super().__init__()
        self.inner = nn.Sequential(
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        output: Tensor = self.activation(self.inner(x) + self.shortcut(x))
        return output


class Bottleneck(nn.Module):
    """The residual unit of ResNet-50: 1x1 in, 3x3 on a quarter of the channels, 1x1 out.

    The stride is the 3x3 convolution's ("v1.5"), which is what is usually meant by ResNet-50.
    """

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        super().__init__()
        inner = outputs // self.expansion
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv3x3(inner, inner, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        output: Tensor = self.activation(self.inner(x) + self.shortcut(x))
        return output


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
    )


_UNITS: dict[int, tuple[Callable[[int, int, int], nn.Module], int, tuple[int, int, int, int]]] = {
    18: (BasicBlock, BasicBlock.expansion, (2, 2, 2, 2)),
    34: (BasicBlock, BasicBlock.expansion, (3, 4, 6, 3)),
    50: (Bottleneck, Bottleneck.expansion, (3, 4, 6, 3)),
}


def resnet(options: Options, depth: int) -> Chain:
    """ResNet-``depth``: 18, 34 or 50; a unit is a residual one.

    For pictures of up to 96x96 the entry is one 3x3 convolution without pooling, as is usual.
    """
    picture = take_picture(options)
    make, expansion, counts = _UNITS[depth]
    channels = picture.wide(64)
    entry: list[nn.Module]
    if picture.small:
        entry = [conv3x3(picture.channels, channels), nn.BatchNorm2d(channels), nn.ReLU()]
    else:
        entry = [
            nn.Conv2d(picture.channels, channels, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
    stages: list[list[nn.Module]] = []
    for index, count in enumerate(counts):
        outputs = picture.wide(64 * 2**index) * expansion
        stages.append([])
        for unit in range(count):
            stages[-1].append(make(channels, outputs, 2 if index and not unit else 1))
            channels = outputs
    return Chain(
        entry,
        stages,
        [nn.AdaptiveAvgPool2d(1)],
        [nn.Flatten(), nn.Linear(channels, picture.classes)],
        input_shape=picture.shape,
        classes=picture.classes,
    )
