"""A GPU that does its work on the processor, as late and in as odd an order as streams allow.

Work waits in its stream until somebody waits for an event; then streams advance in a random order,
each as far as its own waits let it, until that event is passed. Memory starts as NaN. An engine
that forgot to wait somewhere, or that reuses memory too early, computes something wrong.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deployments.gpu import Event, Stream


class Mark:
    """One recording of an event."""

    def __init__(self) -> None:
        self.passed = False


class Wait(NamedTuple):
    """A stream waits for that recording."""

    mark: Mark


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.mark: Mark | None = None

    def done(self) -> bool:
        self.gpu.advance(self.gpu.random.randrange(4))
        return self.mark is None or self.mark.passed

    def wait(self) -> None:
        while not self.done():
            self.gpu.advance(1)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, FakeEvent)
        for event in (self, earlier):
            assert event.mark is not None
            assert event.mark.passed, "the time of an event that is not passed"
        return 0.25


class FakeStream:
    def __init__(self) -> None:
        self.items: deque[Callable[[], object] | Mark | Wait] = deque()

    def do(self, work: Callable[[], object]) -> None:
        self.items.append(work)

    def record(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        event.mark = Mark()
        self.items.append(event.mark)

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        if event.mark is not None:
            self.items.append(Wait(event.mark))

    def step(self) -> bool:
        """Do the next item, where that is possible."""
        if not self.items:
            return False
        item = self.items[0]
        if isinstance(item, Wait) and not item.mark.passed:
            return False
        self.items.popleft()
        if isinstance(item, Mark):
            item.passed = True
        elif not isinstance(item, Wait):
            with torch.inference_mode():
                item()
        return True


class FakeGpu:
    """See the module."""

    name = "cuda"

    def __init__(self, seed: int = 0, *, has_bfloat16: bool = True) -> None:
        self.random = random.Random(seed)
        self.has_bfloat16 = has_bfloat16
        self.streams = [FakeStream() for _ in range(3)]
        self.upload: Stream
        self.compute: Stream
        self.download: Stream
        self.upload, self.compute, self.download = self.streams
        self.captured: list[tuple[int, ...]] = []  # shapes of what graphs give
        self.replayed: list[tuple[int, ...]] = []

    def event(self) -> Event:
        return FakeEvent(self)

    def memory(self, size_bytes: int) -> Tensor:
        return torch.full((size_bytes,), 255, dtype=torch.uint8)

    pinned = memory

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.inference_mode():
            output = work().clone()
        self.captured.append(tuple(output.shape))

        def replay() -> Tensor:
            self.replayed.append(tuple(output.shape))
            return output.copy_(work())

        return replay

    def settle(self) -> None:
        while self.advance(1):
            pass

    def advance(self, times: int) -> bool:
        """Do that many items of randomly chosen streams; whether there was anything to do."""
        for _ in range(times):
            order = self.random.sample(self.streams, len(self.streams))
            if not any(stream.step() for stream in order):
                return False
        return times > 0
