"""From a trained network to a row of results."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from datamix.models import SplitModel, block_shapes, build, count_flops
from datamix.models.costs import bytes_on_wire
from edge.accuracy import accuracy
from edge.data import Dataset
from edge.fit import Fitted
from edge.methods import METHODS
from edge.mixtures import Mixing
from edge.networks import architecture_for
from edge.promises import bits_per_input
from edge.results import Row, digest
from edge.runs import on_cpu
from edge.settings import TrainConfig

_PACKAGES = ("torch", "numpy")


def measure(
    part: nn.Module,
    fitted: Fitted,
    config: TrainConfig,
    inputs: int,
    test: Dataset,
    points: Sequence[Mixing],
    *,
    command: str,
    preset: str = "",
    label: str = "",
) -> list[Row]:
    """Measure one trained network at several points.

    Args:
        part: as training left it.
        fitted: what the training took.
        config: its settings.
        inputs: how many were learnt from.
        test: inputs to measure with.
        points: group size, law and noise, one row each; their wire is ignored. Methods that do
            not mix have one row, whatever the points.
        command: what to run for these rows.
        preset: the experiment.
        label: the arm.
    """
    method, settings = METHODS[config.method], on_cpu(config)
    torch.set_num_threads(config.threads)
    same = accuracy(part, test, settings, None)
    row = _common(part, fitted, config, test, inputs)
    row = replace(row, command=command, preset=preset, label=label or config.method)
    row = replace(row, accuracy=same, accuracy_same_weights=same, accuracy_float32=same)
    if not method.offloads:
        return [replace(row, accuracy_int8=same)]
    assert isinstance(part, SplitModel)  # what offloads has blocks
    if not method.mixed:
        points = [Mixing(1, strength=0.0)]  # the wire alone; K = 1 might still turn a sign
    rows = []
    for point in points:
        flops = count_flops(part, group_size=point.group_size if method.mixed else 0)
        found = {
            wire: accuracy(part, test, settings, replace(point, wire=wire), seed=config.seed)
            for wire in ("float16", "int8", "float32")
        }
        rows.append(
            replace(
                row,
                group_size=point.group_size,
                law=point.law,
                noise_sigma=point.noise_sigma,
                accuracy=found["float16"],
                accuracy_int8=found["int8"],
                accuracy_float32=found["float32"],
                edge_flops_share=flops.edge_share,
                edge_flops_share_collapsed=flops.edge_share_collapsed,
                edge_flops=flops.edge,
                cloud_flops=flops.cloud,
                bits_per_input=_bits(part, point.noise_sigma),
            )
        )
    return rows


def _bits(model: SplitModel, sigma: float) -> float | None:
    """What noise of this deviation lets through; None without noise."""
    return bits_per_input((sent for sent, _ in block_shapes(model)), sigma) if sigma else None


def _common(
    part: nn.Module, fitted: Fitted, config: TrainConfig, test: Dataset, inputs: int
) -> Row:
    """What all rows of one network share; the shares are those of a network without a cloud."""
    architecture = architecture_for(config.method, config.architecture)
    with torch.device("meta"):
        model = build(architecture)
    shapes = block_shapes(model) if METHODS[config.method].offloads else []
    return Row(
        dataset=test.name,
        method=config.method,
        rounds=len(shapes),
        group_size=1,
        seed=config.seed,
        accuracy=0.0,
        accuracy_unmixed=None,
        accuracy_edge_only=None,
        edge_flops_share=1.0,
        edge_flops=edge_only_flops(model),
        bytes_per_inference=bytes_on_wire(shapes, "float16"),
        command="",
        commit=commit(),
        seconds=round(fitted.seconds, 1),
        accuracy_validation=fitted.history[-1].accuracy if fitted.history else None,
        round_trips=len(shapes),
        architecture=architecture.name,
        options=dict(architecture.options),
        parameters=sum(parameter.numel() for parameter in part.parameters()),
        budget=config.budget,
        epochs=fitted.epochs,
        steps=fitted.steps,
        cpu_seconds=round(fitted.cpu_seconds, 1),
        threads=config.threads,
        inputs=(inputs, len(test)),
        machine=machine(),
        versions={"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        settings=digest(config.to_json()),
    )


def edge_only_flops(model: SplitModel) -> int:
    """FLOPs per input of the edge-only network, stem and edge head; norms are not counted.

    ``model`` was built on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        part = nn.Sequential(model.stem, model.edge_head()).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            part(torch.empty((1, *model.input_shape)))
    return int(counter.get_total_flops())


def commit() -> str:
    """The commit of this code, with ``+`` where files are changed; without Git, its version."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            raise ValueError("installed inside somebody else's repository")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "datamix", "edge")
        return git("rev-parse", "HEAD")[:12] + ("+" if changed else "")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return f"version {version('datamix-cluster')}"


def machine() -> str:
    """The processor, or the GPU that torch sees, and how many threads there are."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # no Linux: the name that Python knows will do
    name = f"{name}, {os.cpu_count()} threads"
    return f"{torch.cuda.get_device_name()}; {name}" if torch.cuda.is_available() else name
