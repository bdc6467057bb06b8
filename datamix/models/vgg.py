"""VGG-16 with batch norm (Simonyan and Zisserman, arXiv:1409.1556)."""

from __future__ import annotations

from torch import nn

from datamix.models.chain import Chain, take_picture
from datamix.models.options import Options

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(options: Options) -> Chain:
    """A unit is a convolution with norm and ReLU, and the pooling at the end of its stage.

    The first convolution is the entry. For pictures of more than 96x96 the classifier's two large
    layers are two more units, written as convolutions so that they can be the cloud's; for smaller
    ones the head is one layer, as is usual for CIFAR.
    """
    picture = take_picture(options, smallest=32)
    channels = picture.channels
    stages: list[list[nn.Module]] = []
    for published, count in _STAGES:
        outputs = picture.wide(published)
        stages.append([])
        for _ in range(count):
            unit = nn.Sequential(
                nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
            )
            stages[-1].append(unit)
            channels = outputs
        unit.append(nn.MaxPool2d(2))
    entry = stages[0].pop(0)
    pool: list[nn.Module] = []
    if picture.small:
        pool.append(nn.AdaptiveAvgPool2d(1))
    else:
        hidden = picture.wide(4096)
        side = picture.size // 32
        stages.append(
            [
                nn.Sequential(nn.Conv2d(channels, hidden, side), nn.ReLU(), nn.Dropout()),
                nn.Sequential(nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Dropout()),
            ]
        )
        channels = hidden
    return Chain(
        [entry],
        stages,
        pool,
        [nn.Flatten(), nn.Linear(channels, picture.classes)],
        input_shape=picture.shape,
        classes=picture.classes,
    )
