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

    Raises:
        ConfigError: no such training, or one without linear blocks.
        BundleError: ``output`` exists.
    """
    found, edge = trained(preset, label, seed, runs), trained(preset, "edge-only", seed, runs)
    model = found.part
    if not isinstance(model, SplitModel) or not model.linear:
        raise ConfigError(f"{label} has no linear blocks, expected an arm of the method linear")
    rows = [
        r for r in read_rows(results) if (r.preset, r.label, r.seed) == (preset.name, label, seed)
    ]
    if not rows:
        raise ConfigError(f"{results} has no row of {label} with seed {seed}, expected one")
    config = replace(found.config, name=name, version=version, group_size=group_size)
    edge_accuracy = accuracy(edge.part, test, on_cpu(edge.config), None)
    manifest = save_trained(
        config, model, training, test, output, edge_accuracy, found.fitted, edge.fitted
    )
    again = f"--seed {seed} --group-size {group_size} --name {name} --model-version {version}"
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
