"""The backbone on torch: CPU or CUDA, float32 or bfloat16, rows converted once.

The engine owns its batch buffer, so rows are copied once: from the message's bytes into the buffer,
converted on the way.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from datamix.errors import ConfigError
from deployments.engine import Block, Engine, Pending, Rows, Settled, check_device

if TYPE_CHECKING:
    import torch


class TorchEngine(Engine):
    """The backbone on torch: CPU or CUDA, float32 or bfloat16, rows converted once."""

    def __init__(
        self,
        backbone: torch.nn.ModuleList,
        blocks: Sequence[Block],
        *,
        max_batch_rows: int,
        device: str = "cpu",
        dtype: str = "float32",
        channels_last: bool = False,
        threads: int | None = None,
    ) -> None:
        """Move the backbone to ``device`` and make room for batches of ``max_batch_rows``.

        Raises:
            ConfigError: the device is not there, or ``dtype`` is neither float32 nor bfloat16.
        """
        import torch

        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"engine dtype is {dtype!r}, expected float32 or bfloat16")
        check_device(device)
        index = int(device.partition(":")[2] or 0)
        if device != "cpu" and index >= torch.cuda.device_count():
            raise ConfigError(
                f"engine device is {device!r}, but torch finds {torch.cuda.device_count()} CUDA "
                "devices here"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        # Rows are read-only views of a message, which torch warns of once; nothing writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.name = f"torch:{device}:{dtype}"
        self.blocks = list(blocks)
        self._torch = torch
        self._device = torch.device(device)
        self._dtype = getattr(torch, dtype)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._modules = backbone.to(self._device, self._dtype).eval()
        if channels_last:
            self._modules = self._modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # One buffer for all blocks: batches run one at a time. Page-locked memory lets the copy to
        # a GPU go on beside the host.
        size = max_batch_rows * max(math.prod(block.input_shape) for block in blocks)
        self._buffer = torch.empty(
            size, dtype=torch.float32, pin_memory=self._device.type == "cuda"
        )

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        """One forward over the rows of all requests."""
        torch = self._torch
        counts = [len(request.features) for request in requests]
        shape = (sum(counts), *self.blocks[block].input_shape)
        batch = self._buffer[: math.prod(shape)].view(shape)
        with torch.inference_mode():
            parts = torch.split(batch, counts)
            for part, rows in zip(parts, requests, strict=True):
                self._fill(part, rows)
            copied = batch.nbytes
            batch = batch.to(self._device, non_blocking=True).to(self._dtype)
            if self._format is torch.channels_last:
                batch = batch.contiguous(memory_format=self._format)
            output = self._modules[block](batch)
            # float16 is what most requests want back; torch converts 20 times faster than numpy,
            # and from a GPU half as many bytes come home. Values too large for it become Inf,
            # which the encoder refuses.
            half = all(rows.features.dtype == np.float16 for rows in requests)
            output = output.to("cpu", torch.float16 if half else torch.float32).contiguous()
            if output.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr():
                # A block that hands its input on: the next batch would overwrite it while this
                # one's responses are still being written.
                output = output.clone()
        return Settled([part.numpy() for part in torch.split(output, counts)], copied)

    def _fill(self, part: torch.Tensor, rows: Rows) -> None:
        """Copy one request's rows into the batch, as float32."""
        part.copy_(self._torch.from_numpy(rows.features))
        if rows.scale is not None:
            scale = self._torch.from_numpy(rows.scale.copy())
            part.mul_(scale.view(-1, *[1] * (part.ndim - 1)))
