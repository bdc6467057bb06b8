"""What was sent, what came back, and what was wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.fuzzing.mutants import Mutant
from benchmarks.fuzzing.oracle import Expected, judge
from datamix import wire
from datamix.errors import DataMixError

_MOST_FINDINGS = 50  # then the run ends: the replica is broken, or the oracle


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not have happened, and the bytes that made it happen."""

    kind: str
    what: str
    sent: bytes = b""


@dataclass(slots=True)
class Tally:
    """What was sent and what came of it.

    Attributes:
        limit_s: how long to wait for an answer before it counts as a hang.
        sent: mutants by kind.
        statuses: answers by kind and status.
        findings: what was wrong.
    """

    limit_s: float
    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def found(self, kind: str, what: str, sent: bytes = b"") -> None:
        """Note a finding."""
        self.findings.append(Finding(kind, what, sent))

    @property
    def hopeless(self) -> bool:
        """Whether there is no sense in going on."""
        return len(self.findings) >= _MOST_FINDINGS


@dataclass(frozen=True, slots=True)
class Waiting:
    """A mutant whose answer has not come."""

    mutant: Mutant
    expected: Expected


def settle(tally: Tally, waiting: list[Waiting], answer: bytes) -> None:
    """Find the mutant that ``answer`` is for, take it out of ``waiting``, note what is wrong."""
    try:
        response = wire.decode_response(answer)
    except DataMixError as error:
        tally.found("answer", f"is no message: {error}", answer)
        return
    wrongs = [(judge(one.expected, response), one) for one in waiting]
    # Several may fit: take one that fits no other answer.
    fits = [one for wrong, one in wrongs if not wrong]
    if fits:
        one = min(fits, key=lambda fit: len(fit.expected.statuses))
    else:
        same = [(w, one) for w, one in wrongs if one.expected.request_id == response.request_id]
        wrong, one = (same or wrongs)[0]
        tally.found(one.mutant.kind, wrong, one.mutant.body)
    waiting.remove(one)
    tally.statuses[one.mutant.kind, response.status] += 1
