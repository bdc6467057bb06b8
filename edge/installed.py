"""Which optional packages are there; the extras of pyproject.toml bring them."""

from __future__ import annotations

from importlib.util import find_spec

from datamix.errors import ConfigError


def installed(module: str) -> bool:
    """Whether ``module`` could be imported; it isn't."""
    return find_spec(module) is not None


def require(module: str, extra: str) -> None:
    """Refuse to go on without ``module``, which ``extra`` brings.

    Raises:
        ConfigError: it is not installed.
    """
    if not installed(module):
        raise ConfigError(
            f"{module} is not installed, expected it: install datamix-cluster[{extra}]"
        )
