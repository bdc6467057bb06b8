"""Gates on a run's figures, ``p99<100ms``: for pipelines that shall stop when a cloud got slower.

A gate that cannot be judged, for lack of samples, is not passed: silence would be taken for health.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datamix.errors import ConfigError
from edge.fleet.objective import parse_seconds
from edge.fleet.report import Summary

EXIT_CODE = 4

_GATE = re.compile(r"\s*([a-z0-9-]+)\s*(<=|>=|<|>)\s*(.+?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _latency(name: str) -> Callable[[Summary], float | None]:
    return lambda summary: summary.latency_s[name]


def _lag(name: str) -> Callable[[Summary], float | None]:
    return lambda summary: summary.generator_lag_s[name]


def error_rate(summary: Summary) -> float | None:
    """Share of inferences without a right answer; what was stopped or cancelled does not count."""
    ended = summary.inferences - summary.stopped - summary.cancelled
    return (ended - summary.ok) / ended if ended else None


# What can be gated: how its bound is written, and where it stands in the summary.
METRICS: dict[str, tuple[str, Callable[[Summary], float | None]]] = {
    **{name: ("time", _latency(name)) for name in ("p50", "p90", "p99", "p999", "max")},
    "lag": ("time", _lag("p99")),
    "queue": ("time", lambda summary: summary.queue_s),
    "compute": ("time", lambda summary: summary.compute_s),
    "error-rate": ("share", error_rate),
    "accuracy": ("share", lambda summary: summary.accuracy_cloud),
    "busy": ("share", lambda summary: summary.engine_busy_ratio),
    "goodput": ("number", lambda summary: summary.goodput_inferences_per_s),
    "throughput": ("number", lambda summary: summary.throughput),
    "wrong": ("number", lambda summary: float(summary.wrong)),
    "retries": ("number", lambda summary: float(summary.retries)),
    "batch-rows": ("number", lambda summary: summary.batch_rows_mean),
}

_EXAMPLES = {"time": "100ms", "share": "1% or 0.01", "number": "200"}


@dataclass(frozen=True, slots=True)
class Threshold:
    """One gate.

    Attributes:
        metric: a key of ``METRICS``.
        comparison: ``<``, ``<=``, ``>`` or ``>=``.
        bound: in seconds, as a share, or a number, as the metric is.
        text: as it was written.
    """

    metric: str
    comparison: str
    bound: float
    text: str

    def judge(self, summary: Summary) -> Outcome:
        """Compare with what a run saw."""
        value = METRICS[self.metric][1](summary)
        passed = value is not None and _COMPARE[self.comparison](value, self.bound)
        return Outcome(self, value, passed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A gate and a run.

    Attributes:
        threshold: the gate.
        value: the run's figure; None where there are too few samples for one.
        passed: whether the figure is there and within the bound.
    """

    threshold: Threshold
    value: float | None
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"threshold": self.threshold.text, "value": self.value, "passed": self.passed}

    def __str__(self) -> str:
        """One line, as a person reads it."""
        kind = METRICS[self.threshold.metric][0]
        if self.value is None:
            return f"NOT JUDGED  {self.threshold.text}: the run has too few samples for a figure"
        shown = {
            "time": f"{self.value * 1e3:.4g} ms",
            "share": f"{self.value:.4g}",
            "number": f"{self.value:.6g}",
        }[kind]
        return f"{'passed' if self.passed else 'FAILED'}  {self.threshold.text}: it was {shown}"


def parse_threshold(text: str) -> Threshold:
    """Read ``p99<100ms``, ``error-rate<=1%``, ``goodput>200``.

    Raises:
        ConfigError: no such metric, or a bound that is not of its kind.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise ConfigError(f"the threshold is {text!r}, expected one such as p99<100ms")
    metric, comparison, bound = match.groups()
    if metric not in METRICS:
        raise ConfigError(
            f"the threshold {text!r} is on {metric!r}, expected one of {', '.join(METRICS)}"
        )
    kind = METRICS[metric][0]
    try:
        return Threshold(metric, comparison, _bound(kind, bound), text.strip())
    except ConfigError:
        raise ConfigError(
            f"the threshold {text!r} has the bound {bound!r}, expected as {_EXAMPLES[kind]}"
        ) from None


def _bound(kind: str, text: str) -> float:
    if kind == "time":
        return parse_seconds(text)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(%?)", text, re.ASCII)
    if match is None or (match[2] and kind != "share"):
        raise ConfigError(text)
    value = float(match[1]) / (100 if match[2] else 1)
    if kind == "share" and value > 1:
        raise ConfigError(text)
    return value


def exit_code(summary: Summary, outcomes: Sequence[Outcome]) -> int:
    """What a gated run ends with.

    3: the run is not valid, so nothing can be said. 4: a gate was not passed, or not judged. 1: the
    cloud failed some, where no gate says how many it may. Else 0.
    """
    if not summary.valid:
        return summary.exit_code
    if not all(outcome.passed for outcome in outcomes):
        return EXIT_CODE
    if any(outcome.threshold.metric == "error-rate" for outcome in outcomes):
        strays = summary.duplicates + summary.misrouted + summary.unmatched + summary.unreadable
        return 1 if summary.wrong or strays or not summary.ok else 0
    return summary.exit_code
