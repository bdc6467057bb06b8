"""The backbone on a CUDA device: copies beside computation, one launch per batch, no waiting.

**Not measured on a GPU yet.** Its logic is tested on the processor, with a GPU that does everything
as late and in as odd an order as the streams allow (`tests/fake_gpu.py`); what it gains, and
whether the CUDA calls of :mod:`deployments.gpu` do what they should, `benchmarks/gpu.py` has to
show.

Each of the two batches under way has a slot: page-locked memory that its rows are packed into as
they came, the same on the device, and a place for its results.

    host              upload stream      compute stream                    download stream
    pack into pinned  pinned -> raw      raw -> batch (convert, scale)
                                         batch -> output (CUDA graph)
                                         output -> out (float16 or 32)     out -> pinned result

The host launches all of it at once and waits for the last event only. A slot is taken again when
its batch has been waited for; what is shared by both, batch and output, only the compute stream
touches, in order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamix.errors import ConfigError
from deployments.engine import Array, Block, Engine, Pending, Rows, Shape
from deployments.fuse import Optimise, prepare
from deployments.gpu import Event, Gpu
from deployments.staging import Layout, lay_out, most_bytes, pack, view


def buckets(most: int) -> list[int]:
    """Batch sizes that get a graph: powers of two, the middles between them, and ``most``.

    A batch is padded to the next of them, so by less than half of its rows.
    """
    sizes = {most}
    power = 1
    while power < most:
        sizes.add(power)
        if 3 * power < 2 * most:
            sizes.add(3 * power // 2)
        power *= 2
    return sorted(sizes)


@dataclass(slots=True)
class _Slot:
    """What one batch under way has for itself."""

    host: Tensor
    packed: npt.NDArray[np.uint8]  # the same memory
    raw: Tensor
    out: Tensor
    began: Event
    uploaded: Event
    computed: Event
    landed: Event
    busy: bool = False


class _Underway:
    """One batch on the GPU."""

    def __init__(self, slot: _Slot, layout: Layout, counts: Sequence[int], output: Array) -> None:
        self.copied_bytes = 2 * layout.size_bytes  # into pinned memory, and on to the device
        self._slot = slot
        self._starts, self._counts = layout.starts, counts
        self._output = output
        self._copy_s = 0.0

    @property
    def copy_s(self) -> float:
        return self._copy_s

    def done(self) -> bool:
        return self._slot.landed.done()

    def wait(self) -> Sequence[Array]:
        slot = self._slot
        try:
            slot.landed.wait()
            self._copy_s = slot.uploaded.seconds_since(slot.began)
        finally:
            slot.busy = False
        parts = zip(self._starts, self._counts, strict=True)
        return [self._output[start : start + count] for start, count in parts]


class CudaEngine(Engine):
    """Two batches under way on one GPU."""

    depth = 2

    def __init__(
        self,
        backbone: torch.nn.ModuleList,
        blocks: Sequence[Block],
        gpu: Gpu,
        *,
        max_batch_rows: int,
        dtype: str = "float32",
        channels_last: bool = True,
        optimise: Optimise = "fuse",
        graphs: bool = True,
    ) -> None:
        """Move the modules to the GPU, make room, and run or record every batch size there will be.

        Args:
            backbone: the modules, float32; they are left as they are.
            blocks: their shapes.
            gpu: where to compute.
            max_batch_rows: rows of a batch at most.
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto``: bfloat16 where the GPU has
                it, else float32.
            channels_last: memory format of batches and weights.
            optimise: ``fuse`` folds norms into convolutions (:mod:`deployments.fuse`).
            graphs: record a CUDA graph per block and bucket, and pad batches to the bucket. Else
                every kernel is launched for every batch, of exactly its rows.

        Raises:
            ConfigError: ``dtype`` is another one, or bfloat16 and the GPU has it not.
        """
        dtype = gpu_dtype(dtype, gpu)
        if dtype == "float32":
            # Else cuDNN would round inputs to 10 bits: that is what bfloat16 and float16 are for.
            torch.backends.cudnn.allow_tf32 = False
        self.name = f"torch:{gpu.name}:{dtype}"
        self.blocks = list(blocks)
        self._gpu = gpu
        self._channels_last = channels_last
        self._buckets = buckets(max_batch_rows)
        kind: torch.dtype = getattr(torch, dtype)
        self._modules = [
            gpu.place(prepare(module, kind, channels_last, optimise)) for module in backbone
        ]
        # One batch for both slots and all blocks: only the compute stream uses it, in order.
        values = max(math.prod(block.input_shape) for block in blocks)
        self._batch = gpu.memory(max_batch_rows * values * kind.itemsize).view(kind)
        self._slots = [self._make_slot(max_batch_rows) for _ in range(self.depth)]
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        gpu.settle()  # weights and memory were made on another stream
        self._warm_up(max_batch_rows, graphs)

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        """Pack the rows and launch everything.

        Raises:
            RuntimeError: two batches are under way already.
        """
        slot = next((slot for slot in self._slots if not slot.busy), None)
        if slot is None:
            raise RuntimeError(f"{self.depth} batches are under way, expected fewer")
        slot.busy = True
        try:
            return self._launch(slot, block, requests)
        except BaseException:
            try:
                self._gpu.settle()  # what was launched may still use the slot's memory
            finally:
                slot.busy = False
            raise

    def _launch(self, slot: _Slot, block: int, requests: Sequence[Rows]) -> Pending:
        gpu, shape = self._gpu, self.blocks[block].input_shape
        layout = lay_out(requests, shape)
        pack(requests, layout, shape, slot.packed)
        size = layout.size_bytes
        gpu.upload.record(slot.began)
        gpu.upload.do(lambda: slot.raw[:size].copy_(slot.host[:size], non_blocking=True))
        gpu.upload.record(slot.uploaded)
        gpu.compute.wait(slot.uploaded)
        half = all(rows.features.dtype == np.float16 for rows in requests)
        gpu.compute.do(lambda: self._compute(slot, layout, block, half))
        gpu.compute.record(slot.computed)
        gpu.download.wait(slot.computed)
        out_shape = (layout.rows, *self.blocks[block].output_shape)
        out_size = math.prod(out_shape) * (2 if half else 4)
        result = gpu.pinned(out_size)
        gpu.download.do(lambda: result.copy_(slot.out[:out_size], non_blocking=True))
        gpu.download.record(slot.landed)
        output = view(result.numpy(), 0, out_shape, "float16" if half else "float32")
        return _Underway(slot, layout, [len(r.features) for r in requests], output)

    def _compute(self, slot: _Slot, layout: Layout, block: int, half: bool) -> None:
        """What the compute stream does for one batch."""
        shape = self.blocks[block].input_shape
        padded = layout.rows
        if self._replays:
            padded = self._buckets[bisect_left(self._buckets, layout.rows)]
        batch = self._front(padded, block)
        for name, first, rows, offset, scale_offset in layout.segments:
            part = batch[first : first + rows]
            wire = self._view(slot.raw, offset, (rows, *shape), getattr(torch, name))
            if scale_offset is None:
                part.copy_(wire)
            else:
                scale = self._view(slot.raw, scale_offset, (rows,), torch.float32)
                torch.mul(wire, scale.view(-1, *[1] * len(shape)), out=part)
        output = self._replays[block, padded]() if self._replays else self._modules[block](batch)
        # Values too large for float16 become Inf, which the encoder refuses.
        dtype = torch.float16 if half else torch.float32
        out_shape = (layout.rows, *self.blocks[block].output_shape)
        self._view(slot.out, 0, out_shape, dtype).copy_(output[: layout.rows])

    def _warm_up(self, max_batch_rows: int, graphs: bool) -> None:
        """See every batch size before anybody waits for it."""
        for block, module in enumerate(self._modules):
            # The largest first: the smaller ones find room in the memory it has let go.
            sizes = reversed(self._buckets if graphs else range(1, max_batch_rows + 1))
            for rows in sizes:
                work = self._forward(module, self._front(rows, block))
                if graphs:
                    self._replays[block, rows] = self._gpu.capture(work)
                else:
                    self._gpu.compute.do(work)
        self._gpu.settle()

    @staticmethod
    def _forward(module: torch.nn.Module, batch: Tensor) -> Callable[[], Tensor]:
        def work() -> Tensor:
            output: Tensor = module(batch)
            return output

        return work

    def _front(self, rows: int, block: int) -> Tensor:
        """The front of the batch's memory as (rows, *input_shape), in its memory format."""
        shape = (rows, *self.blocks[block].input_shape)
        flat = self._batch[: math.prod(shape)]
        if not self._channels_last or len(shape) != 4:
            return flat.view(shape)
        rows, channels, height, kind = shape
        return flat.view(rows, height, kind, channels).permute(0, 3, 1, 2)

    @staticmethod
    def _view(memory: Tensor, offset: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        return memory[offset : offset + size].view(dtype).view(shape)

    def _make_slot(self, rows: int) -> _Slot:
        gpu = self._gpu
        size = max(most_bytes(rows, block.input_shape) for block in self.blocks)
        out_size = rows * max(math.prod(block.output_shape) for block in self.blocks) * 4
        host = gpu.pinned(size)
        packed: npt.NDArray[np.uint8] = host.numpy()
        began, uploaded, computed, landed = (gpu.event() for _ in range(4))
        raw, out = gpu.memory(size), gpu.memory(out_size)
        return _Slot(host, packed, raw, out, began, uploaded, computed, landed)


def gpu_dtype(dtype: str, gpu: Gpu) -> str:
    """The dtype to compute in on this GPU.

    Raises:
        ConfigError: not one that it can compute in.
    """
    if dtype == "auto":
        return "bfloat16" if gpu.has_bfloat16 else "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"engine dtype is {dtype!r}, expected float32, float16, bfloat16 or auto")
    if dtype == "bfloat16" and not gpu.has_bfloat16:
        raise ConfigError(
            f"engine dtype is 'bfloat16', but {gpu.name} has no instructions for it, expected "
            "'float32', 'float16' or 'auto'"
        )
    return dtype
