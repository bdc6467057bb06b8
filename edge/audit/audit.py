"""Runs a suite of attacks on a capture within a budget: rows, each beside its floor.

The budget is shared out evenly among what is left to run, so what one attack does not use the
others get. Each attack runs on its own; one that breaks down has a row that says so, and the
audit has failed: a broken attack must not pass for a good defence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datamix.errors import ConfigError
from edge.audit.attack import Attack, Budget, Claim
from edge.audit.capture import Capture
from edge.audit.material import Material
from edge.audit.observation import Observation, Operator, Public, picture_range
from edge.audit.report import FAILED, NOT_SCORED, Report, Row, exhibit, read_report, write_report
from edge.audit.scoring import Score, Scorer, verdict
from edge.audit.truth import Truth
from edge.promises import Promise, promise

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to audit.

    Attributes:
        attacks: what to run.
        budget_s: for all attacks together, in seconds of wall-clock time.
        seed: of everything random.
        json_path: where rows are kept as they come, and taken up again.
        tell: takes lines of progress.
        clock: monotonic seconds.
    """

    attacks: Sequence[Attack]
    budget_s: float = 600.0
    seed: int = 0
    json_path: Path | None = None
    tell: Tell = print
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        """Check the budget.

        Raises:
            ConfigError: it is not positive and finite.
        """
        if not 0 < self.budget_s < math.inf:
            raise ConfigError(f"budget is {self.budget_s} s, expected more than 0, finite")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        report: with the rows of all that finished.
        interrupted: whether somebody pressed Ctrl-C.
    """

    report: Report
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether an attack broke down."""
        return any(row.verdict == FAILED for row in self.report.rows)


def audit(
    capture: Capture,
    public: Public,
    material: Material,
    truth: Truth | None,
    plan: Plan,
) -> Outcome:
    """Run ``plan`` on a capture.

    Args:
        capture: of all operators.
        public: what everybody knows; its manifest has the capture's K.
        material: that ``public`` was made of.
        truth: for scoring; None where nobody knows it: then claims are made and not scored.
        plan: see :class:`Plan`.

    Raises:
        ConfigError: capture, bundle and truth do not belong together, or the JSON file is of
            another audit.
    """
    promised = _check(capture, public, material, truth)
    manifest = public.manifest
    report = Report(
        bundle=f"{manifest.name} {manifest.version}",
        mode=capture.header.mode,
        promise=promised.text,
        known_break=promised.known_break,
        dataset=material.name,
        groups=len(truth.victims) if truth is not None else 0,
        k=manifest.group_size,
        seed=plan.seed,
        budget_s=plan.budget_s,
        capture_sha256=capture.digest(),
        scored=truth is not None,
        preprocessing=manifest.preprocessing.model_dump(mode="json"),
    )
    if plan.json_path is not None and plan.json_path.exists():
        before = read_report(plan.json_path)
        if not report.same_audit(before):
            raise ConfigError(
                f"{plan.json_path.name} is of another audit, expected a new file or this capture's"
            )
        kept = tuple(row for row in before.rows if row.verdict != FAILED)
        report = replace(report, rows=kept, exhibits=before.exhibits)
    scorer = None if truth is None else Scorer(public, truth.victims, plan.seed)
    todo = [
        (attack, operator)
        for attack in plan.attacks
        if report.mode in attack.modes
        for operator in capture.operators()
        if operator in attack.operators and (attack.name, operator) not in report.done()
    ]
    deadline_s = plan.clock() + plan.budget_s
    for index, (attack, operator) in enumerate(todo):
        left_s = max(0.0, deadline_s - plan.clock())
        share_s = left_s / (len(todo) - index)
        plan.tell(
            f"[{index + 1}/{len(todo)}] {attack.name} on operator {operator}:"
            f" {share_s:.0f} s for it, at most {left_s:.0f} s to go"
        )
        view = Observation(report.mode, operator, capture.of(operator), public)
        try:
            report = _run(report, attack, view, scorer, share_s, promised, plan)
        except KeyboardInterrupt:
            plan.tell(f"stopped; {index} of {len(todo)} attacks are done")
            return Outcome(report, interrupted=True)
        if plan.json_path is not None:
            write_report(plan.json_path, report)
    if plan.json_path is not None:
        write_report(plan.json_path, report)
    return Outcome(report)


def _check(capture: Capture, public: Public, material: Material, truth: Truth | None) -> Promise:
    manifest, header = public.manifest, capture.header
    if (header.model, header.model_version) != (manifest.name, manifest.version):
        raise ConfigError(
            f"capture is of {header.model} {header.model_version},"
            f" expected {manifest.name} {manifest.version}"
        )
    if header.group_size != manifest.group_size:
        raise ConfigError(
            f"capture has groups of {header.group_size}, expected {manifest.group_size}"
        )
    if truth is not None and truth.gallery_sha256 != material.digest():
        raise ConfigError("the truth is of another gallery, expected this data set and seed")
    return promise(manifest, header.mode)


def _run(
    report: Report,
    attack: Attack,
    view: Observation,
    scorer: Scorer | None,
    share_s: float,
    promised: Promise,
    plan: Plan,
) -> Report:
    """The report with one attack's rows, and its pictures where it has some."""
    begin_s = plan.clock()
    budget = Budget(
        share_s, plan.seed, lambda line: plan.tell(f"  {attack.name}: {line}"), plan.clock
    )
    claim: Claim | None = None
    try:
        claim = attack.run(view, budget)
        scores = [] if scorer is None else scorer.score(claim)
        failure = ""
    except Exception as error:  # whatever an attack does wrong, the others go on
        scores, failure = [], f"{type(error).__name__}: {error}"[:500]
        plan.tell(f"  {attack.name} broke down: {failure}")
    seconds = plan.clock() - begin_s
    bits = _bits(promised, view.operator)
    label = FAILED if failure else NOT_SCORED
    rows = tuple(_rows(report, attack.name, view.operator, scores, seconds, bits, label))
    note = failure or (claim.notes[:2000] if claim is not None else "")
    rows = tuple(replace(row, notes=note) for row in rows)
    for row in rows:
        if row.value is not None:
            plan.tell(f"  {row.metric} {row.value:.3f}, floor {row.floor:.3f}: {row.verdict}")
    shown = report.exhibits
    if scorer is not None and scores and claim is not None and claim.inputs is not None:
        picture = exhibit(
            attack.name,
            view.operator,
            scorer.originals(0),
            scorer.matched(claim.inputs[0], 0),
            scorer.guess(len(claim.inputs)),
            picture_range(view.public.manifest.preprocessing),
        )
        shown = (*shown, picture)
    return replace(report, rows=(*report.rows, *rows), exhibits=shown)


def _bits(promised: Promise, operator: Operator) -> float:
    """What bounds this operator; operator B of the mode split gets nothing that depends on data."""
    return 0.0 if operator == "B" else promised.bits_per_input


def _rows(
    report: Report,
    attack: str,
    operator: Operator,
    scores: Sequence[Score],
    seconds: float,
    bits: float,
    label: str,
) -> Iterator[Row]:
    bound = bits if math.isfinite(bits) else None
    same = (attack, report.mode, operator, report.dataset)
    if not scores:
        nothing = (None,) * 6
        yield Row(*same, "", *nothing, "", label, report.k, 0, seconds, bound)
    for score in scores:
        yield Row(
            *same,
            score.metric,
            *score.found,
            *score.floor,
            score.floor_is,
            verdict(score.found, score.floor, bits),
            report.k,
            score.n,
            seconds,
            bound,
        )
