"""The parts of the network that stay on the device, whatever runs them, and how to open them.

OnnxDevice    on onnxruntime, from the files that `datamix export` wrote   (edge/onnx_device.py)
TorchDevice   on torch, from the bundle's own weights                      (edge/runtime.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamix.bundle import Manifest, read_manifest
from datamix.errors import ConfigError
from edge.installed import installed, require
from edge.preprocess import preprocessor
from edge.session import Device

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Part = Callable[[Array], Floats]
Runtime = Literal["auto", "onnx", "torch"]


class Parts:
    """Stem, bridges and head behind the checks that every runtime owes; see :class:`Device`."""

    manifest: Manifest

    def __init__(self, manifest: Manifest, stem: Part, bridges: Sequence[Part], head: Part) -> None:
        """Take the parts as functions of float32 arrays with a leading batch axis.

        Raises:
            ConfigError: preprocessing that cannot be done; see :mod:`edge.preprocess`.
        """
        self.manifest = manifest
        self._stem, self._bridges, self._head = stem, tuple(bridges), head
        self._preprocess = preprocessor(manifest.preprocessing)

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
        _check("inputs", inputs, self.manifest.preprocessing.input_shape)
        return self._stem(inputs)

    def bridge(self, index: int, features: Array) -> Floats:
        """De-mixed output of block ``index`` to the next round's features, both (n, C, H, W).

        Raises:
            ConfigError: no such bridge, or another shape.
        """
        if not 0 <= index < len(self._bridges):
            raise ConfigError(f"bridge {index} asked for, the bundle has {len(self._bridges)}")
        _check("features", features, self.manifest.blocks[index].output_shape)
        return self._bridges[index](features)

    def head(self, features: Array) -> Floats:
        """De-mixed output of the last block (n, C, H, W) to logits (n, classes).

        Raises:
            ConfigError: another shape.
        """
        _check("features", features, self.manifest.blocks[-1].output_shape)
        return self._head(features)


def _check(what: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise ConfigError(f"{what} have shape {array.shape}, expected {('n', *shape)}")


def open_device(bundle: str | Path, *, runtime: Runtime = "auto", threads: int = 1) -> Device:
    """Open the device's side of a bundle.

    Args:
        bundle: folder, a local path or a URI.
        runtime: ``onnx``, ``torch``, or ``auto``: onnxruntime where it is installed and the bundle
            has the files of ``datamix export``, else torch.
        threads: for one part of one group.

    Raises:
        BundleError: a bundle that can't be read or trusted.
        ConfigError: no such runtime, or neither is of use here.
    """
    if runtime not in ("auto", "onnx", "torch"):
        raise ConfigError(f"runtime is {runtime!r}, expected 'auto', 'onnx' or 'torch'")
    if runtime == "auto":
        runtime = _choose(bundle)
    if runtime == "onnx":
        require("onnxruntime", "device")
        from edge.onnx_device import OnnxDevice

        return OnnxDevice(bundle, threads)
    require("torch", "torch")
    from edge.runtime import TorchDevice  # torch is only paid for where it is used

    return TorchDevice(bundle, threads)


def _choose(bundle: str | Path) -> Literal["onnx", "torch"]:
    exported = read_manifest(bundle).has_onnx
    if exported and installed("onnxruntime"):
        return "onnx"
    if installed("torch"):
        return "torch"
    if exported:
        raise ConfigError(
            "neither onnxruntime nor torch is installed, expected one of them: install "
            "datamix-cluster[device]"
        )
    raise ConfigError(
        f"bundle {str(bundle)!r} has no ONNX files and torch is not installed, expected one of "
        "them: write the files with `datamix export`, or install datamix-cluster[torch]"
    )
