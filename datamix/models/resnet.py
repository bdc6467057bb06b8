"""ResNet-18, cut after one of its stages: a non-linear block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datamix.models.layers import conv3x3
from datamix.models.split import SplitModel


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 (He et al., arXiv:1512.03385), projection where needed."""

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
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, H, W) -> (n, outputs, H / stride, W / stride)."""
        return torch.relu(self.inner(x) + self.shortcut(x))


_RESNET18_STAGES = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))


def resnet18(cut: int, image_size: int, classes: int) -> SplitModel:
    """Cut after ``cut`` of the four stages (0: right after the first convolution)."""
    entry: list[nn.Module]
    if image_size == 32:
        entry = [conv3x3(3, 64), nn.BatchNorm2d(64), nn.ReLU()]
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
