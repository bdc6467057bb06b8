"""How good a bundle is: unmixed, through mixing and the wire's rounding, and without the cloud."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from datamix.bundle import load_backbone
from datamix.errors import ConfigError
from datamix.models import Architecture, build, count_flops
from edge.data import Dataset
from edge.modes import check_mode, mode_of, wire_dtype
from edge.runtime import TorchDevice
from edge.session import infer_group
from edge.splitting import local_masks, rounded

Floats = npt.NDArray[np.float32]
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracies are shares of right answers, 0 to 1; FLOPs shares too.

    Attributes:
        accuracy_unmixed: the network without mixing or rounding.
        accuracy_mixed: as deployed: protected with fresh secrets, features rounded by the wire both
            ways.
        accuracy_edge_only: stem and a head of its own without the cloud, as recorded at training
            on the whole test split, not measured again; None where the bundle doesn't say.
        edge_flops_share: the device's share of FLOPs, mixing included.
        edge_flops_share_collapsed: the same against blocks at their cheapest (linear ones can be
            multiplied out, which a plain count would hide).
        n: how many inputs were evaluated.
        group_size: K.
        rounds: trips to the cloud per inference.
        mode: what protected the features.
        accuracy_by_class: of the mixed network, for each class that has inputs.
    """

    accuracy_unmixed: float
    accuracy_mixed: float
    accuracy_edge_only: float | None
    edge_flops_share: float
    edge_flops_share_collapsed: float
    n: int
    group_size: int
    rounds: int
    mode: str
    accuracy_by_class: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)


def table(found: Evaluation) -> str:
    """Plain lines for a terminal."""
    edge_only = found.accuracy_edge_only
    lines: tuple[tuple[str, str], ...] = (
        ("inputs", f"{found.n}"),
        ("mode, group size, rounds", f"{found.mode}, {found.group_size}, {found.rounds}"),
        ("accuracy unmixed", f"{found.accuracy_unmixed:.2%}"),
        ("accuracy mixed, as deployed", f"{found.accuracy_mixed:.2%}"),
        (
            "accuracy edge only (recorded at training)",
            "not recorded" if edge_only is None else f"{edge_only:.2%}",
        ),
        ("FLOPs on the edge", f"{found.edge_flops_share:.1%}"),
        ("FLOPs on the edge, linear blocks collapsed", f"{found.edge_flops_share_collapsed:.1%}"),
    )
    lines += tuple((f"  {name}", f"{share:.2%}") for name, share in found.accuracy_by_class.items())
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def evaluate(
    bundle: str | Path,
    data: Dataset,
    *,
    threads: int = 1,
    seed: int = 0,
    mode: str | None = None,
) -> Evaluation:
    """Evaluate a bundle on ``data``, all on this machine.

    Groups are drawn at random from ``seed``, so that no group is of one class by the file's order;
    the last one is filled up with inputs that are not counted. Coefficients are fresh and come
    from the operating system's entropy, so the mixed accuracy moves by a few inputs between runs.

    Args:
        bundle: folder or URI.
        data: labelled inputs.
        threads: for torch.
        seed: of the order of the inputs.
        mode: what protects the features; None for the bundle's own mode. In the mode split both
            operators are played here.

    Raises:
        BundleError: a bundle that can't be read or trusted.
        ConfigError: inputs or classes that don't fit the bundle, several labels per input, or a
            mode that the bundle was not made for.
    """
    device = TorchDevice(bundle, threads)
    manifest, blocks = load_backbone(bundle)
    mode = check_mode(manifest, mode)
    if data.multilabel:
        raise ConfigError(f"{data.name} has several labels per input, expected one to count")
    if data.class_names != manifest.class_names:
        raise ConfigError(f"the classes of {data.name} are not those of {manifest.name}")
    order = np.random.default_rng(seed).permutation(len(data))
    right_unmixed = 0
    right, there = (np.zeros(len(data.class_names), np.int64) for _ in range(2))
    step = _CHUNK // manifest.group_size * manifest.group_size or manifest.group_size
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        # Decoys fill up the last group; the device would do the same.
        filled = np.resize(chosen, -(-len(chosen) // manifest.group_size) * manifest.group_size)
        features = device.stem(device.preprocess(data.inputs[filled]))
        labels = data.labels[chosen]
        unmixed = _unmixed(device, blocks, features)[: len(chosen)]
        mixed = _mixed(device, blocks, features, mode)[: len(chosen)]
        right_unmixed += int((unmixed.argmax(1) == labels).sum())
        right += np.bincount(labels[mixed.argmax(1) == labels], minlength=len(right))
        there += np.bincount(labels, minlength=len(there))
    spec = manifest.architecture
    with torch.device("meta"):
        model = build(Architecture(spec.name, spec.options))
    flops = count_flops(model, group_size=manifest.group_size)
    return Evaluation(
        accuracy_unmixed=right_unmixed / len(data),
        accuracy_mixed=int(right.sum()) / len(data),
        accuracy_edge_only=manifest.metrics.get("accuracy_edge_only"),
        edge_flops_share=flops.edge_share,
        edge_flops_share_collapsed=flops.edge_share_collapsed,
        n=len(data),
        group_size=manifest.group_size,
        rounds=len(manifest.blocks),
        mode=mode,
        accuracy_by_class={
            name: float(right[index] / there[index])
            for index, name in enumerate(data.class_names)
            if there[index]
        },
    )


def _unmixed(device: TorchDevice, blocks: torch.nn.ModuleList, features: Floats) -> Floats:
    for index, block in enumerate(blocks):
        if index:
            features = device.bridge(index - 1, features)
        features = _run(block, features)
    return device.head(features)


def _mixed(device: TorchDevice, blocks: torch.nn.ModuleList, features: Floats, mode: str) -> Floats:
    """Drive the device's own sessions, one per group, all in step: the cloud gets one batch."""
    manifest = device.manifest
    size = manifest.group_size
    dtype = wire_dtype(manifest, mode)
    shapes = [block.input_shape for block in manifest.blocks]
    sessions = []
    for at in range(0, len(features), size):
        masks = local_masks(list(blocks), shapes, size) if mode == "split" else None
        protection = mode_of(manifest, mode, masks, dtype)
        sessions.append(infer_group(device, features[at : at + size], protection))
    rounds = [next(session) for session in sessions]
    for index, block in enumerate(blocks):
        features = np.concatenate([round_.features for round_ in rounds])
        sent = rounded(features, dtype, rounds[0].step)
        answers = _groups(rounded(_run(block, sent), dtype), size)
        if index < len(blocks) - 1:
            rounds = [s.send(answer) for s, answer in zip(sessions, answers, strict=True)]
        else:
            outputs = [_finish(s, answer) for s, answer in zip(sessions, answers, strict=True)]
    return np.concatenate(outputs)


def _groups(rows: Floats, size: int) -> Iterator[Floats]:
    return (rows[at : at + size] for at in range(0, len(rows), size))


def _finish(session: Any, answer: Floats) -> Floats:
    try:
        session.send(answer)
    except StopIteration as end:
        outputs: Floats = end.value
        return outputs
    raise RuntimeError("the session asked for more rounds than the bundle has blocks")


def _run(block: torch.nn.Module, features: Floats) -> Floats:
    with torch.inference_mode():
        output: Floats = block(torch.from_numpy(features)).numpy()
    return output
