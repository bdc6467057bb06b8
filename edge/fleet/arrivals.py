"""When inferences fall due: pure functions of a rate, a duration and a seed.

    poisson                     independent arrivals at an even rate
    constant                    evenly spaced
    gamma:shape=0.25            bursts: gaps from a gamma distribution, more uneven below shape 1
    ramp:to=400                 Poisson, from the rate at the start to another at the end
    steps:10=200,15=50          Poisson, another rate from each of these seconds on
    diurnal:depth=0.8           Poisson, a wave around the rate that begins at its trough
    trace:FILE                  the send times of a CSV or Parquet file, as they stand there
    closed:think_s=1            a CLOSED loop: a device asks again once it has its answer

All but the last are an open loop: what the cloud does changes nothing about when it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datamix.errors import ConfigError
from edge.fleet import trace
from edge.fleet.chance import Purpose, exponential, uniform
from edge.fleet.options import number, numbers, positive

Floats = NDArray[np.float64]

MOST = 50_000_000
"""Inferences in one run at most: their table alone is 5 GB."""

# Each draw has a generator of its own, so that changing one never shifts another.
_TIMES = 0
_SHAPES = (1e-3, 1e3)
_BLOCK = 4096  # gaps drawn at once


class Arrivals(Protocol):
    """One law of arrivals that does not depend on answers."""

    def times(self, rate: float, duration_s: float, seed: int) -> Floats:
        """Draw the send times of the whole fleet: (n,) float64 in [0, duration_s), never falling.

        rate: arrivals per second, of the whole fleet.

        Raises:
            ConfigError: a rate or a duration with which this law has no times.
        """
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals. Given their number they are uniform: no gap is drawn one by one."""

    def times(self, rate: float, duration_s: float, seed: int) -> Floats:
        """See :class:`Arrivals`."""
        _check(rate, duration_s)
        return _spread(rate * duration_s, seed) * duration_s


@dataclass(frozen=True, slots=True)
class Constant:
    """0, 1/rate, 2/rate ... below the duration; no seed is used."""

    def times(self, rate: float, duration_s: float, seed: int = 0) -> Floats:
        """See :class:`Arrivals`."""
        _check(rate, duration_s)
        _bound(rate * duration_s)
        # One more than can fit, then cut: rate * duration may fall a rounding error short.
        times = np.arange(int(rate * duration_s) + 1) / rate
        return times[times < duration_s]


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps from a gamma distribution with mean 1/rate: bursts where ``shape`` is below 1.

    The gaps' deviation is 1/sqrt(shape) of their mean: 2 for 0.25, 1 (Poisson) for 1. The run
    begins somewhere in a gap, as one that watches a process which has always gone on, so that the
    expected number of arrivals is rate * duration for every shape.
    """

    shape: float

    def __post_init__(self) -> None:
        """Refuse shapes whose gaps are all rounding."""
        low, high = _SHAPES
        if not low <= self.shape <= high:
            raise ConfigError(f"gamma has shape {self.shape:g}, expected {low:g} to {high:g}")

    def times(self, rate: float, duration_s: float, seed: int) -> Floats:
        """See :class:`Arrivals`."""
        _check(rate, duration_s)
        _bound(rate * duration_s)
        generator = np.random.default_rng([seed, _TIMES])
        scale = 1 / (rate * self.shape)
        # What is left of a gap that the start falls into: such a gap is drawn by its length.
        last_s = generator.random() * generator.gamma(self.shape + 1, scale)
        parts, count = [np.array([last_s])], 1
        while last_s < duration_s:
            parts.append(last_s + np.cumsum(generator.gamma(self.shape, scale, _BLOCK)))
            last_s, count = float(parts[-1][-1]), count + _BLOCK
            _bound(count)
        times = np.concatenate(parts)
        return times[times < duration_s]


@dataclass(frozen=True, slots=True)
class Ramp:
    """A Poisson process whose rate goes in a straight line from the run's to ``to``."""

    to: float

    def __post_init__(self) -> None:
        """Refuse a rate below 0."""
        if self.to < 0:
            raise ConfigError(f"ramp has to={self.to:g}, expected 0 or more per second")

    def times(self, rate: float, duration_s: float, seed: int) -> Floats:
        """See :class:`Arrivals`; by the inverse of the cumulative rate."""
        _check(rate, duration_s)
        mass = (rate + self.to) / 2 * duration_s
        slope = (self.to - rate) / duration_s
        passed = _spread(mass, seed) * mass
        # passed = rate t + slope t^2 / 2, solved without a difference of near numbers.
        times = 2 * passed / (rate + np.sqrt(np.maximum(0, rate**2 + 2 * slope * passed)))
        return np.minimum(times, np.nextafter(duration_s, 0))


