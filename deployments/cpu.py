"""The backbone on this machine's processor.

Rows are copied once: from the message's bytes into the engine's batch, converted to float32 and
laid out as the convolutions want them on the way. `benchmarks/engine.py` measures what each setting
gains; the defaults are what it found best. A frozen TorchScript graph and ``torch.compile`` are not
offered, because they gained nothing that could be told from noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from datamix.errors import ConfigError
from deployments.cores import has_bfloat16, usable_cores
from deployments.engine import Array, Block, Engine, Pending, Rows, Settled
from deployments.fuse import Optimise, prepare


class CpuEngine(Engine):
    """Computes a batch when it is started, on all cores it may use."""

    def __init__(
        self,
        backbone: torch.nn.ModuleList,
        blocks: Sequence[Block],
        *,
        max_batch_rows: int,
        dtype: str = "float32",
        channels_last: bool = True,
        optimise: Optimise = "fuse",
        threads: int | None = None,
    ) -> None:
        """Get the modules ready, one per block, and make room for ``max_batch_rows``.

        Args:
            backbone: the modules, float32; they are left as they are.
            blocks: their shapes.
            max_batch_rows: rows of a batch at most.
            dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the processor has it.
            channels_last: memory format of batches and weights.
            optimise: ``fuse`` folds norms into convolutions (:mod:`deployments.fuse`).
            threads: of one forward; None for :func:`deployments.cores.usable_cores`.

        Raises:
            ConfigError: ``dtype`` is another one, or bfloat16 and the processor has it not.
        """
        dtype = cpu_dtype(dtype)
        # torch keeps this per process: the engine made last decides.
        torch.set_num_threads(usable_cores() if threads is None else threads)
        # Rows are read-only views of a message, which torch warns of once; nothing writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.name = f"torch:cpu:{dtype}"
        self.blocks = list(blocks)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._channels_last = channels_last
        self._modules = [
            prepare(module, self._dtype, channels_last, optimise) for module in backbone
        ]
        # One buffer for all blocks: batches run one at a time.
        size = max_batch_rows * max(math.prod(block.input_shape) for block in blocks)
        self._buffer = torch.empty(size, dtype=torch.float32)

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        """One forward over the rows of all requests."""
        counts = [len(request.features) for request in requests]
        with torch.inference_mode():
            staged = self._batch(sum(counts), block)
            for part, rows in zip(torch.split(staged, counts), requests, strict=True):
                self._fill(part, rows)
            batch = staged.to(self._dtype)  # keeps the memory format
            copied = staged.nbytes if batch is staged else staged.nbytes + batch.nbytes
            output = self._modules[block](batch)
            # float16 is what most requests want back, and torch converts 20 times faster than
            # numpy. Values too large for it become Inf, which the encoder refuses.
            half = all(rows.features.dtype == np.float16 for rows in requests)
            output = output.to(torch.float16 if half else torch.float32).contiguous()
            if output.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr():
                # A block that hands its input on: the next batch would overwrite it while this
                # one's responses are still being written.
                output = output.clone()
        return Settled(divide(output.numpy(), counts), copied)

    def _batch(self, rows: int, block: int) -> torch.Tensor:
        """The front of the buffer as (rows, *input_shape), in the engine's memory format."""
        shape = (rows, *self.blocks[block].input_shape)
        flat = self._buffer[: math.prod(shape)]
        if not self._channels_last or len(shape) != 4:
            return flat.view(shape)
        rows, channels, height, width = shape
        return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)

    def _fill(self, part: torch.Tensor, rows: Rows) -> None:
        """Copy one request's rows into the batch, as float32."""
        part.copy_(torch.from_numpy(rows.features))
        if rows.scale is not None:
            scale = torch.from_numpy(rows.scale.copy())
            part.mul_(scale.view(-1, *[1] * (part.ndim - 1)))


def cpu_dtype(dtype: str) -> str:
    """The dtype to compute in on this processor.

    Raises:
        ConfigError: not one that it can compute in.
    """
    if dtype == "auto":
        return "bfloat16" if has_bfloat16() else "float32"
    if dtype == "bfloat16" and not has_bfloat16():
        raise ConfigError(
            "engine dtype is 'bfloat16', but this processor has no instructions for it, expected "
            "'float32' or 'auto'"
        )
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"engine dtype is {dtype!r}, expected float32, bfloat16 or auto on the processor"
        )
    return dtype


def divide(output: Array, counts: Sequence[int]) -> list[Array]:
    """The rows of each request, as views."""
    ends = list(accumulate(counts))
    return [output[end - count : end] for end, count in zip(ends, counts, strict=True)]
