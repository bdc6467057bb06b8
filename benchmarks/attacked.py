"""Bundles for attacks, of networks that are none yet: kept by an experiment, or untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from datamix.bundle import ArchitectureSpec, BoundedSpec, save_bundle
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build
from edge.data import load_dataset
from edge.methods import METHODS
from edge.networks import architecture_for
from edge.preprocess import preprocessor
from edge.splitting import choose
from edge.weights import load


def kept_bundle(
    network: Path, name: str, dataset: str, sigma: float, directory: Path | None, folder: Path
) -> Path:
    """A bundle of a network that an experiment kept.

    Raises:
        ConfigError: a file that is none, or a network without linear blocks.
    """
    data = load_dataset(dataset, "test", directory)
    saved = torch.load(network, map_location="cpu", weights_only=True)
    model = load(network)
    if not isinstance(model, SplitModel) or not model.linear:
        raise ConfigError(f"{network} has no linear blocks, expected a network that has")
    noisy = METHODS[saved["method"]].noisy
    some = preprocessor(data.preprocessing)(data.inputs[slice(0, 1000)])
    save_bundle(
        folder / "kept",
        model,
        name=f"{dataset}-{name}",
        version="1",
        mode="bounded" if noisy else "mix",
        group_size=4,
        architecture=ArchitectureSpec(
            name=saved["architecture"], options={**saved["options"], **_cloud(saved)}
        ),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        tolerance=1.0,
        metrics={},
        split=None if noisy else choose(model, some),
        bounded=BoundedSpec(sigma=sigma) if noisy else None,
    )
    return folder / "kept"


def _cloud(saved: dict[str, Any]) -> dict[str, str]:
    architecture = Architecture(saved["architecture"], saved["options"])
    options = architecture_for(saved["method"], architecture).options
    return {key: str(value) for key, value in options.items() if key == "cloud"}


def untrained(dataset: str, directory: Path | None, folder: Path, seed: int = 0) -> Path:
    """A bundle of a network with random weights, its norms set by public inputs."""
    data = load_dataset(dataset, "train", directory)
    shape = data.preprocessing.input_shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options: dict[str, int | str] = {
            "input": ",".join(map(str, shape)),
            "classes": len(data.class_names),
            "cloud": "linear",
        }
        model = build(Architecture("bridgenet", options))
        inputs = torch.from_numpy(preprocessor(data.preprocessing)(data.inputs[slice(0, 512)]))
        with torch.no_grad():
            for _ in range(60):
                model(inputs[torch.randperm(len(inputs))[:64]])
    save_bundle(
        folder / "untrained",
        model.eval(),
        name=f"{dataset}-untrained",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name="bridgenet", options=options),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        tolerance=0.05,
        metrics={},
    )
    return folder / "untrained"