@dataclass(frozen=True, slots=True)
class Steps:
    """A Poisson process whose rate jumps.

    Attributes:
        changes: (second, rate from then on), by second; the run's rate holds before the first.
    """

    changes: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Refuse seconds that do not rise, and rates below 0."""
        seconds = [second for second, _ in self.changes]
        if not seconds or seconds[0] < 0 or sorted(set(seconds)) != seconds:
            raise ConfigError(f"steps are at {seconds} s, expected rising seconds, from 0 on")
        if min(rate for _, rate in self.changes) < 0:
            raise ConfigError("steps have a rate below 0, expected 0 or more per second")

    def times(self, rate: float, duration_s: float, seed: int) -> Floats:
        """See :class:`Arrivals`; by the inverse of the cumulative rate."""
        _check(rate, duration_s)
        if self.changes[-1][0] >= duration_s:
            raise ConfigError(
                f"steps has one at {self.changes[-1][0]:g} s, expected all before the end, "
                f"{duration_s:g} s"
            )
        edges = np.array([0.0, *(second for second, _ in self.changes), duration_s])
        rates = np.array([rate, *(rate for _, rate in self.changes)])
        passed = np.concatenate([[0.0], np.cumsum(rates * np.diff(edges))])
        if passed[-1] == 0:
            raise ConfigError("steps have rate 0 all along, expected one that is not")
        mass = float(passed[-1])
        times: Floats = np.interp(_spread(mass, seed) * mass, passed, edges)
        return np.minimum(times, np.nextafter(duration_s, 0))


@dataclass(frozen=True, slots=True)
class Diurnal:
    """A Poisson process with the rate ``rate * (1 - depth * cos(2 pi t / period))``.

    Attributes:
        depth: how far the rate swings, as a share of its mean, 0 to 1.
        period_s: one wave; 0 for one over the whole run.
    """

    depth: float = 0.8
    period_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a rate that would fall below 0."""
        if not 0 <= self.depth <= 1 or self.period_s < 0:
            raise ConfigError(
                f"diurnal has depth={self.depth:g}, period_s={self.period_s:g}, expected a depth "
                "of 0 to 1 and a period of 0 (the run) or more"
            )

    def times(self, rate: float, duration_s: float, seed: int) -> Floats:
        """See :class:`Arrivals`; by thinning a process that has the largest rate all along."""
        _check(rate, duration_s)
        generator = np.random.default_rng([seed, _TIMES])
        _bound(rate * (1 + self.depth) * duration_s)
        count = generator.poisson(rate * (1 + self.depth) * duration_s)
        times = np.sort(generator.random(count)) * duration_s
        turns = times / (self.period_s or duration_s)
        share = (1 - self.depth * np.cos(2 * np.pi * turns)) / (1 + self.depth)
        kept: Floats = times[generator.random(count) < share]
        return kept


@dataclass(frozen=True, slots=True)
class Trace:
    """The send times of a file; the rate is the file's, and no seed is used for the times."""

    path: str

    def times(self, rate: float, duration_s: float, seed: int = 0) -> Floats:
        """See :class:`Arrivals`; what lies behind the duration is left out."""
        return self.read(duration_s).due_s

    def read(self, duration_s: float) -> trace.Trace:
        """Read the file; times in [0, duration_s).

        Raises:
            ConfigError: no such file, not a trace, or nothing in it falls due in time.
        """
        whole = trace.read(self.path)
        count = int(np.searchsorted(whole.due_s, duration_s, side="left"))
        if not count:
            raise ConfigError(
                f"{self.path} has its first send at {whole.due_s[0]:g} s, expected one before the "
                f"duration is over, {duration_s:g} s"
            )
        return trace.Trace(
            whole.due_s[:count], None if whole.device is None else whole.device[:count]
        )


@dataclass(frozen=True, slots=True)
class Closed:
    """A closed loop: each device thinks, asks, waits for the end of that, and thinks again.

    A cloud that slows down is then asked less, which is how people behave and what hides a stall:
    such a run is labelled in every report.

    Attributes:
        think_s: mean of the exponential time between an end and the next inference.
    """

    think_s: float

    def __post_init__(self) -> None:
        """Refuse a time that is none."""
        if self.think_s < 0:
            raise ConfigError(f"closed has think_s={self.think_s:g}, expected 0 or more seconds")

    def thought_s(self, seed: int, device: int, turn: int) -> float:
        """How long a device thinks before its inference number ``turn`` (from 0)."""
        return exponential(self.think_s, uniform(seed, Purpose.THINK, device, turn))


def parse(text: str) -> Arrivals | Closed:
    """Read what ``--arrivals`` takes; see the module.

    Raises:
        ConfigError: no such law, or settings that it does not have.
    """
    name, _, settings = text.partition(":")
    match name:
        case "poisson" | "constant":
            numbers(name, settings, {})
            return Poisson() if name == "poisson" else Constant()
        case "gamma":
            return Gamma(**numbers(name, settings, {"shape": None}))
        case "ramp":
            return Ramp(**numbers(name, settings, {"to": None}))
        case "steps":
            return Steps(tuple(_step(item) for item in settings.split(",")))
        case "diurnal":
            return Diurnal(**numbers(name, settings, {"depth": 0.8, "period_s": 0.0}))
        case "trace":
            if not settings:
                raise ConfigError("trace got no file, expected trace:FILE")
            return Trace(settings)
        case "closed":
            return Closed(**numbers(name, settings, {"think_s": None}))
    raise ConfigError(
        f"arrivals are {text!r}, expected poisson, constant, gamma:shape=..., ramp:to=..., "
        "steps:SECOND=RATE,..., diurnal:depth=..., trace:FILE or closed:think_s=..."
    )


def _step(item: str) -> tuple[float, float]:
    second, _, rate = item.partition("=")
    return number("steps", item, second), number("steps", item, rate)


def _spread(mass: float, seed: int) -> Floats:
    """A Poisson number of points with mean ``mass``, uniform in [0, 1), rising."""
    _bound(mass)
    generator = np.random.default_rng([seed, _TIMES])
    times = generator.random(generator.poisson(mass))
    times.sort()
    return times


def _bound(count: float) -> None:
    if count > MOST:
        raise ConfigError(f"about {count:.3g} inferences would fall due, expected {MOST:,} at most")


def _check(rate: float, duration_s: float) -> None:
    if not (rate > 0 and np.isfinite(rate)):
        raise ConfigError(f"rate is {rate}, expected a positive number of inferences per second")
    positive("the run", duration_s=duration_s)
