"""Several processes that train one network: what one of them must know and do.

Whoever starts the processes (:mod:`cluster.ray_training`) also starts ``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed


class Workers(Protocol):
    """One process among those that train the same network."""

    @property
    def rank(self) -> int:
        """This one's number, from 0. Number 0 writes and reports."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the workers, in place."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any worker says so."""
        ...

    def share(self, value: Any) -> Any:
        """What number 0 has; the others' values are ignored."""
        ...


class Alone:
    """The only worker."""

    rank = 0
    size = 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def any(self, flag: bool) -> bool:
        """The flag."""
        return flag

    def share(self, value: Any) -> Any:
        """The value."""
        return value


class ProcessGroup:
    """A worker of ``torch.distributed``'s default group, which must have been started."""

    def __init__(self) -> None:
        """Ask the group for rank and size."""
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """One message for all of them: there are many, and most are small."""
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """A sum over the flags."""
        where = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor([float(flag)], device=where)
        distributed.all_reduce(total)
        return bool(total.item() > 0)

    def share(self, value: Any) -> Any:
        """Broadcast from number 0, pickled: the workers are one's own."""
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]
