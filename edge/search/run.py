"""The race: cost every candidate, train those a device can afford, keep the best, again."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from datamix.errors import ConfigError, DataMixError
from edge.search import pareto
from edge.search.budget import Costs, DeviceBudget
from edge.search.children import Tick
from edge.search.halving import Halving, Rung, promote
from edge.search.journal import Journal
from edge.search.space import Candidate
from edge.search.trial import Measured, Outcome, Trial

Report = Callable[[str], None]
CostOf = Callable[[Candidate], Costs]
RunTrials = Callable[[Sequence[Trial], Tick], Generator[Outcome, None, None]]


@dataclass(frozen=True, slots=True)
class Costed:
    """A candidate that keeps the budget."""

    candidate: Candidate
    costs: Costs


@dataclass(frozen=True, slots=True)
class Refused:
    """A candidate that was never trained, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate with the result of its longest training.

    Attributes:
        candidate: what was trained.
        costs: per input.
        measured: on inputs that were held out from the training data.
        seconds: CPU seconds of that training.
        rung: the last one it was in, from 1.
    """

    candidate: Candidate
    costs: Costs
    measured: Measured
    seconds: float
    rung: int

    @property
    def point(self) -> pareto.Point:
        """What the front is drawn over: minus the accuracy, edge FLOPs, bytes, round trips."""
        costs = self.costs
        return (
            -self.measured.accuracy,
            costs.edge_flops,
            costs.bytes_per_inference,
            costs.round_trips,
        )

    @property
    def standard_error(self) -> float:
        """Of the accuracy, by the number of inputs alone; another seed adds to it."""
        share = self.measured.accuracy
        return math.sqrt(share * (1 - share) / self.measured.n)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        entries: every candidate that was trained, finalists first, then the most accurate.
        front: those finalists that no finalist beats in all of accuracy, edge FLOPs, bytes and
            round trips. Finalists only: accuracies compare where trainings were equally long.
        chosen: the most accurate finalist.
        refused: over the budget, or not to be built.
        failed: trainings that ended in an error.
        left_out: candidates within the budget that the draw left out.
    """

    entries: tuple[Entry, ...]
    front: tuple[Entry, ...]
    chosen: Entry
    refused: tuple[Refused, ...]
    failed: tuple[Outcome, ...]
    left_out: int


def afford(
    candidates: Iterable[Candidate], budget: DeviceBudget, cost_of: CostOf
) -> tuple[list[Costed], list[Refused]]:
    """Cost every candidate and part those within the budget from the others, before training."""
    within, refused = [], []
    for candidate in candidates:
        try:
            costs = cost_of(candidate)
        except ConfigError as error:
            refused.append(Refused(candidate, str(error)))
            continue
        reason = budget.excess(costs)
        if reason is None:
            within.append(Costed(candidate, costs))
        else:
            refused.append(Refused(candidate, reason))
    return within, refused


def draw(within: Sequence[Costed], most: int | None, seed: int) -> list[Costed]:
    """At most ``most`` of them, drawn without bias, in their order; None: all."""
    if most is None or len(within) <= most:
        return list(within)
    chosen = sorted(random.Random(seed).sample(range(len(within)), most))
    return [within[place] for place in chosen]


