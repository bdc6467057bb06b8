"""The attacks, one file each: a module of this package has ``ATTACK``, or a tuple ``ATTACKS``.

:func:`suite` finds them, so a new attack is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from datamix.errors import ConfigError
from edge.audit.attack import Attack


def suite(names: Sequence[str] | None = None) -> tuple[Attack, ...]:
    """The attacks of these names in that order; all, by name, for None.

    Raises:
        ConfigError: no attack of that name.
    """
    found: dict[str, Attack] = {}
    for module in sorted(entry.name for entry in pkgutil.iter_modules(__path__)):
        loaded = importlib.import_module(f"{__name__}.{module}")
        attacks = getattr(loaded, "ATTACKS", None) or (getattr(loaded, "ATTACK", None),)
        found |= {attack.name: attack for attack in attacks if attack is not None}
    if names is None:
        return tuple(found[name] for name in sorted(found))
    for name in names:
        if name not in found:
            raise ConfigError(f"attack is {name!r}, expected one of {', '.join(sorted(found))}")
    return tuple(found[name] for name in names)
