"""Networks that training kept: files of weights, and bundles, to learn from or to measure again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamix.bundle import MANIFEST, load_backbone, load_device
from datamix.errors import ConfigError
from datamix.models import Architecture
from edge.networks import untrained


def keep(path: Path, part: nn.Module, method: str, architecture: Architecture) -> None:
    """Write a network that :func:`load` can read; ``path`` is replaced in one step."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as stream:
        torch.save(
            {
                "method": method,
                "architecture": architecture.name,
                "options": dict(architecture.options),
                "part": {name: tensor.contiguous() for name, tensor in part.state_dict().items()},
            },
            stream,
        )
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def load(path: str | Path) -> nn.Module:
    """Read what :func:`keep` wrote, or a bundle's network; in eval mode, nothing learns.

    Raises:
        ConfigError: no such file, or one that cannot be read.
        BundleError: a bundle that can't be read or trusted.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        part: nn.Module = _Bundle(path)
    else:
        part = _read(path)
    return part.eval().requires_grad_(False)


def digest(path: str | Path) -> str:
    """Tells one network from another: sha256 of the file, or of the bundle's manifest.

    Raises:
        ConfigError: neither is there.
    """
    path = Path(path)
    file = path / MANIFEST if path.is_dir() else path
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}") from None


def _read(path: Path) -> nn.Module:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        architecture = Architecture(saved["architecture"], saved["options"])
        part = untrained(saved["method"], architecture, 0)
        part.load_state_dict(saved["part"])
    except Exception as error:  # torch raises many types on a broken file
        raise ConfigError(
            f"{path} is neither a bundle nor weights that training kept: {type(error).__name__}"
        ) from None
    return part


class _Bundle(nn.Module):
    """A bundle's network, unmixed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        _, self.blocks = load_backbone(path)
        _, self.stem, self.bridges, self.head = load_device(path)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        for index, block in enumerate(self.blocks):
            if index:
                features = self.bridges[index - 1](features)
            features = block(features)
        logits: Tensor = self.head(features)
        return logits
