"""Load as MLPerf's LoadGen defines it, where the next query waits for the answer to the last.

single-stream   one inference at a time: the 90th percentile of its latency
multi-stream    N inferences at once, the next N when all are answered: the 99th percentile
offline         many at once, as deep as asked for: inferences per second

All of them are closed loops and say so. The fourth scenario, ``server``, is an open loop: it is the
search of :mod:`edge.fleet.capacity`. Percentiles come with LoadGen's early-stopping estimate: the
value below which the true percentile lies with 99%, so that a short run pays for being short.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.fleet.bounds import discarded, quantile_bound, trials_needed
from edge.fleet.closed import ClosedRun, closed_loop
from edge.fleet.config import FleetConfig
from edge.fleet.report import CPU_BOUND

ERROR = 0.01  # LoadGen's: 99% confidence
_PATIENCE = 10.0  # a run ends after so many times its duration, whatever it still lacks
_STRETCHES, _T = 20, 2.093  # Student's t at 97.5% with 19 degrees of freedom

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One closed loop and what it is for.

    Attributes:
        name: as LoadGen calls it.
        lanes: queries under way at once.
        per_query: inferences per query.
        quantile: of the latency, which is the scenario's figure; None for throughput.
    """

    name: str
    lanes: int
    per_query: int
    quantile: float | None

    def __post_init__(self) -> None:
        """Refuse what asks nothing."""
        if self.lanes < 1 or self.per_query < 1:
            raise ConfigError(
                f"{self.name} has {self.lanes} lanes of {self.per_query}, expected 1 or more each"
            )

    @property
    def queries_needed(self) -> int:
        """The fewest queries that the scenario's figure can be made of."""
        return 1 if self.quantile is None else trials_needed(self.quantile, ERROR)


def single_stream() -> Scenario:
    """One device that waits for each answer."""
    return Scenario("single-stream", 1, 1, 0.9)


def multi_stream(per_query: int = 8) -> Scenario:
    """One query of several inferences at a time."""
    return Scenario("multi-stream", 1, per_query, 0.99)


def offline(depth: int = 256) -> Scenario:
    """As many inferences under way at once as ``depth``."""
    return Scenario("offline", depth, 1, None)


@dataclass(frozen=True, slots=True)
class ClosedReport:
    """What a closed loop says. Latencies are of queries, from the moment they left.

    Attributes:
        scenario: which.
        loop: always ``closed``: nothing was asked while the cloud was slow.
        valid: whether the figures are the cloud's.
        invalid_reason: one sentence where they are not.
        interrupted: Ctrl-C ended the run.
        model: the model's name.
        rows: rows per inference and round.
        lanes: queries under way at once.
        per_query: inferences per query.
        warmup_s: queries that began before are not counted.
        duration_s: after that, until the last answer.
        queries: counted, and answered right.
        failed: inferences without a right answer, warm-up included, by what became of them.
        quantile: of the latency, where that is the scenario's figure.
        latency_s: observed percentiles; None where that would be a guess.
        bound_s: what the true quantile exceeds with 1% at most; None from too few queries.
        left_out: how many of the slowest queries are above it.
        queries_needed: for a bound.
        inferences_per_s: answered right.
        inferences_per_s_low: the true rate is lower with 2.5%; None from too short a run.
        inferences_per_s_high: or higher.
        rows_per_s: rows of these.
        generator_cpu_ratio: share of a core that the devices used.
        privacy: what the mode is worth, in one sentence.
    """

    scenario: str
    loop: str
    valid: bool
    invalid_reason: str | None
    interrupted: bool
    model: str
    rows: int
    lanes: int
    per_query: int
    warmup_s: float
    duration_s: float
    queries: int
    failed: dict[str, int]
    quantile: float | None
    latency_s: dict[str, float | None]
    bound_s: float | None
    left_out: int | None
    queries_needed: int
    inferences_per_s: float
    inferences_per_s_low: float | None
    inferences_per_s_high: float | None
    rows_per_s: float
    generator_cpu_ratio: float
    privacy: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def exit_code(self) -> int:
        """0: valid, and all answered right; 1: the cloud failed some; 3: not valid."""
        return 3 if not self.valid else 1 if self.failed else 0


