"""How many devices does this cloud carry, and what limits it: probes against a running cloud.

Which rate comes next and when it is enough says :mod:`edge.fleet.search`, whether a load meets its
objective :mod:`edge.fleet.verdict`, and what is in the way :mod:`edge.fleet.limiting`. Here are the
runs, and what is written down of them: enough to go on another day.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from datamix.errors import ConfigError, Unavailable
from edge.fleet import arrivals, limiting, result
from edge.fleet.config import FleetConfig
from edge.fleet.limiting import NONE, Limit
from edge.fleet.report import Run, Summary
from edge.fleet.run import OnProgress, record
from edge.fleet.search import Estimate, Plan, Step, Tried, estimate, next_step
from edge.fleet.settled import Settled, Watch, counted
from edge.fleet.verdict import Judge, Verdict

_SPOILED = 3  # probes in a row that the generator and not the cloud has failed

_ELSEWHERE = ("device", "link")  # what takes its time whatever the load
_STEADY = (arrivals.Poisson, arrivals.Constant, arrivals.Gamma)


class Recorder(Protocol):
    """Runs a fleet, watched: :func:`edge.fleet.run.record`, or what a test has in its place."""

    def __call__(
        self, config: FleetConfig, on_progress: OnProgress | None, *, watch: Watch
    ) -> tuple[Run, Summary]:
        """Run ``config``; all that was recorded, and what it says."""
        ...


@dataclass(frozen=True, slots=True)
class Fleet:
    """The devices of every probe.

    Attributes:
        base: what they run and where, and how they come; its rate, duration, devices, seed and
            timeout are not read.
        rate_per_device: inferences per second of one of them.
        most_streams: devices that are really connected at most; each of those then stands for
            several.
        timeout_s: an inference has failed so long after it was due.
    """

    base: FleetConfig
    rate_per_device: float
    most_streams: int
    timeout_s: float

    def __post_init__(self) -> None:
        """Refuse devices that nobody can count."""
        if not 0 < self.rate_per_device < math.inf:
            raise ConfigError(f"rate per device is {self.rate_per_device}, expected more than 0")
        if self.most_streams < 1:
            raise ConfigError(f"most streams is {self.most_streams}, expected at least 1")
        if not isinstance(arrivals.parse(self.base.pacer), _STEADY):
            raise ConfigError(
                f"arrivals are {self.base.pacer!r}, expected poisson, constant or gamma: a rate "
                "that changes, or that answers have a say in, is no load to find a capacity with"
            )

    def devices(self, rate: float) -> int:
        """How many devices make that rate."""
        return max(1, math.floor(rate / self.rate_per_device + 1e-9))

    def config(self, step: Step, seed: int) -> FleetConfig:
        """What one probe simulates."""
        streams = min(max(self.devices(step.rate), self.base.processes), self.most_streams)
        return dataclasses.replace(
            self.base,
            rate=step.rate,
            duration_s=step.rules.duration_s,
            devices=streams,
            seed=seed,
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that was tried.

    Attributes:
        tried: the rate and the verdict.
        devices: that make this rate.
        streams: of those, really connected.
        valid: whether it says something of the cloud; else only of the generator.
        limit: what made inferences late.
        latency_s: percentiles, from the scheduled send.
        lag_s: 99th percentile of the generator's lag.
        engine_busy: share of time that the engine computed; None where the cloud does not say.
        batch_rows: rows of a batch, mean; None likewise.
        bytes_per_s: of messages, both ways.
        model: the model's name.
        mode: what left the devices, or ``echo``.
        privacy: what that is worth, in one sentence.
    """

    tried: Tried
    devices: int
    streams: int
    valid: bool
    limit: Limit
    latency_s: dict[str, float | None]
    lag_s: float | None
    engine_busy: float | None
    batch_rows: float | None
    bytes_per_s: float
    model: str
    mode: str
    privacy: str

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, and for :meth:`from_dict`."""
        found = dataclasses.asdict(self)
        verdict = found["tried"]["verdict"]
        verdict["share"] = None if math.isnan(verdict["share"]) else verdict["share"]
        return found

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Probe:
        """Read what :meth:`as_dict` wrote.

        Raises:
            ConfigError: it is something else.
        """
        try:
            fields = dict(found)
            tried, limit = dict(fields.pop("tried")), dict(fields.pop("limit"))
            verdict = dict(tried["verdict"])
            if verdict["share"] is None:
                verdict["share"] = math.nan
            return cls(
                tried=Tried(float(tried["rate"]), Verdict(**verdict)),
                limit=Limit(**limit),
                **fields,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"a probe cannot be read ({error!r}), expected a saved one") from None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a search found; rates in inferences per second.

    Attributes:
        objective: what the load was to meet, such as ``p99=100ms``.
        model: the model's name; empty without a probe.
        mode: what leaves the devices, or ``echo``; likewise.
        privacy: what that is worth, in one sentence; likewise.
        rate_per_device: inferences per second of one device.
        devices: how many the cloud carries; None where that is not known.
        devices_low: at least that many, with 97.5%.
        devices_high: at most so many, with 97.5%; None where nothing failed.
        rate: the largest rate that meets the objective; None likewise.
        rate_low: at least that.
        rate_high: at most that.
        passed_rate: the largest rate that passed by its own test; None if none did.
        failed_rate: the smallest that failed by its own; None likewise.
        limit: what is in the way of more.
        ended: ``found``, ``probes`` (their number is used up), ``top`` (all that was asked for
            passed), ``bottom`` (not even the least rate passed), ``elsewhere`` (nothing passed, as
            the simulated devices or links alone take too long), ``generator``, ``streams`` (more
            were not opened) or ``interrupted``.
        probes: in the order they were made.
    """

    objective: str
    model: str
    mode: str
    privacy: str
    rate_per_device: float
    devices: int | None
    devices_low: int
    devices_high: int | None
    rate: float | None
    rate_low: float
    rate_high: float | None
    passed_rate: float | None
    failed_rate: float | None
    limit: Limit
    ended: str
    probes: tuple[Probe, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "probes"
        }
        found["limit"] = dataclasses.asdict(self.limit)
        found["probes"] = [probe.as_dict() for probe in self.probes]
        return found

    @property
    def exit_code(self) -> int:
        """0: found, or all that was asked for passed; 1: none is carried; 3: not known."""
        codes = {"found": 0, "top": 0, "bottom": 1, "elsewhere": 1, "interrupted": 130}
        return codes.get(self.ended, 3)


