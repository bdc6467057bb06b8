"""What every split model is: stem | blocks with bridges between them | head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from datamix.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A name that :func:`build` knows, and its options; what is left out takes the default."""

    name: str
    options: Mapping[str, int | str] = field(default_factory=dict)


class SplitModel(nn.Module):
    """A network in three parts: stem, blocks with bridges, head.

    Attributes:
        stem: (n, *input_shape) -> (n, C, H, W); runs on the device.
        blocks: each (n, C, H, W) -> (n, C', H', W'); run in the cloud.
        bridges: the device's step between two blocks, one fewer than blocks.
        head: last block's output -> (n, classes) logits; runs on the device.
        edge_head: builds a fresh head for the stem's output: the edge-only baseline's.
        linear: whether every block is exactly linear in eval mode.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: list[nn.Module],
        bridges: list[nn.Module],
        head: nn.Module,
        *,
        edge_head: Callable[[], nn.Module],
        input_shape: tuple[int, int, int],
        classes: int,
        linear: bool,
    ) -> None:
        """Put the parts together; there is one bridge between each two blocks."""
        super().__init__()
        if len(bridges) != len(blocks) - 1:
            raise ConfigError(f"got {len(bridges)} bridges, expected {len(blocks) - 1}")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.bridges = nn.ModuleList(bridges)
        self.head = head
        self.edge_head = edge_head
        self.input_shape: tuple[int, int, int] = input_shape
        self.classes = classes
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        """The unmixed path: (n, *input_shape) float32 -> (n, classes) logits."""
        features = self.blocks[0](self.stem(inputs))
        for bridge, block in zip(self.bridges, list(self.blocks)[1:], strict=True):
            features = block(bridge(features))
        logits: Tensor = self.head(features)
        return logits