def run_scenario(
    scenario: Scenario,
    config: FleetConfig,
    duration_s: float,
    on_query: Callable[[ClosedRun], None] = lambda run: None,
) -> ClosedReport:
    """Drive a closed loop for ``duration_s`` and longer where its figure needs more queries.

    Raises:
        ConfigError: the settings don't fit the cloud, the bundle or this machine.
        Unavailable: nobody answers.
    """
    if not 0 < duration_s < math.inf:
        raise ConfigError(f"duration is {duration_s} s, expected a positive time")
    warmup_s = min(1.0, duration_s / 10)
    needed = scenario.queries_needed

    def enough(queries: int, elapsed_s: float) -> bool:
        over_s = elapsed_s - warmup_s
        # Half as many again: the warm-up's are among them.
        full = queries >= 1.5 * needed + 10
        return over_s >= duration_s and (full or over_s >= _PATIENCE * duration_s)

    run = closed_loop(
        config,
        lanes=scenario.lanes,
        per_query=scenario.per_query,
        enough=enough,
        on_query=on_query,
    )
    return report(scenario, run, warmup_s)


def report(scenario: Scenario, run: ClosedRun, warmup_s: float) -> ClosedReport:
    """Fold a closed loop's record into its figures."""
    counted = [query for query in run.queries if query.begun_s >= warmup_s and not query.failed]
    latency_s = np.sort(np.array([query.latency_s for query in counted]))
    ends_s = np.array([query.done_s for query in run.queries if not query.failed])
    over_s = max(0.0, run.elapsed_s - warmup_s)
    rate, low, high = throughput(ends_s, warmup_s, run.elapsed_s, run.per_query)
    quantile = scenario.quantile
    reason = None
    if not counted:
        reason = "no query was answered right after the warm-up, so there is nothing to report"
    elif run.cpu_ratio > CPU_BOUND and quantile is None:
        reason = (
            f"the generator used {run.cpu_ratio:.0%} of a core: it was the limit, not the cloud"
        )
    elif quantile is not None and len(counted) < scenario.queries_needed:
        reason = (
            f"{len(counted)} queries were answered right, expected {scenario.queries_needed}: the "
            f"figure would be a guess"
        )
    return ClosedReport(
        scenario=scenario.name,
        loop="closed",
        valid=reason is None,
        invalid_reason=reason,
        interrupted=run.interrupted,
        model=run.model,
        rows=run.rows,
        lanes=run.lanes,
        per_query=run.per_query,
        warmup_s=warmup_s,
        duration_s=over_s,
        queries=len(counted),
        failed=dict(run.failed),
        quantile=quantile,
        latency_s={f"p{round(q * 100)}": observed(latency_s, q) for q in (0.5, 0.9, 0.99)}
        | {"max": float(latency_s[-1]) if len(latency_s) else None},
        bound_s=None if quantile is None else quantile_bound(latency_s, quantile, ERROR),
        left_out=None if quantile is None else discarded(len(latency_s), quantile, ERROR),
        queries_needed=scenario.queries_needed,
        inferences_per_s=rate,
        inferences_per_s_low=low,
        inferences_per_s_high=high,
        rows_per_s=rate * run.rows,
        generator_cpu_ratio=run.cpu_ratio,
        privacy=run.privacy,
    )


def observed(ordered: Floats, quantile: float) -> float | None:
    """The observed quantile of rising values; None where nothing was seen beyond it."""
    count = len(ordered)
    if count * (1 - quantile) < 1 - 1e-9:
        return None
    return float(ordered[math.ceil(quantile * count) - 1])


def throughput(
    ends_s: Floats, start_s: float, end_s: float, per_query: int
) -> tuple[float, float | None, float | None]:
    """Inferences per second between two moments, and where the true rate lies with 95%.

    By batch means: the time is cut into 20 parts, and their scatter says how sure the mean is.
    """
    length_s = end_s - start_s
    kept = ends_s[(ends_s >= start_s) & (ends_s <= end_s)]
    if length_s <= 0 or not len(kept):
        return 0.0, None, None
    rate = len(kept) * per_query / length_s
    if len(kept) < 5 * _STRETCHES:
        return rate, None, None
    counts, _ = np.histogram(kept, bins=_STRETCHES, range=(start_s, end_s))
    error = _T * float(counts.std(ddof=1)) / math.sqrt(_STRETCHES)
    error *= per_query * _STRETCHES / length_s
    return rate, max(0.0, rate - error), rate + error
