"""A device of two rounds in plain numpy, and the linear blocks of its cloud."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamix.bundle import (
    ArchitectureSpec,
    BlockShape,
    BoundedSpec,
    ImagePreprocessing,
    Manifest,
    SplitSpec,
)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Mode = Literal["mix", "bounded", "split"]

INPUT = (1, 2, 3)
GROUP = 4
CLASSES = 5
# Each block's rows, in and out.
SHAPES = (((2, 3, 3), (3, 2, 2)), ((1, 3, 4), (2, 1, 3)))


def make_manifest(
    *,
    mode: Mode = "mix",
    group_size: int = GROUP,
    rounds: int = 2,
    name: str = "echo",
    all_modes: bool = False,
) -> Manifest:
    return Manifest(
        schema_version=1,
        name=name,
        version="1",
        mode=mode,
        group_size=group_size,
        blocks=tuple(BlockShape(input_shape=a, output_shape=b) for a, b in SHAPES[:rounds]),
        architecture=ArchitectureSpec(name="fake"),
        preprocessing=ImagePreprocessing(kind="image", input_shape=INPUT, mean=(0.5,), std=(0.25,)),
        class_names=tuple("abcde"[:CLASSES]),
        wire_dtype="float16",
        tolerance=0.01,
        metrics={},
        hashes={"device.safetensors": "0" * 64, "backbone.safetensors": "1" * 64},
        split=SplitSpec(sigma=100.0, wire_dtype="float32", tolerance=0.01) if all_modes else None,
        bounded=BoundedSpec(sigma=0.5) if all_modes else None,
    )


def _weights(seed: int, rows: int, columns: int) -> Floats:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) / np.sqrt(rows)
    return np.asarray(values, np.float32)


_STEM = _weights(1, 6, 18)
_BLOCKS = (_weights(2, 18, 12), _weights(3, 12, 6))
_HEADS = (_weights(4, 12, CLASSES), _weights(4, 6, CLASSES))


def compute(block: int, features: Array) -> Floats:
    """What the cloud's linear block ``block`` makes of rows (n, *input_shape)."""
    output_shape = SHAPES[block][1]
    weights = _BLOCKS[block]
    return (features.reshape(-1, len(weights)) @ weights).reshape(-1, *output_shape)


class FakeDevice:
    """Stem, bridge and head; the bridge and the head are not linear.

    Attributes:
        bridged: the features that each call of the bridge was given.
        headed: the features that each call of the head was given.
    """

    def __init__(self, **manifest: Any) -> None:
        self.manifest = make_manifest(**manifest)
        self.bridged: list[Array] = []
        self.headed: list[Array] = []

    def preprocess(self, raw: Array) -> Floats:
        return np.asarray((raw / 255 - 0.5) / 0.25, np.float32)

    def stem(self, inputs: Array) -> Floats:
        return np.tanh(inputs.reshape(-1, 6) @ _STEM).reshape(-1, *SHAPES[0][0])

    def bridge(self, index: int, features: Array) -> Floats:
        assert index == 0
        self.bridged.append(features)
        return np.maximum(features, 0).reshape(-1, *SHAPES[1][0])

    def head(self, features: Array) -> Floats:
        self.headed.append(features)
        weights = _HEADS[len(self.manifest.blocks) - 1]
        return np.tanh(features.reshape(-1, len(weights)) @ weights)

    def local(self, raw: Array) -> Floats:
        """The outputs that no cloud and no mixing would give."""
        features = self.stem(self.preprocess(raw))
        for index in range(len(self.manifest.blocks)):
            features = compute(index, features)
            if index + 1 < len(self.manifest.blocks):
                features = np.maximum(features, 0).reshape(-1, *SHAPES[1][0])
        return self.head(features)


def raw_inputs(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *INPUT), np.uint8)
