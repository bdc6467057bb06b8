"""How many values a part holds at once while torch runs it."""

from __future__ import annotations

import weakref
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from datamix.models.split import Shape
from datamix.models.trace import on_meta


def peak_values(part: nn.Module, shape: Shape) -> int:
    """The most values alive at once for one input of ``shape``, the input included.

    Counted as torch runs the part in eval mode, layer by layer: a chain keeps its own input until
    it ends. Parameters and buffers are not counted.
    """
    copy = on_meta(part)
    inputs = torch.empty((1, *shape), device="meta")
    watch = _Watch([*chain(copy.parameters(), copy.buffers())])
    watch.see(inputs)
    with torch.no_grad(), watch:
        copy(inputs)
    return watch.peak


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, from their making to their end."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {id(tensor.untyped_storage()) for tensor in ignored}
        self._ignored = ignored
        self._alive = 0
        self.peak = 0

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._storages:
            return
        values = storage.nbytes() // tensor.element_size()
        self._storages.add(id(storage))
        weakref.finalize(storage, self._forget, id(storage), values)
        self._alive += values
        self.peak = max(self.peak, self._alive)

    def _forget(self, storage: int, values: int) -> None:
        self._storages.discard(storage)
        self._alive -= values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.see(value)
        return result
