"""Which engine the settings mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deployments.cpu import TorchEngine
from deployments.emulated import emulated
from deployments.engine import Block, EchoEngine, Engine, EngineText, Shape

if TYPE_CHECKING:
    import torch

    from deployments.config import Config


def echo_engine(text: EngineText, shapes: Sequence[Shape]) -> Engine:
    """The null or emulated engine for blocks of the given row shapes."""
    if text.kind == "null":
        return EchoEngine(shapes)
    return emulated(shapes, text.a_s, text.b_s)


def torch_engine(modules: torch.nn.ModuleList, blocks: Sequence[Block], config: Config) -> Engine:
    """The engine that computes these modules, one per block.

    Raises:
        ConfigError: the device or dtype cannot be had.
    """
    return TorchEngine(
        modules,
        blocks,
        max_batch_rows=config.max_batch_rows,
        device=config.device,
        dtype=config.dtype,
        channels_last=config.channels_last,
        threads=config.threads,
    )
