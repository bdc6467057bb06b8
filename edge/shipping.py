"""From a network that an experiment trained to a bundle with its model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datamix.bundle import Manifest
from datamix.errors import ConfigError
from datamix.models import SplitModel
from edge.accuracy import accuracy
from edge.card import Origin, write_card
from edge.data import Dataset
from edge.evaluate import evaluate
from edge.experiment import trained
from edge.measurement import machine
from edge.presets import Preset
from edge.results import read_rows
from edge.runs import on_cpu
from edge.train import save_trained


def ship(
    preset: Preset,
    training: Dataset,
    test: Dataset,
    output: Path,
    *,
    label: str,
    seed: int,
    group_size: int,
    runs: Path,
    results: Path,
    name: str,
    version: str,
    noise_sigma: float | None = None,
) -> Manifest:
    """Make a bundle of one of an experiment's networks, beside its edge-only baseline.

    Nothing is trained: linear blocks de-mix exactly for every group size, so the one that is asked
    for is only written down.

    Args:
        preset: the experiment.
        training: what its networks learnt from; the wire's tolerance is measured on it.
        test: inputs to measure with.
        output: the bundle's new folder.
        label: the arm, one of linear blocks.
        seed: of its training.
        group_size: K that the bundle names.
        runs: where the experiment kept its networks.
        results: its rows, which tell the commit.
        name: of the bundle.
        version: of the bundle.
        noise_sigma: of the training, where the arm has several; the first one by default.

    Raises:
        ConfigError: no such training, or one without linear blocks.
        BundleError: ``output`` exists.
    """
    found = trained(preset, label, seed, runs, noise_sigma)
    edge = trained(preset, "edge-only", seed, runs)
    model = found.part
    if not isinstance(model, SplitModel) or not model.linear:
        raise ConfigError(f"{label} has no linear blocks, expected an arm that has")
    wanted = (preset.name, label, seed, found.config.noise_sigma)
    rows = [r for r in read_rows(results) if (r.preset, r.label, r.seed, r.noise_sigma) == wanted]
    if not rows:
        raise ConfigError(f"{results} has no row of {label} with seed {seed}, expected one")
    config = replace(found.config, name=name, version=version, group_size=group_size)
    edge_accuracy = accuracy(edge.part, test, on_cpu(edge.config), None)
    manifest = save_trained(
        config, model, training, test, output, edge_accuracy, found.fitted, edge.fitted
    )
    sigma = "" if noise_sigma is None else f"--noise-sigma {noise_sigma:g} "
    again = (
        f"--seed {seed} {sigma}--group-size {group_size} --name {name} --model-version {version}"
    )
    origin = Origin(
        dataset=preset.dataset,
        commands=(
            f"datamix experiment {preset.name} --arms edge-only,{label} --seeds {seed}",
            f"datamix bundle {preset.name} --arm {label} {again} --output {output.name}",
        ),
        commit=rows[0].commit,
        cpu_seconds=found.fitted.cpu_seconds,
        machine=machine(),
        versions=rows[0].versions,
    )
    write_card(output, manifest, evaluate(output, test, threads=config.threads), origin)
    return manifest
