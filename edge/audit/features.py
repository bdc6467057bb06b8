"""What anybody can compute from public inputs with the public weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from datamix.clipping import clip
from edge.audit.separation import Background, background_of
from edge.preprocess import preprocessor

if TYPE_CHECKING:
    from edge.audit.observation import Observation, Public

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_ROWS = 256


def round_features(public: Public, raw: Array, *, rounds: int | None = None) -> tuple[Floats, ...]:
    """What a device would mix in each round for these inputs.

    Args:
        public: model and preprocessing.
        raw: (n, *raw_shape) raw inputs.
        rounds: only so many; all by default.

    Returns:
        one (n, C, H, W) float32 for each round.
    """
    import torch

    model, prepare = public.model, preprocessor(public.manifest.preprocessing)
    wanted = len(model.blocks) if rounds is None else rounds
    parts: list[list[Floats]] = [[] for _ in range(wanted)]
    with torch.no_grad():
        for start in range(0, len(raw), _ROWS):
            features = model.stem(torch.from_numpy(prepare(raw[start : start + _ROWS])))
            for index in range(wanted):
                parts[index].append(features.numpy())
                if index + 1 < wanted:
                    features = model.bridges[index](model.blocks[index](features))
    return tuple(np.concatenate(part) for part in parts)


def next_features(public: Public, block: int, features: Array) -> Floats:
    """Features of the round after ``block`` from those of its own, (n, C, H, W) each."""
    import torch

    with torch.no_grad():
        out = public.model.bridges[block](public.model.blocks[block](_tensor(features)))
    found: Floats = out.numpy()
    return found


def logits(public: Public, features: Array) -> Floats:
    """The public model's logits (n, classes) from features of the first round (n, C, H, W)."""
    import torch

    model = public.model
    found = []
    with torch.no_grad():
        for start in range(0, len(features), _ROWS):
            values = model.blocks[0](_tensor(features[start : start + _ROWS]))
            for bridge, block in zip(model.bridges, list(model.blocks)[1:], strict=True):
                values = block(bridge(values))
            found.append(model.head(values).numpy())
    return np.concatenate(found)


def clipped(features: Array) -> Floats:
    """Features (n, C, H, W) as they leave in the two modes with noise."""
    return clip(features)[0]


def some_public(public: Public, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of the public training data, at most ``count``, in rising order."""
    return np.sort(rng.permutation(len(public.training))[:count]).astype(np.int64)


def flat(maps: Array) -> npt.NDArray[np.float64]:
    """Rows of values: (n, C, H, W) to (n, d) float64."""
    return maps.reshape(len(maps), -1).astype(np.float64)


def leaving(observation: Observation, features: Array) -> Array:
    """Features (n, C, H, W) as they are hidden in this mode: clipped wherever noise is added."""
    return features if observation.mode == "mix" else clipped(features)


def backgrounds(
    observation: Observation, count: int, rng: np.random.Generator
) -> tuple[Background, ...]:
    """What public features have in common, for each round: of ``count`` public inputs."""
    public = observation.public
    inputs = public.training.inputs[some_public(public, count, rng)]
    return tuple(
        background_of(flat(leaving(observation, part))) for part in round_features(public, inputs)
    )


def noise_sigma(observation: Observation) -> float:
    """Deviation of the noise in what this operator sees; the manifest is public."""
    manifest = observation.public.manifest
    if observation.mode == "bounded" and manifest.bounded is not None:
        return manifest.bounded.sigma
    if observation.mode == "split" and manifest.split is not None:
        return manifest.split.sigma
    return 0.0


def _tensor(features: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(features, np.float32))
