"""The paper's claims, one by one, with verdicts that rules compute from the rows.

DataMix (Liu et al., ECCV 2020) claims in its abstract: negligible loss of accuracy, under 20% of
the FLOPs on the device, small communication overhead, vision and speech, high utilisation of the
cloud's hardware, and coefficients that the cloud cannot invert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from edge.results import Row

Verdict = Literal["holds", "holds only for", "does not hold", "not testable here"]

NEGLIGIBLE = 0.01
"""Largest mean drop of accuracy that counts as negligible."""
EDGE_SHARE = 0.20
"""Largest share of FLOPs on the device."""
SMALL_OVERHEAD = 10.0
"""Largest number of bytes on the wire for each byte of a raw input."""

# Whose networks a claim is about.
PAPERS, OURS = "the paper's scheme (`datamix`)", "linear blocks (`linear`)"
_METHODS: Mapping[str, str] = {PAPERS: "datamix", OURS: "linear"}
# Bytes of one input as the sensor gives it: uint8 pixels, int16 samples.
_RAW_BYTES: Mapping[str, int] = {
    "fashion-mnist": 784,
    "cifar10": 3072,
    "cifar100": 3072,
    "speech-commands": 32_000,
    "celeba": 12_288,
    "imagenet": 150_528,
}
_SPEECH = {"speech-commands"}


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, judged.

    Attributes:
        claim: the paper's, in our words.
        about: whose networks; empty where it makes no difference.
        rule: what makes it hold.
        verdict: one of four.
        where: what it holds for, with the verdict ``holds only for``; else empty.
        evidence: the figures, or where they are.
    """

    claim: str
    about: str
    rule: str
    verdict: Verdict
    where: str
    evidence: str


def judge(rows: Sequence[Row]) -> list[Claim]:
    """All claims, in the paper's order."""
    return [
        *(_accuracy(rows, about) for about in _METHODS),
        *(_edge_share(rows, about) for about in _METHODS),
        *(_overhead(rows, about) for about in _METHODS),
        *(_modalities(rows, about) for about in _METHODS),
        Claim(
            "the cloud's hardware is well used",
            "",
            "figures of the serving benchmarks",
            "not testable here",
            "",
            "no row of training tells it; docs/benchmarks.md shows batching and saturation",
        ),
        Claim(
            "the cloud cannot invert the mixing",
            "",
            "no published attack recovers inputs from the mixtures of one group",
            "does not hold",
            "",
            "source separation recovers them: docs/privacy.md",
        ),
    ]


def verdict(cases: Mapping[str, bool]) -> tuple[Verdict, str]:
    """From what holds in each case to a verdict, and the cases that it is restricted to."""
    if not cases:
        return "not testable here", ""
    held = [case for case, holds in cases.items() if holds]
    if len(held) == len(cases):
        return "holds", ""
    if not held:
        return "does not hold", ""
    return "holds only for", ", ".join(held)


def drops(rows: Iterable[Row], method: str) -> dict[tuple[str, int], float]:
    """Mean drop of accuracy against ``unmixed`` by data set and K, Haar matrices, seed by seed.

    Where several arms have the method, the best one's counts: a claim is that something can be had.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.method == method and row.law == "haar" and row.accuracy_unmixed is not None:
            arms = found[row.dataset, row.group_size]
            arms[row.label].append(row.accuracy_unmixed - row.accuracy)
    return {key: min(map(fmean, arms.values())) for key, arms in sorted(found.items())}


def _accuracy(rows: Sequence[Row], about: str) -> Claim:
    found = drops(rows, _METHODS[about])
    cases = {f"{data} at K = {k}": drop <= NEGLIGIBLE for (data, k), drop in found.items()}
    evidence = ", ".join(f"{data} K = {k}: {100 * d:+.2f}" for (data, k), d in found.items())
    return Claim(
        "negligible loss of accuracy",
        about,
        f"mean drop of the best arm against `unmixed` at most {100 * NEGLIGIBLE:.0f} point",
        *verdict(cases),
        f"drop in points: {evidence}" if found else "no rows",
    )


def _edge_share(rows: Sequence[Row], about: str) -> Claim:
    found = _largest(rows, about, lambda row: row.edge_flops_share_collapsed)
    cases = {f"{data} at K = {k}": share < EDGE_SHARE for (data, k), share in found.items()}
    evidence = ", ".join(f"{data} K = {k}: {share:.1%}" for (data, k), share in found.items())
    return Claim(
        "under 20% of the FLOPs stay on the device",
        about,
        f"share against collapsed blocks, mixing included, below {EDGE_SHARE:.0%}",
        *verdict(cases),
        evidence or "no rows",
    )


def _overhead(rows: Sequence[Row], about: str) -> Claim:
    known = [row for row in rows if row.dataset in _RAW_BYTES]
    found = _largest(known, about, lambda row: row.bytes_per_inference / _RAW_BYTES[row.dataset])
    by_data = {data: ratio for (data, _), ratio in found.items()}
    evidence = ", ".join(f"{data}: {ratio:.1f}" for data, ratio in by_data.items())
    return Claim(
        "small communication overhead",
        about,
        f"at most {SMALL_OVERHEAD:.0f} bytes of float16 features on the wire, both ways, for each"
        " byte of a raw input",
        *verdict({data: ratio <= SMALL_OVERHEAD for data, ratio in by_data.items()}),
        f"bytes for each byte: {evidence}; int8 halves it" if by_data else "no rows",
    )


def _modalities(rows: Sequence[Row], about: str) -> Claim:
    found = drops(rows, _METHODS[about])
    cases: dict[str, bool] = {}
    for (data, _), drop in found.items():
        kind = "speech" if data in _SPEECH else "vision"
        cases[kind] = cases.get(kind, False) or drop <= NEGLIGIBLE
    claim, rule = "works on vision and on speech", "the first claim holds at some K for each"
    if len(cases) < 2:
        missing = "no rows" if not cases else f"rows for {next(iter(cases))} only"
        return Claim(claim, about, rule, "not testable here", "", missing)
    held = ", ".join(f"{kind}: {'yes' if holds else 'no'}" for kind, holds in cases.items())
    return Claim(claim, about, rule, *verdict(cases), held)


def _largest(
    rows: Iterable[Row], about: str, figure: Callable[[Row], float]
) -> dict[tuple[str, int], float]:
    """The largest figure by data set and K."""
    found: dict[tuple[str, int], float] = {}
    for row in rows:
        if row.method == _METHODS[about]:
            key = row.dataset, row.group_size
            found[key] = max(found.get(key, 0.0), figure(row))
    return dict(sorted(found.items()))
