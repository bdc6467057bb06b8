"""The way of features through the cloud in training and in experiments, many groups at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from datamix.models import SplitModel
from edge.laws import Law, draw
from edge.wires import Wire, rounded


@dataclass(frozen=True, slots=True)
class Mixing:
    """What happens to features on their way to the cloud and back.

    Attributes:
        group_size: K.
        law: of the matrices.
        noise_sigma: deviation of Gaussian noise on the mixtures; where there is any, members are
            clipped before, as a device does (:class:`edge.modes.Bounded`).
        strength: see :func:`edge.laws.draw`.
        wire: value type of features on the wire.
    """

    group_size: int
    law: Law = "haar"
    noise_sigma: float = 0.0
    strength: float = 1.0
    wire: Wire = "float32"


def logits_of(
    part: nn.Module, inputs: Tensor, mixing: Mixing | None, rng: np.random.Generator
) -> Tensor:
    """Logits (n, classes) of inputs (n, C, H, W), through mixing where there is any."""
    if mixing is not None and isinstance(part, SplitModel):
        return mixed_logits(part, inputs, mixing, rng)
    logits: Tensor = part(inputs)
    return logits


def mixed_logits(
    model: SplitModel, inputs: Tensor, mixing: Mixing, rng: np.random.Generator
) -> Tensor:
    """head(A^-1 block(A stem(x))), a fresh A per group and round.

    (n, C, H, W) -> (n, classes); n is a multiple of the group size. Matrices and noise come
    from ``rng`` and not from :mod:`edge.mixing`: training data is no secret here, and a run must
    repeat.
    """
    features = model.stem(inputs)
    for index, block in enumerate(model.blocks):
        if index:
            features = model.bridges[index - 1](features)
        pair = draw(
            mixing.law,
            rng,
            len(inputs) // mixing.group_size,
            mixing.group_size,
            strength=mixing.strength,
        )
        a, inverse = (torch.from_numpy(matrices).to(inputs.device) for matrices in pair)
        scale = None
        if mixing.noise_sigma:
            features, scale = clip(features)
        sent = apply(a, features)
        if mixing.noise_sigma:
            sent = sent + mixing.noise_sigma * _noise(sent, rng)
        answer = block(rounded(sent, mixing.wire))
        features = apply(inverse, rounded(answer, mixing.wire))
        if scale is not None:
            features = features * scale
    logits: Tensor = model.head(features)
    return logits


def clip(features: Tensor) -> tuple[Tensor, Tensor]:
    """Members of mean square 1 at most, and what each was divided by; gradients pass through both.

    (n, C, H, W) -> (n, C, H, W) float32 and (n, 1, 1, 1) float32, 1 or more. What a device does is
    :func:`datamix.clipping.clip`.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        # Clamped before the root, whose slope at 0 is infinite.
        scale = features.square().mean((1, 2, 3), keepdim=True).clamp(min=1).sqrt()
        return features / scale, scale


def _noise(like: Tensor, rng: np.random.Generator) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int(rng.integers(2**63)))
    return torch.randn(like.shape, generator=generator, device=like.device)


def apply(matrices: Tensor, rows: Tensor) -> Tensor:
    """Mix each group of rows (n, C, H, W) with its own matrix of (groups, K, K), in float32.

    Under autocast, too: rounding twice would be the larger part of the error of de-mixing.
    """
    groups, k = matrices.shape[:2]
    with torch.autocast(rows.device.type, enabled=False):
        if rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last):
            last = rows.permute(0, 2, 3, 1)
            mixed = torch.bmm(matrices, last.reshape(groups, k, -1).float()).view(last.shape)
            return mixed.permute(0, 3, 1, 2)
        return torch.bmm(matrices, rows.reshape(groups, k, -1).float()).view(rows.shape)
