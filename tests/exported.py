"""A small bundle of two rounds, and its export, for the tests of devices without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from datamix.bundle import MANIFEST, ArchitectureSpec, ImagePreprocessing, save_bundle
from datamix.models import Architecture, SplitModel, build

OPTIONS: dict[str, int | str] = {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16}


def lived_in(architecture: Architecture) -> SplitModel:
    """A model with statistics and weights that are not those of its first moment."""
    torch.manual_seed(0)
    model = build(architecture)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(16, *model.input_shape))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_bundle(path: Path, architecture: Architecture | None = None) -> None:
    """Save a model with made-up weights as a bundle."""
    architecture = architecture or Architecture("convnet", OPTIONS)
    model = lived_in(architecture)
    channels = model.input_shape[0]
    save_bundle(
        path,
        model,
        name="small",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name=architecture.name, options=dict(architecture.options)),
        preprocessing=ImagePreprocessing(
            kind="image",
            input_shape=model.input_shape,
            mean=(0.25,) * channels,
            std=(0.5,) * channels,
        ),
        class_names=tuple("abcdefghij"),
        tolerance=0.01,
        metrics={},
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest on disk."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def forge(folder: Path, file: str, body: bytes) -> None:
    """Swap a file and its hash: a forger would do both."""
    (folder / file).write_bytes(body)
    edit(folder, lambda m: m["hashes"].update({file: hashlib.sha256(body).hexdigest()}))
