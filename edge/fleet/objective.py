"""A service level objective, ``p99=100ms``: that share of all inferences, answered right in time.

An inference that is refused, wrong or never sent counts as late: a cloud does not meet its
objective by turning devices away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from datamix.errors import ConfigError

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6}

_OBJECTIVE = re.compile(r"p(?P<digits>[0-9]{2,5})(?:\.(?P<more>[0-9]{1,4}))?\s*=\s*(?P<time>.+)")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is promised.

    Attributes:
        quantile: the share of inferences that is in time, between 0 and 1.
        latency_s: in time means answered right so soon after the scheduled send.
    """

    quantile: float
    latency_s: float

    def __post_init__(self) -> None:
        """Refuse what nobody can promise."""
        if not 0.5 <= self.quantile <= 0.9999:
            raise ConfigError(f"quantile is {self.quantile}, expected 0.5 to 0.9999")
        if not 0 < self.latency_s < float("inf"):
            raise ConfigError(f"latency is {self.latency_s} s, expected a positive time")

    @property
    def allowed(self) -> float:
        """The share of inferences that may be late."""
        return 1.0 - self.quantile

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"p{self.quantile * 100:.6g}={self.latency_s * 1e3:.6g}ms"


def parse_objective(text: str) -> Objective:
    """Read ``p99=100ms``; ``p999`` and ``p99.9`` are the same.

    Raises:
        ConfigError: it is none.
    """
    match = _OBJECTIVE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"the objective is {text!r}, expected one such as p99=100ms")
    digits, more = match["digits"], match["more"] or ""
    if more and len(digits) > 2:
        raise ConfigError(f"the objective is {text!r}, expected one percentile such as p99.9")
    quantile = int(digits + more) / 10 ** len(digits + more)
    return Objective(quantile, parse_seconds(match["time"]))


def parse_seconds(text: str) -> float:
    """Read a time with its unit: ``100ms``, ``0.1s``, ``250us``.

    Raises:
        ConfigError: it has no unit, or is no number.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(s|ms|us)\s*", text, re.ASCII)
    if match is None:
        raise ConfigError(f"the time is {text!r}, expected a number with s, ms or us, as 100ms")
    return float(match[1]) * UNITS_S[match[2]]
