"""Engines run a block of the backbone on a batch: on CPU, on CUDA, or pretending for load tests.

The batcher calls :meth:`Engine.run` from one thread, one batch at a time. An engine owns its batch
buffer, so rows are copied once: from the message's bytes into the buffer, converted on the way.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.wire import dequantise

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Rows(NamedTuple):
    """The rows of one request, as they came off the wire.

    Attributes:
        features: (rows, *shape), float16, float32 or int8.
        scale: (rows,) float32 with int8, else None.
    """

    features: Array
    scale: Array | None


class Block(NamedTuple):
    """Shapes of one row before and after a block."""

    input_shape: Shape
    output_shape: Shape


class Engine(Protocol):
    """What the batcher needs of an engine."""

    @property
    def name(self) -> str:
        """Short name for metadata and metrics, such as ``torch:cpu:float32``."""
        ...

    @property
    def blocks(self) -> Sequence[Block]:
        """Shapes of every block it can run."""
        ...

    def run(self, block: int, requests: Sequence[Rows]) -> Sequence[Array]:
        """Run one block on the rows of all requests, as one batch.

        Blocks the calling thread; releases the GIL while it computes.

        Returns:
            One output per request, in order: (rows, *output_shape), float16 where the request came
            as float16, else float32.
        """
        ...


class EchoEngine:
    """No network at all: each row comes back as it went in, after ``a_s + b_s * rows`` seconds.

    With both at 0 this is the null engine, which shows what everything around an engine costs.
    Above that it is the emulated engine: it sleeps, so that many of them fit on a laptop.
    """

    def __init__(self, shapes: Sequence[Shape], a_s: float = 0.0, b_s: float = 0.0) -> None:
        """Echo blocks of the given row shapes; ``a_s`` per batch and ``b_s`` per row, in seconds.

        Raises:
            ConfigError: a duration is negative or not finite.
        """
        if not (math.isfinite(a_s) and math.isfinite(b_s) and a_s >= 0 and b_s >= 0):
            raise ConfigError(f"emulated engine has a_s={a_s}, b_s={b_s}, expected seconds >= 0")
        self.a_s, self.b_s = a_s, b_s
        self.name = f"emulated:{a_s:g},{b_s:g}" if a_s or b_s else "null"
        self.blocks = [Block(shape, shape) for shape in shapes]

    def run(self, block: int, requests: Sequence[Rows]) -> Sequence[Array]:
        """Return the rows, late by the cost model."""
        if duration := self.a_s + self.b_s * sum(len(request.features) for request in requests):
            time.sleep(duration)
        return [dequantise(*rows) if rows.scale is not None else rows.features for rows in requests]


class TorchEngine:
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

    def run(self, block: int, requests: Sequence[Rows]) -> Sequence[Array]:
        """One forward over the rows of all requests."""
        torch = self._torch
        counts = [len(request.features) for request in requests]
        shape = (sum(counts), *self.blocks[block].input_shape)
        batch = self._buffer[: math.prod(shape)].view(shape)
        with torch.inference_mode():
            parts = torch.split(batch, counts)
            for part, rows in zip(parts, requests, strict=True):
                self._fill(part, rows)
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
        return [part.numpy() for part in torch.split(output, counts)]

    def _fill(self, part: torch.Tensor, rows: Rows) -> None:
        """Copy one request's rows into the batch, as float32."""
        part.copy_(self._torch.from_numpy(rows.features))
        if rows.scale is not None:
            scale = self._torch.from_numpy(rows.scale.copy())
            part.mul_(scale.view(-1, *[1] * (part.ndim - 1)))


def check_device(device: str) -> None:
    """Check the name of a device, not whether it is there.

    Raises:
        ConfigError: neither ``cpu`` nor ``cuda`` nor ``cuda:N``.
    """
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise ConfigError(f"engine device is {device!r}, expected cpu, cuda or cuda:N")


def parse_engine(text: str) -> tuple[str, float, float]:
    """Read ``torch``, ``null`` or ``emulated:a_s,b_s`` as (kind, a_s, b_s).

    Raises:
        ConfigError: anything else.
    """
    kind, _, numbers = text.partition(":")
    try:
        if kind == "emulated":
            a_s, b_s = (float(number) for number in numbers.split(","))
            if 0 <= a_s < math.inf and 0 <= b_s < math.inf:
                return kind, a_s, b_s
        if text in ("torch", "null"):
            return kind, 0.0, 0.0
    except ValueError:
        pass
    raise ConfigError(f"engine is {text!r}, expected torch, null or emulated:a_s,b_s in seconds")
