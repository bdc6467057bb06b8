"""The device's parts of the network behind numpy arrays: stem, bridges, head on torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from datamix.bundle import Manifest, load_device
from datamix.errors import ConfigError
from edge.preprocess import preprocessor

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class TorchDevice:
    """Stem, bridges and head of a bundle, run by torch on the CPU; see :class:`session.Device`.

    Safe to call from several threads: nothing changes after construction.
    """

    manifest: Manifest

    def __init__(self, bundle: str | Path, threads: int = 1) -> None:
        """Load the device's side of a bundle.

        Args:
            bundle: folder, a local path or a URI; ``backbone.safetensors`` may be absent.
            threads: for torch in the whole process: torch knows no smaller scope. One is right
                for parts this small.

        Raises:
            BundleError: a bundle that can't be read or trusted.
            ConfigError: ``threads`` is below 1.
        """
        if threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1")
        torch.set_num_threads(threads)
        self.manifest, self._stem, self._bridges, self._head = load_device(bundle)
        self._preprocess = preprocessor(self.manifest.preprocessing)

    def preprocess(self, raw: Array) -> Floats:
        """Raw inputs as in training; see :func:`edge.preprocess.preprocessor`.

        Args:
            raw: (n, C, H, W) uint8 pixels or (n, samples) int16 audio, or float32 of full scale 1.

        Returns:
            (n, *input_shape) float32.

        Raises:
            ConfigError: another shape, type or range.
        """
        return self._preprocess(raw)

    def stem(self, inputs: Array) -> Floats:
        """Preprocessed inputs (n, *input_shape) to features (n, C, H, W), both float32.

        Raises:
            ConfigError: another shape.
        """
        self._check("inputs", inputs, self.manifest.preprocessing.input_shape)
        return _run(self._stem, inputs)

    def bridge(self, index: int, features: Array) -> Floats:
        """De-mixed output of block ``index`` to the next round's features, both (n, C, H, W).

        Raises:
            ConfigError: no such bridge, or another shape.
        """
        if not 0 <= index < len(self._bridges):
            raise ConfigError(f"bridge {index} asked for, the bundle has {len(self._bridges)}")
        self._check("features", features, self.manifest.blocks[index].output_shape)
        return _run(self._bridges[index], features)

    def head(self, features: Array) -> Floats:
        """De-mixed output of the last block (n, C, H, W) to logits (n, classes).

        Raises:
            ConfigError: another shape.
        """
        self._check("features", features, self.manifest.blocks[-1].output_shape)
        return _run(self._head, features)

    @staticmethod
    def _check(what: str, array: Array, shape: tuple[int, ...]) -> None:
        if array.shape[1:] != shape or array.ndim != len(shape) + 1:
            expected = ("n", *shape)
            raise ConfigError(f"{what} have shape {array.shape}, expected {expected}")


def _run(part: nn.Module, array: Array) -> Floats:
    with torch.inference_mode():
        # A copy: torch takes neither read-only nor mirrored arrays, and these are small.
        tensor = torch.from_numpy(np.array(array, np.float32, order="C"))
        output: Floats = part(tensor).numpy()
    return output
