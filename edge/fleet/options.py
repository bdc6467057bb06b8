"""Settings of the form ``name:key=value,...`` as the command line takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from datamix.errors import ConfigError


def numbers(what: str, text: str, wanted: Mapping[str, float | None]) -> dict[str, float]:
    """Read ``key=value,...`` into numbers.

    Args:
        what: what is read, for the sentence of an error.
        text: the settings, possibly none.
        wanted: each key and its default; None where the key must be given.

    Raises:
        ConfigError: a key that is not wanted, comes twice or is missing, or a value that is not a
            finite number.
    """
    found: dict[str, float] = {}
    form = ",".join(f"{key}=NUMBER" for key in wanted) or "nothing"
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in wanted or key in found:
            raise ConfigError(f"{what} got {item!r}, expected {form}, each once")
        found[key] = number(what, item, value)
    for key, default in wanted.items():
        if key not in found:
            if default is None:
                raise ConfigError(f"{what} is {text!r}, expected {form}")
            found[key] = default
    return found


def number(what: str, item: str, value: str) -> float:
    """Read one finite number.

    Raises:
        ConfigError: it is none.
    """
    try:
        read = float(value)
    except ValueError:
        read = math.nan
    if not math.isfinite(read):
        raise ConfigError(f"{what} got {item!r}, expected a finite number for {value!r}")
    return read


def positive(what: str, **values: float) -> None:
    """Refuse what is not a positive finite number.

    Raises:
        ConfigError: one of them is not.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{what} has {name} {value:g}, expected a positive number")


def share(what: str, value: float) -> None:
    """Refuse what is not a share above 0 and up to 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{what} has share {value:g}, expected above 0 and at most 1")
