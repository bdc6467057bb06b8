"""Whether noise can be taken off this engine's answers, as the mode split does (docs/privacy.md).

A device subtracts one operator's answer from the other's. Both are as large as the noise, hundreds
of times the features, and so is what an engine rounds away; the difference keeps it. An engine in
bfloat16 serves the mode mix well and is of no use here, so it is tried before it serves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from datamix.bundle import SplitSpec
from datamix.errors import ConfigError
from deployments.engine import Engine, Rows

_ROWS = 4


def noise_error(engine: Engine, modules: Iterable[torch.nn.Module], sigma: float) -> float:
    """The largest error of de-noised outputs, relative to ``max(1, |value|)``.

    Features of unit variance and their noise are drawn from a fixed seed. Each block is compared
    with its module, run as it is in float32 on the features alone.

    Args:
        engine: what would answer.
        modules: one per block, as they came with the bundle.
        sigma: deviation of the noise.
    """
    rng = np.random.default_rng(0)
    errors = []
    for index, (block, module) in enumerate(zip(engine.blocks, modules, strict=True)):
        shape = (_ROWS, *block.input_shape)
        features, noise = (rng.standard_normal(shape, np.float32) for _ in range(2))
        hidden, masks = (
            engine.run(index, [Rows(rows, None)])[0].astype(np.float32)
            for rows in (features + np.float32(sigma) * noise, noise)
        )
        with torch.inference_mode():
            exact = module(torch.from_numpy(features)).numpy()
        off = np.abs(hidden - np.float32(sigma) * masks - exact) / np.maximum(1, np.abs(exact))
        errors.append(off.max())
    return float(np.max(errors))  # NaN where one is


def check_cancelling(
    engine: Engine, modules: Iterable[torch.nn.Module], split: SplitSpec, *, name: str
) -> None:
    """Refuse an engine whose rounding no device of the mode split could tell from a fault.

    Raises:
        ConfigError: the error is beyond what the bundle ``name`` tolerates.
    """
    error = noise_error(engine, modules, split.sigma)
    if not error <= split.tolerance:
        raise ConfigError(
            f"engine {engine.name} of an operator is off by {error:.2g} once noise of"
            f" {split.sigma:g} times the features' deviation is taken off its answers, and bundle"
            f" {name!r} tolerates {split.tolerance:g}, expected dtype float32"
        )
