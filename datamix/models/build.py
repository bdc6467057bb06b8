"""From a name and options to an untrained model."""

from __future__ import annotations

from datamix.errors import ConfigError
from datamix.models.convnet import convnet
from datamix.models.options import Options
from datamix.models.resnet import resnet18
from datamix.models.split import Architecture, SplitModel


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
        case _:
            raise ConfigError(
                f"architecture is {architecture.name!r}, expected 'convnet' or 'resnet18'"
            )
    options.end()
    return model
