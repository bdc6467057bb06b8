"""The bundle workload's ingredients: inputs, their stem features, and what is right for them.

Computed once per process. The stem's cost is therefore not in any inference (the report says
``stem: cached``); everything after it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from datamix.bundle import Manifest, load_backbone
from datamix.errors import ConfigError
from datamix.models import Architecture, build
from edge.data import sample_for
from edge.fleet import pacing
from edge.fleet.config import FleetConfig
from edge.fleet.workload import BundleWorkload, Reference
from edge.modes import check_mode
from edge.runtime import TorchDevice

if TYPE_CHECKING:
    from edge.fleet.offline import Offline

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_CHUNK = 64

# By the kind of preprocessing: the array of an .npz file, and its type.
_ARRAYS = {"image": ("images", np.dtype(np.uint8)), "log-mel": ("pcm", np.dtype(np.int16))}


def bundle_workload(
    config: FleetConfig, inferences: int, offline: Offline | None = None
) -> BundleWorkload:
    """Make the workload for a fleet that owes ``inferences`` in all its processes.

    In the mode split, masks come from ``offline``.

    Raises:
        BundleError: a bundle that can't be read or trusted.
        ConfigError: inputs that are missing or don't fit the bundle, or a mode that it was not
            made for.
    """
    if config.bundle is None:
        raise ConfigError("the bundle workload got no bundle, expected a path")
    device = TorchDevice(config.bundle)
    raw, labels = load_inputs(config.inputs, device.manifest)
    mode = check_mode(device.manifest, config.mode)
    features = compute_features(device, raw)
    reference = compute_reference(config.bundle, device, features, mode) if config.verify else None
    choice = pacing.inputs(inferences, device.manifest.group_size, len(raw), config.seed)
    return BundleWorkload(device, features, labels, choice, reference, mode, offline)


def compute_features(device: TorchDevice, raw: Array) -> Floats:
    """Raw inputs (n, *raw_shape) to the stem's output (n, C, H, W)."""
    features: Floats = _chunked(lambda part: device.stem(device.preprocess(part)), raw)
    return features


def load_inputs(path: str | None, manifest: Manifest) -> tuple[Array, Array]:
    """Read raw inputs (n, *raw_shape) and labels (n,) int64; the sample that fits by default.

    A file is an ``.npz`` with ``labels`` and, as the bundle takes them, ``images`` uint8 or
    ``pcm`` int16.

    Raises:
        ConfigError: no such file, or not what the bundle takes.
    """
    shape = manifest.preprocessing.raw_shape
    key, dtype = _ARRAYS[manifest.preprocessing.kind]
    if path is None:
        sample = sample_for(manifest.preprocessing)
        source, raw, labels = "the shipped sample", sample.inputs[:], sample.labels
    else:
        source = path
        try:
            with np.load(Path(path), allow_pickle=False) as archive:
                raw, labels = archive[key], archive["labels"]
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} is no .npz file with {key} and labels: {error}") from error
    if raw.dtype != dtype or raw.shape[1:] != shape or not len(raw):
        raise ConfigError(
            f"{source} holds {key} {raw.shape} {raw.dtype},"
            f" expected (n, {', '.join(map(str, shape))}) {dtype}"
        )
    if labels.shape != (len(raw),):
        raise ConfigError(f"{source} holds labels {labels.shape}, expected ({len(raw)},)")
    return raw, labels.astype(np.int64)


def compute_reference(
    bundle: str, device: TorchDevice, features: Floats, mode: str = "mix"
) -> Reference:
    """Run the backbone locally, which no real device could: a simulator may know the answers.

    Raises:
        BundleError: a backbone that can't be read or trusted.
        ConfigError: the tolerance is too wide to tell one input's answer from another's.
    """
    manifest, blocks = load_backbone(bundle)

    def run(block: int, rows: Floats) -> Floats:
        with torch.inference_mode():
            return _numpy(blocks[block], rows)

    outputs: list[Floats] = []
    for index in range(len(blocks)):
        features = _chunked(lambda part, index=index: run(index, part), features)
        outputs.append(features)
        if index < len(blocks) - 1:
            features = _chunked(lambda part, i=index: device.bridge(i, part), features)
    classes = _chunked(device.head, features).argmax(axis=1)
    if mode == "split" and manifest.split is not None:
        # Whatever is not the answer to the very share that was sent, or not operator B's to its
        # seeds, is off by noise of hundreds: no tolerance is too wide to see that.
        return Reference(classes, manifest.split.tolerance, outputs=tuple(outputs))
    if mode == "mix" and _is_linear(manifest):
        reference = Reference(classes, manifest.tolerance, outputs=tuple(outputs))
    else:  # in the mode bounded what is restored has noise
        reference = Reference(classes, manifest.tolerance, recompute=run)
    check_telling(reference, outputs)
    return reference


def check_telling(reference: Reference, outputs: list[Floats]) -> None:
    """Refuse a tolerance in which answers to different inputs are alike: it would see no mix-up.

    Raises:
        ConfigError: more than 1% of the inputs can't be told from their neighbour.
    """
    for block, values in enumerate(outputs):
        others = np.roll(values, 1, axis=0)
        told = [reference.differs(*pair) for pair in zip(values, others, strict=True)]
        if len(values) > 1 and np.mean(told) < 0.99:
            raise ConfigError(
                f"the tolerance {reference.tolerance} tells only {np.mean(told):.0%} of the inputs "
                f"from others by what block {block} answers, expected 99%: nothing would be "
                "verified (--no-verify runs without)"
            )


def _is_linear(manifest: Manifest) -> bool:
    spec = manifest.architecture
    with torch.device("meta"):
        return build(Architecture(spec.name, spec.options)).linear


def _numpy(block: nn.Module, rows: Floats) -> Floats:
    output: Floats = block(torch.from_numpy(np.ascontiguousarray(rows))).numpy()
    return output


def _chunked(function: Any, rows: Array) -> Any:
    """Apply ``function`` to a few rows at a time, so that activations stay small."""
    parts = [function(rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)]
    return np.concatenate(parts)
