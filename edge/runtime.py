"""The device's parts of the network behind numpy arrays: stem, bridges, head on torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from datamix.bundle import load_device
from datamix.errors import ConfigError
from edge.device import Array, Floats, Part, Parts


class TorchDevice(Parts):
    """Stem, bridges and head of a bundle, run by torch on the CPU; see :class:`session.Device`.

    Safe to call from several threads: nothing changes after construction.
    """

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
        manifest, stem, bridges, head = load_device(bundle)
        super().__init__(manifest, _part(stem), [_part(bridge) for bridge in bridges], _part(head))


def _part(module: nn.Module) -> Part:
    def run(array: Array) -> Floats:
        with torch.inference_mode():
            # A copy: torch takes neither read-only nor mirrored arrays, and these are small.
            tensor = torch.from_numpy(np.array(array, np.float32, order="C"))
            output: Floats = module(tensor).numpy()
        return output

    return run
