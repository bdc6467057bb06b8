"""Which engine the settings mean. Torch is loaded where it is needed, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deployments.emulated import emulated
from deployments.engine import Block, EchoEngine, Engine, EngineText, Shape

if TYPE_CHECKING:
    import torch

    from deployments.config import Config


def echo_engine(
    text: EngineText, shapes: Sequence[Shape], max_batch_rows: int, *, bundle: bool = True
) -> Engine:
    """The null or emulated engine for blocks of the given row shapes.

    Without a bundle, the one shape that there is serves for all blocks of a profile.

    Raises:
        ConfigError: the profile cannot be read, or does not fit the blocks or the settings.
    """
    if text.kind == "null":
        return EchoEngine(shapes)
    if text.profile is None:
        return emulated(shapes, text.a_s, text.b_s)
    from deployments.profile import emulate, read_profile

    profile = read_profile(text.profile)
    if not bundle:
        shapes = [*shapes] * len(profile.blocks)
    return emulate(profile, shapes, max_batch_rows)


def torch_engine(modules: torch.nn.ModuleList, blocks: Sequence[Block], config: Config) -> Engine:
    """The engine that computes these modules, one per block.

    Raises:
        ConfigError: the device or dtype cannot be had.
    """
    # Measured on the processor, and what tensor cores want on a GPU.
    channels_last = True if config.channels_last == "auto" else config.channels_last
    # An operator's answers have noise taken off, which bfloat16 is too coarse for.
    dtype = "float32" if config.operator and config.dtype == "auto" else config.dtype
    if config.device == "cpu":
        from deployments.cpu import CpuEngine

        return CpuEngine(
            modules,
            blocks,
            max_batch_rows=config.max_batch_rows,
            dtype=dtype,
            channels_last=channels_last,
            optimise=config.optimise,
            threads=config.threads,
        )
    from deployments.cuda import CudaEngine
    from deployments.gpu import CudaGpu

    return CudaEngine(
        modules,
        blocks,
        CudaGpu(config.device),
        max_batch_rows=config.max_batch_rows,
        dtype=dtype,
        channels_last=channels_last,
        optimise=config.optimise,
        graphs=config.graphs,
    )