@dataclass
class Race:
    """Successive halving over candidates that are within the budget.

    Attributes:
        halving: the plan.
        seed: of every training.
        run: runs trials and yields their outcomes as they finish.
        journal: keeps finished trials; those it has are not run again.
        label: a candidate's name in progress lines.
        report: gets the progress lines.
        jobs: trials that ``run`` runs at a time; for the time that is left.
        clock: seconds; for the same.
    """

    halving: Halving
    seed: int
    run: RunTrials
    journal: Journal
    label: Callable[[Candidate], str] = str
    report: Report = print
    jobs: int = 1
    clock: Callable[[], float] = time.monotonic
    failed: list[Outcome] = field(default_factory=list)
    _pace: Pace = field(default_factory=lambda: Pace())

    def result(
        self, racing: Sequence[Costed], refused: Sequence[Refused], left_out: int = 0
    ) -> SearchResult:
        """Run all rungs.

        Raises:
            ConfigError: nobody is racing.
            DataMixError: in some rung, every training failed.
        """
        if not racing:
            raise ConfigError(
                f"none of {len(refused)} architectures can be used; the last one:"
                f" {refused[-1].reason}"
                if refused
                else "the space is empty, expected candidates"
            )
        plan = self.halving.plan(len(racing))
        entries: dict[Candidate, Entry] = {}
        left = list(racing)
        for number in range(1, len(plan) + 1):
            finishers = self._rung(number, plan, left)
            entries.update((entry.candidate, entry) for entry in finishers)
            if number < len(plan):
                keep = min(plan[number].trainings, len(finishers))
                chosen = promote([entry.point for entry in finishers], keep)
                left = [Costed(finishers[i].candidate, finishers[i].costs) for i in chosen]
        return _result(list(entries.values()), finishers, refused, self.failed, left_out)

    def _rung(self, number: int, plan: Sequence[Rung], left: Sequence[Costed]) -> list[Entry]:
        rung = plan[number - 1]
        later_s = sum(other.total_s for other in plan[number:])
        trials = [Trial(one.candidate, rung.seconds, self.seed) for one in left]
        done = {trial: self.journal.done[trial] for trial in trials if trial in self.journal.done}
        todo = [trial for trial in trials if trial not in done]
        for outcome in done.values():
            self._pace.add(outcome)

        def tell() -> None:
            ours = max(done.values(), key=_accuracy, default=None)
            best = (
                f"best {_accuracy(ours):.2%} {self.label(ours.trial.candidate)}, " if ours else ""
            )
            missing = len(trials) - len(done) - failures
            left_s = self._pace.wall_s(missing * rung.seconds + later_s, self.jobs)
            left_s = max(0.0, left_s - (self.clock() - since_s))
            self.report(
                f"rung {number}/{len(plan)}, {rung.seconds:g} CPU s each:"
                f" {len(done)} of {len(trials)} trained, {best}about {_clock(left_s)} left"
            )

        failures, since_s = 0, self.clock()
        if done:
            tell()
        with contextlib.closing(self.run(todo, tell)) as outcomes:
            for outcome in outcomes:
                self.journal.add(outcome)
                self._pace.add(outcome)
                since_s = self.clock()
                if outcome.measured is None:
                    failures += 1
                    self.failed.append(outcome)
                    self.report(f"failed: {self.label(outcome.trial.candidate)}: {outcome.problem}")
                else:
                    done[outcome.trial] = outcome
                tell()
        if not done:
            raise DataMixError(
                f"all {len(trials)} trainings of rung {number} failed; the last one:"
                f" {self.failed[-1].problem}"
            )
        return [
            Entry(one.candidate, one.costs, _measured(done[trial]), rung.seconds, number)
            for one, trial in zip(left, trials, strict=True)
            if trial in done
        ]


@dataclass
class Pace:
    """How much longer trials take than the CPU seconds they train for.

    Attributes:
        trained_s: CPU seconds of training that finished trials were given.
        took_s: seconds these trials took.
    """

    trained_s: float = 0.0
    took_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a finished trial."""
        if outcome.measured is not None:
            self.trained_s += outcome.trial.seconds
            self.took_s += outcome.wall_s

    def wall_s(self, cpu_s: float, jobs: int) -> float:
        """Seconds that ``cpu_s`` of training will take, ``jobs`` trials at a time."""
        return cpu_s / jobs * (self.took_s / self.trained_s if self.trained_s else 1.0)


def _result(
    entries: Sequence[Entry],
    finalists: Sequence[Entry],
    refused: Sequence[Refused],
    failed: Sequence[Outcome],
    left_out: int,
) -> SearchResult:
    best_first = sorted(finalists, key=lambda entry: entry.point)
    on_front = set(pareto.front([entry.point for entry in best_first]))
    return SearchResult(
        entries=tuple(sorted(entries, key=lambda entry: (-entry.rung, entry.point))),
        front=tuple(entry for place, entry in enumerate(best_first) if place in on_front),
        chosen=best_first[0],
        refused=tuple(refused),
        failed=tuple(failed),
        left_out=left_out,
    )


def _measured(outcome: Outcome) -> Measured:
    if outcome.measured is None:
        raise ValueError(f"{outcome.trial.candidate} has no result")
    return outcome.measured


def _accuracy(outcome: Outcome) -> float:
    return _measured(outcome).accuracy


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
