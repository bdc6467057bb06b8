"""From a name and options to an untrained model; and how names of your own come in."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from datamix.errors import ConfigError
from datamix.models.audionet import audionet
from datamix.models.bridgenet import BridgeNet
from datamix.models.chain import Chain, split_chain
from datamix.models.convnet import convnet
from datamix.models.mobilenet import mobilenetv2
from datamix.models.options import Options
from datamix.models.resnet import resnet
from datamix.models.split import Architecture, SplitModel
from datamix.models.vgg import vgg16

Builder = Callable[[Options], SplitModel]
"""Takes its options (:meth:`Options.take` and its like) and makes an untrained model."""

MODULES_VARIABLE = "DATAMIX_ARCHITECTURES"
"""Environment variable: modules, with commas between them, that register architectures."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_registered: dict[str, Builder] = {}


def build(architecture: Architecture) -> SplitModel:
    """Make an untrained model.

    ``convnet`` (1x28x28, linear blocks): n_blocks 1..4 (2), stem_width (16), width (64), depth:
    residual pairs per block (1), hidden (128), classes (10).
    ``bridgenet`` (linear blocks, rich bridges; :class:`datamix.models.bridgenet.BridgeNet`): input
    ("1,28,28"), stem_width (32), sent_width (0), stem_units (2), widths ("96,128,192"), strides
    ("2,1,2"), depth (1), rounds (as many as widths), bridge: pointwise or relu (pointwise), neck
    (0), hidden (0), classes (10), cloud: linear, relu or prelu (linear).
    ``resnet18``, ``resnet34``, ``resnet50``, ``vgg16``, ``mobilenetv2`` (published networks):
    image_size (32), channels (3), classes (10), width: per cent of the published channels (100);
    how they are split (:func:`datamix.models.chain.split_chain`): cut: units on the device (1 stage
    of them), cut_by: unit, or stage as ResNets are by default, rounds (1), cloud: relu, linear or
    prelu (relu). A cut after the last unit is refused: it would leave the cloud nothing.
    ``audionet`` (log-mel features): mels (40), frames (101), classes (35), width (100), and how it
    is split, with cut (0).
    Any other name has to be registered (:func:`register`); the modules that the environment
    variable ``DATAMIX_ARCHITECTURES`` lists are imported first, so that they can do so.

    Weights come from torch's global generator: seed it first. Under ``torch.device("meta")``
    nothing is allocated.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    options = Options(architecture)
    model = _builder(architecture.name)(options)
    options.end()
    return model


def register(name: str, builder: Builder) -> None:
    """Let :func:`build` make models of a new name, in this process.

    Whoever loads a bundle of that name has to register it too: a bundle holds weights and a name,
    and never code.

    Args:
        name: ``[a-z0-9][a-z0-9._-]{0,63}``, not taken yet.
        builder: takes the options it knows; others are refused after it returns.

    Raises:
        ConfigError: the name is taken or malformed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"architecture is {name[:80]!r}, expected {_NAME.pattern}")
    if name in _BUILT_IN or name in _registered:
        raise ConfigError(f"architecture {name!r} exists already, expected a new name")
    _registered[name] = builder


def _builder(name: str) -> Builder:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name not in _registered:
        _import_registering_modules()
    if name not in _registered:
        known = ", ".join(repr(known) for known in sorted((*_BUILT_IN, *_registered)))
        raise ConfigError(f"architecture is {name!r}, expected one of {known}")
    return _registered[name]


def _import_registering_modules() -> None:
    """Import what the operator named. It is trusted code; nothing a bundle says gets here."""
    for module in os.environ.get(MODULES_VARIABLE, "").split(","):
        if not (module := module.strip()):
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the module does at its import
            raise ConfigError(
                f"{MODULES_VARIABLE}: {module!r} cannot be imported: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error


def _convnet(options: Options) -> SplitModel:
    return convnet(
        n_blocks=options.take("n_blocks", 2, 1, 4),
        stem_width=options.take("stem_width", 16, 1, 256),
        width=options.take("width", 64, 1, 1024),
        depth=options.take("depth", 1, 0, 8),
        hidden=options.take("hidden", 128, 1, 4096),
        classes=options.take("classes", 10, 2, 10_000),
    )


def _chain(network: Callable[[Options], Chain], cut_by: str, options: Options) -> SplitModel:
    return split_chain(network(options), options, cut_by)


def _bridgenet(options: Options) -> SplitModel:
    channels, height, width = _shape(options.numbers("input", "1,28,28", 1, 4096))
    widths = options.numbers("widths", "96,128,192", 1, 4096)
    strides = options.numbers("strides", "2,1,2", 1, 4)
    net = BridgeNet(
        input_shape=(channels, height, width),
        stem_width=options.take("stem_width", 32, 1, 1024),
        sent_width=options.take("sent_width", 0, 0, 1024),
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
    return net.build()


def _shape(numbers: tuple[int, ...]) -> tuple[int, int, int]:
    if len(numbers) != 3:
        raise ConfigError(f"bridgenet: input is {numbers}, expected C,H,W")
    return numbers[0], numbers[1], numbers[2]


_BUILT_IN: Mapping[str, Builder] = {
    "audionet": partial(_chain, audionet, "unit"),
    "bridgenet": _bridgenet,
    "convnet": _convnet,
    "mobilenetv2": partial(_chain, mobilenetv2, "unit"),
    # What a cut of resnet18 counts in the bundles that there are.
    **{f"resnet{n}": partial(_chain, partial(resnet, depth=n), "stage") for n in (18, 34, 50)},
    "vgg16": partial(_chain, vgg16, "unit"),
}
