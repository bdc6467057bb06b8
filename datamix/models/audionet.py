"""A compact residual network on log-mel features, in the manner of res-8 for keywords."""

from __future__ import annotations

from torch import nn

from datamix.models.chain import Chain, wide
from datamix.models.layers import conv3x3
from datamix.models.options import Options
from datamix.models.resnet import BasicBlock

# Channels, units, stride of the first unit.
_STAGES = ((48, 2, 2), (64, 2, 2), (96, 2, 1))


def audionet(options: Options) -> Chain:
    """For (1, mels, frames); a unit is a residual one (Tang and Lin, arXiv:1710.10361)."""
    mels = options.take("mels", 40, 8, 256)
    frames = options.take("frames", 101, 8, 4096)
    classes = options.take("classes", 35, 2, 10_000)
    percent = options.take("width", 100, 1, 400)
    channels = wide(32, percent)
    entry: list[nn.Module] = [conv3x3(1, channels, stride=2), nn.BatchNorm2d(channels), nn.ReLU()]
    stages: list[list[nn.Module]] = []
    for published, count, stride in _STAGES:
        outputs = wide(published, percent)
        stages.append([])
        for unit in range(count):
            stages[-1].append(BasicBlock(channels, outputs, 1 if unit else stride))
            channels = outputs
    return Chain(
        entry,
        stages,
        [nn.AdaptiveAvgPool2d(1)],
        [nn.Flatten(), nn.Linear(channels, classes)],
        input_shape=(1, mels, frames),
        classes=classes,
        stages_on_device=0,
    )
