"""A network as a chain of units, and the one way to split it from options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import nn

from datamix.models.options import Options
from datamix.models.sequential import assemble, norm_relu
from datamix.models.split import Shape, SplitModel
from datamix.models.variants import linear_copy, prelu_copy

_SMALL = 96
"""Up to this size an image goes in at full resolution, as is usual for CIFAR."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A network: entry, stages of units, pooling, head.

    Attributes:
        entry: the first layers, which are always the device's.
        stages: units (n, C, H, W) -> (n, C', H', W'), in the groups of the paper that published
            them. A network is cut between units.
        pool: what follows the last unit; the cloud's if its part isn't made over. An average
            commutes with de-mixing, and makes the answer smaller.
        head: the last layers, which are always the device's.
        input_shape: (C, H, W).
        classes: outputs.
        stages_on_device: where the chain is cut by default.
    """

    entry: list[nn.Module]
    stages: list[list[nn.Module]]
    pool: list[nn.Module]
    head: list[nn.Module]
    input_shape: tuple[int, int, int]
    classes: int
    stages_on_device: int = 1


def split_chain(chain: Chain, options: Options, cut_by: str = "unit") -> SplitModel:
    """Split a chain as the options say.

    ``cut``: how many units the device runs after the entry, or stages if ``cut_by`` says so;
    ``rounds``: into how many blocks of about as many units the rest is divided; ``cloud``:
    ``relu`` as published, ``linear``, or ``prelu`` with PReLUs and norms without an offset.

    Raises:
        ConfigError: an option out of range.
    """
    units = [(stage, unit) for stage, inner in enumerate(chain.stages) for unit in inner]
    # How many units there are before each place where the chain can be cut.
    places = list(range(len(units)))
    if options.text("cut_by", cut_by, ("unit", "stage")) == "stage":
        places = [sum(map(len, chain.stages[:count])) for count in range(len(chain.stages))]
    default = places.index(sum(map(len, chain.stages[: chain.stages_on_device])))
    start = places[options.take("cut", default, 0, len(places) - 1)]
    left = len(units) - start
    rounds = options.take("rounds", 1, 1, left)
    cloud = options.text("cloud", "relu", ("relu", "linear", "prelu"))
    bounds = [start + left * index // rounds for index in range(rounds + 1)]
    blocks = [_staged(units[first:last]) for first, last in pairwise(bounds)]
    head = chain.head
    if cloud == "relu":
        blocks[-1] += chain.pool
    else:
        # The device has a ReLU to do before.
        head = [*chain.pool, *head]
    return assemble(
        [*chain.entry, *_staged(units[:start])],
        blocks,
        [[] for _ in blocks[1:]],
        head,
        input_shape=chain.input_shape,
        classes=chain.classes,
        make_over={"relu": None, "linear": linear_copy, "prelu": _prelu}[cloud],
        bridge=None if cloud == "relu" else norm_relu,
    )


def _staged(units: Sequence[tuple[int, nn.Module]]) -> list[nn.Module]:
    """One ``nn.Sequential`` for the units of each stage."""
    stages = groupby(units, key=lambda pair: pair[0])
    return [nn.Sequential(*(unit for _, unit in inner)) for _, inner in stages]


def _prelu(part: nn.Module, shape: Shape, _: str) -> nn.Module:
    return prelu_copy(part, shape)


# ------------------------------------------------------------------ options that networks share


@dataclass(frozen=True, slots=True)
class Picture:
    """Square pictures in, classes out, and how wide the network is.

    Attributes:
        channels: of a picture.
        size: height and width.
        classes: outputs.
        width: per cent of the published numbers of channels.
    """

    channels: int
    size: int
    classes: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size

    @property
    def small(self) -> bool:
        """Whether the first layers keep the resolution, as is usual for CIFAR."""
        return self.size <= _SMALL

    def wide(self, channels: int) -> int:
        """A published number of channels at this width."""
        return wide(channels, self.width)


def take_picture(options: Options, smallest: int = 16) -> Picture:
    """The options ``channels``, ``image_size``, ``classes`` and ``width``."""
    return Picture(
        channels=options.take("channels", 3, 1, 16),
        size=options.take("image_size", 32, smallest, 512),
        classes=options.take("classes", 10, 2, 10_000),
        width=options.take("width", 100, 1, 400),
    )


def wide(channels: int, percent: int) -> int:
    """So many per cent of ``channels``, a multiple of 4, at least 4; all of them at 100."""
    return channels if percent == 100 else max(4, 4 * round(channels * percent / 400))
