"""Options of an architecture, checked one by one."""

from __future__ import annotations

from datamix.errors import ConfigError
from datamix.models.split import Architecture


class Options:
    """Hands out options with their ranges checked, and refuses what nobody took."""

    def __init__(self, architecture: Architecture) -> None:
        """Start with all options untaken."""
        self._name = architecture.name
        self._left: dict[str, int | str] = dict(architecture.options)

    def take(self, key: str, default: int, low: int, high: int) -> int:
        """The integer ``key``, from ``low`` to ``high``."""
        value = self._left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"{self._name}: {key} is {value!r}, expected an integer from {low} to {high}"
            )
        return value

    def text(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """The word ``key``, one of ``allowed``."""
        value = self._left.pop(key, default)
        if value not in allowed:
            raise ConfigError(f"{self._name}: {key} is {value!r}, expected one of {allowed}")
        return str(value)

    def numbers(self, key: str, default: str, low: int, high: int) -> tuple[int, ...]:
        """The integers ``key``, each from ``low`` to ``high``; written like ``64,128``."""
        value = self._left.pop(key, default)
        try:
            found = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not 1 <= len(found) <= 64 or not all(low <= number <= high for number in found):
            raise ConfigError(
                f"{self._name}: {key} is {value!r}, expected integers from {low} to {high}"
                " with commas between them"
            )
        return found

    def end(self) -> None:
        """Refuse an option that nobody took."""
        if self._left:
            raise ConfigError(f"{self._name}: unknown option {min(self._left)!r}")