def probe(
    fleet: Fleet,
    plan: Plan,
    step: Step,
    seed: int,
    on_progress: OnProgress | None = None,
    recorder: Recorder = record,
) -> tuple[Probe, Run]:
    """Put one rate on the cloud until it is judged, or its time is up."""
    config = fleet.config(step, seed)
    judge = Judge(plan.objective, step.rules)
    over = False

    def watch(news: Settled) -> bool:
        nonlocal over
        over = judge.add(news.due_s, news.latency_s, news.until_s)
        return over

    run, summary = recorder(config, on_progress, watch=watch)
    verdict = judge.verdict if over else None
    if verdict is None:
        verdict = _whole(run, plan, step)
    return describe(Tried(step.rate, verdict), fleet, plan, run, summary, step), run


def _whole(run: Run, plan: Plan, step: Step) -> Verdict:
    """Judge a run that came to its end: its last inferences have ended too."""
    judge = Judge(plan.objective, step.rules)
    table = counted(run.table)
    answered = table["status"] == result.OK
    latency_s = np.where(answered, table["done_s"] - table["scheduled_s"], np.inf)
    judge.add(table["scheduled_s"], latency_s, 0.0)
    return judge.look(min(run.window_s, step.rules.duration_s))


def describe(
    tried: Tried, fleet: Fleet, plan: Plan, run: Run, summary: Summary, step: Step
) -> Probe:
    """What is kept of a probe."""
    sent = float(run.table["bytes_up"].sum(dtype=np.float64))
    received = float(run.table["bytes_down"].sum(dtype=np.float64))
    return Probe(
        tried=tried,
        devices=fleet.devices(tried.rate),
        streams=run.config.devices,
        valid=summary.valid,
        limit=limiting.limit(run, summary, plan.objective, step.rules.warmup_s),
        latency_s=dict(summary.latency_s),
        lag_s=summary.generator_lag_s["p99"],
        engine_busy=summary.engine_busy_ratio,
        batch_rows=summary.batch_rows_mean,
        bytes_per_s=(sent + received) / max(run.window_s, 1e-9),
        model=run.model,
        mode=run.mode,
        privacy=summary.privacy,
    )


