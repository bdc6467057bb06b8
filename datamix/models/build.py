"""From a name and options to an untrained model."""

from __future__ import annotations

from typing import Any, cast

from datamix.errors import ConfigError
from datamix.models.bridgenet import BridgeNet
from datamix.models.convnet import convnet
from datamix.models.options import Options
from datamix.models.resnet import resnet18
from datamix.models.split import Architecture, SplitModel


def build(architecture: Architecture) -> SplitModel:
    """Make an untrained model.

    ``convnet`` (1x28x28, linear blocks): n_blocks 1..4 (2), stem_width (16), width (64), depth:
    residual pairs per block (1), hidden (128), classes (10).
    ``bridgenet`` (linear blocks, rich bridges; :class:`datamix.models.bridgenet.BridgeNet`): input
    ("1,28,28"), stem_width (32), stem_units (2), widths ("96,128,192"), strides ("2,1,2"), depth
    (1), rounds (as many as widths), bridge: pointwise or relu (pointwise), neck (0), hidden (0),
    classes (10), cloud: linear, relu or prelu (linear).
    ``resnet18`` (non-linear block): image_size 32 or 224 (32), cut 0..3: stages on the device (1),
    classes (10). A cut after stage 4 is refused: it would leave the cloud nothing but an average.

    Weights come from torch's global generator: seed it first. Under ``torch.device("meta")``
    nothing is allocated.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    match architecture.name:
        case "convnet":
            options = Options(architecture)
            model = convnet(
                n_blocks=options.take("n_blocks", 2, 1, 4),
                stem_width=options.take("stem_width", 16, 1, 256),
                width=options.take("width", 64, 1, 1024),
                depth=options.take("depth", 1, 0, 8),
                hidden=options.take("hidden", 128, 1, 4096),
                classes=options.take("classes", 10, 2, 10_000),
            )
        case "resnet18":
            options = Options(architecture)
            image_size = options.take("image_size", 32, 32, 224)
            if image_size not in (32, 224):
                raise ConfigError(f"resnet18: image_size is {image_size}, expected 32 or 224")
            model = resnet18(
                cut=options.take("cut", 1, 0, 3),
                image_size=image_size,
                classes=options.take("classes", 10, 2, 10_000),
            )
        case "bridgenet":
            options = Options(architecture)
            model = _bridgenet(options).build()
        case _:
            raise ConfigError(
                f"architecture is {architecture.name!r},"
                " expected 'bridgenet', 'convnet' or 'resnet18'"
            )
    options.end()
    return model


def _bridgenet(options: Options) -> BridgeNet:
    channels, height, width = _shape(options.numbers("input", "1,28,28", 1, 4096))
    widths = options.numbers("widths", "96,128,192", 1, 4096)
    strides = options.numbers("strides", "2,1,2", 1, 4)
    return BridgeNet(
        input_shape=(channels, height, width),
        stem_width=options.take("stem_width", 32, 1, 1024),
        stem_units=options.take("stem_units", 2, 0, 16),
        widths=widths,
        strides=strides,
        depth=options.take("depth", 1, 1, 8),
        rounds=options.take("rounds", len(widths), 1, 64),
        bridge=cast(Any, options.text("bridge", "pointwise", ("pointwise", "relu"))),
        neck=options.take("neck", 0, 0, 4096),
        hidden=options.take("hidden", 0, 0, 4096),
        classes=options.take("classes", 10, 2, 10_000),
        cloud=cast(Any, options.text("cloud", "linear", ("linear", "relu", "prelu"))),
    )


def _shape(numbers: tuple[int, ...]) -> tuple[int, int, int]:
    if len(numbers) != 3:
        raise ConfigError(f"bridgenet: input is {numbers}, expected C,H,W")
    return numbers[0], numbers[1], numbers[2]
