"""A stock for the bundle workload: real inputs, mixed and encoded once by the parent of all shards.

The simulator may know what the cloud computes, a device never does: the backbone is run here on the
very rows that will travel, so that each answer is compared as exactly as without a stock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.wire import quantise
from edge.fleet import pacing
from edge.fleet.config import FleetConfig
from edge.fleet.shared import SharedBytes
from edge.fleet.stock import Layout, Leg, Prepared, Stock, parts
from edge.modes import Mix, check_mode

Floats = npt.NDArray[np.float32]

_TOLD = 256  # groups that are compared with each other


@dataclass(frozen=True, slots=True)
class Shelf:
    """A stock on its way to the shards.

    Attributes:
        layout: what is where.
        memory: the one copy of it.
    """

    layout: Layout
    memory: SharedBytes

    def stock(self) -> Stock:
        """The stock, as whoever got the shelf sees it."""
        return Stock(self.layout, self.memory.view)


def prepare(config: FleetConfig) -> Shelf:
    """Mix ``config.precompute`` groups of real inputs, for all their rounds, and encode them.

    Raises:
        BundleError: a bundle that can't be read or trusted.
        ConfigError: inputs that don't fit the bundle, a mode whose secrets serve only once, a
            tolerance that would not tell groups apart, or too little memory.
    """
    if config.bundle is None:
        raise ConfigError("precompute got no bundle, expected a path")
    import torch

    from datamix.bundle import load_backbone
    from edge.fleet.inputs import check_telling, compute_features, load_inputs
    from edge.fleet.workload import Reference
    from edge.runtime import TorchDevice

    device = TorchDevice(config.bundle)
    manifest, blocks = load_backbone(config.bundle)
    if (name := check_mode(manifest, config.mode)) != "mix":
        raise ConfigError(f"precompute got the mode {name!r}, expected 'mix'")
    count, size = config.precompute, manifest.group_size
    raw, _ = load_inputs(config.inputs, manifest)
    features = compute_features(device, raw)
    chosen = pacing.inputs(count, size, len(raw), config.seed)
    legs = [
        Leg((size, *block.input_shape), (size, *block.output_shape)) for block in manifest.blocks
    ]
    layout = Layout(count, tuple(legs))
    told: list[list[Floats]] = [[] for _ in legs]
    mode = Mix()

    def rounds(group: int) -> Iterator[Prepared]:
        values = features[chosen[group]]
        for index, block in enumerate(blocks):
            leaving, secret = mode.protect(index, values)
            rows, _ = quantise(leaving, "float16")
            # What the cloud computes on is what comes through the wire.
            with torch.inference_mode():
                expected = block(torch.from_numpy(rows.astype(np.float32))).numpy()
            yield Prepared(rows, expected)
            if group < _TOLD:
                told[index].append(expected)
            values = secret.restore(expected)
            secret.wipe()
            if index < len(blocks) - 1:
                values = device.bridge(index, values)

    memory = SharedBytes.write(parts(layout, map(rounds, range(count)), manifest.tolerance))
    try:
        if config.verify:
            reference = Reference(np.empty(0, np.int64), manifest.tolerance)
            check_telling(reference, [np.stack(answers) for answers in told])
    except ConfigError:
        memory.close()
        raise
    return Shelf(layout, memory)
