"""What the CUDA engine needs of a GPU: three streams, events, memory, graphs.

Work given to a stream is done in the order it was given, some time later. An event stands for the
work its stream had when it was recorded; another stream, or the host, can wait for it. That is all
the order there is: tests put a GPU in this one's place that does everything as late and in as odd
an order as this allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from datamix.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WARM_RUNS = 3  # before a capture: libraries choose their kernels and allocate their workspaces


class Event(Protocol):
    """A point in a stream's work; may be recorded again and again."""

    def done(self) -> bool:
        """Whether that point is passed; never blocks."""
        ...

    def wait(self) -> None:
        """Block the host until it is; releases the GIL."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Time on the device between two points, in seconds; both must be passed."""
        ...


class Stream(Protocol):
    """A queue of work on the device."""

    def do(self, work: Callable[[], object]) -> None:
        """Add what ``work`` launches; without gradients. It does not wait for the device."""
        ...

    def record(self, event: Event) -> None:
        """Let ``event`` stand for all that was added so far."""
        ...

    def wait(self, event: Event) -> None:
        """Do what is added from now on after what ``event`` stands for now."""
        ...


class Gpu(Protocol):
    """One device.

    Attributes:
        name: ``cuda`` or ``cuda:N``.
        has_bfloat16: whether it multiplies bfloat16 itself.
        upload: for copies to it.
        compute: for kernels.
        download: for copies from it.
    """

    name: str
    has_bfloat16: bool
    upload: Stream
    compute: Stream
    download: Stream

    def event(self) -> Event:
        """A new event."""
        ...

    def memory(self, size_bytes: int) -> Tensor:
        """Memory of the device, uint8."""
        ...

    def pinned(self, size_bytes: int) -> Tensor:
        """Page-locked memory of the host, uint8: copies to and from it need no help of the host."""
        ...

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module's weights there."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record what ``work`` launches on the compute stream.

        Returns:
            Launches the same again, on the same memory, at the price of one launch; gives the
            same tensor each time, with new values.
        """
        ...

    def settle(self) -> None:
        """Wait for all work of all streams."""
        ...


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)
        return float(earlier.event.elapsed_time(self.event)) / 1000


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def do(self, work: Callable[[], object]) -> None:
        import torch

        with torch.inference_mode(), torch.cuda.stream(self.stream):
            work()

    def record(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        event.event.record(self.stream)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self.stream.wait_event(event.event)


class CudaGpu:
    """A real one, by torch. Not measured yet: see :mod:`deployments.cuda`."""

    def __init__(self, name: str) -> None:
        """Open the device.

        Raises:
            ConfigError: it is not there.
        """
        import torch

        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"engine device is {name!r}, but torch finds {torch.cuda.device_count()} CUDA "
                "devices here"
            )
        self.name = name
        self._torch = torch
        self._device = torch.device("cuda", index)
        self.has_bfloat16 = torch.cuda.get_device_capability(self._device) >= (8, 0)
        upload, self._compute, download = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self.upload: Stream = _CudaStream(upload)
        self.compute: Stream = _CudaStream(self._compute)
        self.download: Stream = _CudaStream(download)
        # One pool for all graphs: they run one after the other, and each keeps its output.
        self._pool = torch.cuda.graph_pool_handle()

    def event(self) -> Event:
        """One that the host waits for asleep: spinning would take a core from the event loop."""
        event = self._torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        return _CudaEvent(event)

    def memory(self, size_bytes: int) -> Tensor:
        """See :class:`Gpu`; zeros."""
        return self._torch.zeros(size_bytes, dtype=self._torch.uint8, device=self._device)

    def pinned(self, size_bytes: int) -> Tensor:
        """See :class:`Gpu`; torch keeps what is let go for the next one, once its copy is done."""
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, pin_memory=True)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """See :class:`Gpu`."""
        return module.to(self._device)

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See :class:`Gpu`; cuDNN tries its kernels before, and the graph keeps the fastest."""
        torch = self._torch
        cudnn: Any = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, True
        try:
            for _ in range(_WARM_RUNS):
                self.compute.do(work)
            self.settle()
            graph = torch.cuda.CUDAGraph()
            # Another version may be serving from another thread: only this one is held to what a
            # capture allows.
            with (
                torch.inference_mode(),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._compute,
                    capture_error_mode="thread_local",
                ),
            ):
                output = work()
        finally:
            cudnn.benchmark = before

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def settle(self) -> None:
        """See :class:`Gpu`."""
        self._torch.cuda.synchronize(self._device)
