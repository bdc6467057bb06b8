"""A compact network of linear blocks."""

from __future__ import annotations

from torch import nn

from datamix.models.layers import Residual, ScaleNorm, Whiten, conv3x3
from datamix.models.split import SplitModel


class LinearBlock(nn.Sequential):
    """A cascade of bias-free convolutions without activations: one linear map.

    An entry convolution, ``depth`` residual pairs, and norms that only scale; the last one brings
    the output back to unit mean square, so that float16 loses little on the way home.
    """

    def __init__(self, inputs: int, width: int, stride: int, depth: int) -> None:
        """(n, inputs, H, W) -> (n, width, H / stride, W / stride)."""
        pairs = [
            Residual(
                conv3x3(width, width), ScaleNorm(width), conv3x3(width, width), ScaleNorm(width)
            )
            for _ in range(depth)
        ]
        super().__init__(conv3x3(inputs, width, stride), ScaleNorm(width), *pairs, ScaleNorm(width))


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


def convnet(
    n_blocks: int, stem_width: int, width: int, depth: int, hidden: int, classes: int
) -> SplitModel:
    """For 1x28x28: stem to (stem_width, 14, 14), every block to (width, 7, 7)."""
    stem = nn.Sequential(
        conv3x3(1, stem_width, stride=2),
        nn.BatchNorm2d(stem_width),
        nn.ReLU(),
        Residual(
            conv3x3(stem_width, stem_width),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            conv3x3(stem_width, stem_width),
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