def measure(
    fleet: Fleet,
    plan: Plan,
    *,
    seed: int = 0,
    before: Sequence[Probe] = (),
    on_probe: Callable[[Capacity], None] = lambda capacity: None,
    on_step: Callable[[Step, Estimate | None], None] = lambda step, known: None,
    on_progress: OnProgress | None = None,
    recorder: Recorder = record,
) -> Capacity:
    """Search for the capacity; Ctrl-C gives what is known by then.

    Args:
        fleet: the devices.
        plan: the objective, and how to search.
        seed: of every probe's schedule; each has another.
        before: probes of a search that was cut short, to go on from.
        on_probe: called after each probe with what is known.
        on_step: called before each with what comes, and the belief.
        on_progress: called about once a second during a probe.
        recorder: what runs a probe.

    Raises:
        ConfigError: a setting that cannot be met.
        DataMixError: what the cloud or a bundle had to say before the first probe.
    """
    probes = list(before)
    spoiled = 0
    ended, trouble = "", None
    while not ended:
        tried = [one.tried for one in probes if _counts(one, plan)]
        step = next_step(tried, plan)
        if step is None:
            ended = _why(tried, plan)
            break
        on_step(step, estimate(tried, plan) if tried else None)
        try:
            found, run = probe(fleet, plan, step, _seed(seed, len(probes)), on_progress, recorder)
        except KeyboardInterrupt:
            ended = "interrupted"
            break
        except (ConfigError, Unavailable) as error:
            if not probes:
                raise
            # It went well before: so many streams are more than this machine or the cloud opens.
            name = "generator" if isinstance(error, ConfigError) else "connections"
            ended, trouble = "streams", Limit(name, str(error), {})
            break
        if run.interrupted:
            ended = "interrupted"
            break
        probes.append(found)
        spoiled = 0 if _counts(found, plan) else spoiled + 1
        if spoiled >= _SPOILED:
            ended = "generator"
        elif len(probes) > 1 and all(_is_elsewhere(one, plan) for one in probes):
            ended = "elsewhere"
        on_probe(conclude(probes, plan, fleet, ended or "interrupted"))
    known = conclude(probes, plan, fleet, ended)
    return known if trouble is None else dataclasses.replace(known, limit=trouble)


def _counts(one: Probe, plan: Plan) -> bool:
    """Whether a probe says something of the cloud: one that passes does, however it was made."""
    return one.limit.name != "generator" or one.tried.passes(plan.objective.allowed)


def _is_elsewhere(one: Probe, plan: Plan) -> bool:
    """Whether a probe failed by what no cloud, and no smaller load, makes shorter."""
    return one.limit.name in _ELSEWHERE and not one.tried.passes(plan.objective.allowed)


def _seed(seed: int, number: int) -> int:
    return seed * 1000 + number


def _why(tried: Sequence[Tried], plan: Plan) -> str:
    """Why a search has no next step."""
    known = estimate(tried, plan)
    if known.rate is not None:
        return "found" if known.width <= plan.tolerance else "probes"
    if math.isinf(known.high):
        return "top" if known.low >= plan.most_rate else "probes"
    return "bottom" if known.high <= plan.least_rate else "probes"


def conclude(probes: Sequence[Probe], plan: Plan, fleet: Fleet, ended: str) -> Capacity:
    """Say what the probes together mean."""
    allowed = plan.objective.allowed
    counting = [one for one in probes if _counts(one, plan)]
    tried = [one.tried for one in counting]
    known = estimate(tried, plan) if tried else Estimate(None, 0.0, math.inf)
    failed = sorted(
        (one for one in probes if not one.tried.passes(allowed)), key=lambda one: one.tried.rate
    )
    found = failed[0].limit if failed else NONE
    high = None if math.isinf(known.high) else known.high
    return Capacity(
        objective=str(plan.objective),
        model=probes[-1].model if probes else "",
        mode=probes[-1].mode if probes else "",
        privacy=probes[-1].privacy if probes else "",
        rate_per_device=fleet.rate_per_device,
        devices=None if known.rate is None else _devices(fleet, known.rate),
        devices_low=_devices(fleet, known.low),
        devices_high=None if high is None else _devices(fleet, high),
        rate=known.rate,
        rate_low=known.low,
        rate_high=high,
        passed_rate=max((t.rate for t in tried if t.verdict.answer == "pass"), default=None),
        failed_rate=min((t.rate for t in tried if t.verdict.answer == "fail"), default=None),
        limit=found,
        ended=ended,
        probes=tuple(probes),
    )


def _devices(fleet: Fleet, rate: float) -> int:
    return math.floor(rate / fleet.rate_per_device + 1e-9)
