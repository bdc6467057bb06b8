"""Which architectures come into question: a grid over options of one network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from datamix.errors import ConfigError

Value = int | str
Options = tuple[tuple[str, Value], ...]

_MOST_CANDIDATES = 10_000
"""Costing one takes about 50 ms, so this many take minutes."""

# What a search varies where nothing else is asked for: where the network is cut (how much of it the
# device runs), how often it goes to the cloud, and how wide it is on either side.
_DEFAULTS: Mapping[str, Mapping[str, tuple[Value, ...]]] = {
    "bridgenet": {
        "stem_width": (16, 24, 32, 48),
        "stem_units": (1, 2),
        "neck": (0, 64),
        "rounds": (1, 2, 3),
        "widths": ("64,96,128", "96,128,192", "128,192,256"),
    },
    "convnet": {
        "stem_width": (8, 16, 24, 32),
        "n_blocks": (1, 2, 3, 4),
        "width": (64, 96, 128),
    },
    "resnet18": {"cut": (0, 1, 2, 3)},
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One architecture, hashable and cheap to send to another process.

    Attributes:
        architecture: a name that :func:`datamix.models.build` knows.
        options: its options, sorted by name.
    """

    architecture: str
    options: Options

    def __str__(self) -> str:
        """``bridgenet rounds=2 stem_width=32``."""
        return " ".join((self.architecture, *(f"{key}={value}" for key, value in self.options)))


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All combinations of the values of some options.

    Attributes:
        architecture: the network's name.
        vary: options and the values each may take.
        fixed: options that are the same for every candidate.
    """

    architecture: str
    vary: tuple[tuple[str, tuple[Value, ...]], ...]
    fixed: Options = ()

    def __post_init__(self) -> None:
        """Refuse an empty grid, a huge one, and options that are named twice."""
        names = [name for name, _ in (*self.vary, *self.fixed)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"option {twice[0]!r} is given twice, expected once")
        for name, values in self.vary:
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"values of {name!r} are {values}, expected some, each of them once"
                )
        if len(self) > _MOST_CANDIDATES:
            raise ConfigError(
                f"the grid has {len(self):,} architectures, expected at most {_MOST_CANDIDATES:,}"
            )

    def __len__(self) -> int:
        """How many combinations there are."""
        return math.prod(len(values) for _, values in self.vary)

    def __iter__(self) -> Iterator[Candidate]:
        """Every combination; the option named last changes fastest."""
        names = [name for name, _ in self.vary]
        for values in itertools.product(*(values for _, values in self.vary)):
            options = (*self.fixed, *zip(names, values, strict=True))
            yield Candidate(self.architecture, tuple(sorted(options)))

    def label(self, candidate: Candidate) -> str:
        """The options in which ``candidate`` differs from others, as the space names them."""
        options = dict(candidate.options)
        return (
            " ".join(f"{name}={options[name]}" for name, _ in self.vary) or candidate.architecture
        )


def make_space(
    architecture: str,
    vary: Sequence[str] = (),
    options: Sequence[str] = (),
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    defaults: Mapping[str, Value] | None = None,
) -> SearchSpace:
    """The space that a command line asks for.

    Args:
        architecture: the network's name.
        vary: ``stem_width=16,32``; where a value has commas of its own, ``|`` stands between
            values: ``widths=64,96|96,128``. None at all: the network's default space.
        options: ``depth=2``, the same for every candidate. An option that the default space would
            vary is taken out of it.
        input_shape: (C, H, W) of the data.
        classes: of the data.
        defaults: options that are neither varied nor given take these values.

    Raises:
        ConfigError: text that doesn't look like this, or no default for this network.
    """
    fixed = dict(map(_option, options))
    if vary:
        grid = dict(map(_alternatives, vary))
        if len(grid) < len(vary):
            raise ConfigError(f"vary is {list(vary)}, expected each option once")
    elif architecture in _DEFAULTS:
        grid = {k: v for k, v in _DEFAULTS[architecture].items() if k not in fixed}
    else:
        raise ConfigError(
            f"{architecture} has no default space, expected what to vary, such as width=32,64"
        )
    rest = {**(defaults or {}), **_of_data(architecture, input_shape, classes)}
    for key, value in rest.items():
        if key not in grid:
            fixed.setdefault(key, value)
    return SearchSpace(architecture, tuple(grid.items()), tuple(sorted(fixed.items())))


def _of_data(
    architecture: str, input_shape: tuple[int, int, int], classes: int
) -> dict[str, Value]:
    """Options that follow from the data."""
    match architecture:
        case "bridgenet":
            return {"input": ",".join(map(str, input_shape)), "classes": classes}
        case "resnet18":
            return {"image_size": input_shape[1], "classes": classes}
        case _:
            return {"classes": classes}


def _option(text: str) -> tuple[str, Value]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"option is {text!r}, expected NAME=VALUE")
    return name, _value(value)


def _alternatives(text: str) -> tuple[str, tuple[Value, ...]]:
    name, equals, values = text.partition("=")
    parts = values.split("|" if "|" in values else ",")
    if not (name and equals and all(parts)):
        raise ConfigError(
            f"vary is {text!r}, expected NAME=A,B,C, or NAME=A|B where values have commas"
        )
    return name, tuple(map(_value, parts))


def _value(text: str) -> Value:
    return int(text) if text.isdecimal() and text.isascii() else text
