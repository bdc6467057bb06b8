"""The whole curve of the mode bounded: bits, accuracy and what attacks got, in one table."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from datamix.errors import ConfigError
from edge.results import Row

Attacked = Mapping[str, Any]

# Attack, metric, mode of the benchmark, copies of each group; and what the column is called.
_FIGURES: tuple[tuple[tuple[str, str, str, int], str], ...] = (
    (("span", "reid_top1", "bounded", 1), "span"),
    (("matched-filter", "reid_top1", "bounded", 1), "matched filter"),
    (("repeats", "reid_top1", "bounded", 16), "16 copies"),
    (("gradient-ica", "ssim", "bounded", 1), "ICA, SSIM"),
    (("noisy-decoder", "ssim", "bounded-known", 1), "A known, SSIM"),
)
_HEAD = ("data", "network", "sigma", "bits", "accuracy", "edge only", *(f[1] for f in _FIGURES))
_INTRO = """\
## The mode bounded: the whole curve

*Bits* bound what the cloud learns of one input, all rounds together; a repeated input costs them
again. *Edge only* is what the device reaches without a cloud at the same budget: where it is as
accurate, sending anything buys nothing. Attacks: share of members named in a gallery of 200 (floor
in brackets), of `16 copies` after as many times the bits, and SSIM of recovered pictures; empty
where nobody tried ([attacks.md](attacks.md)). A network without an accuracy was not trained for
noise: only what leaks is of interest there.
"""


def read_attacks(path: Path) -> list[Attacked]:
    """Rows of ``benchmarks.attacks``; none if the file isn't there.

    Raises:
        ConfigError: a file that holds something else.
    """
    try:
        rows: list[Attacked] = json.loads(path.read_text())["rows"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no rows of attacks: {type(error).__name__}") from None
    return rows


def section(rows: Iterable[Row], attacks: Sequence[Attacked], links: Sequence[str]) -> str:
    """The section of the page; empty where no network was trained for the mode."""
    trained: dict[tuple[str, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row.bits_per_input is not None:
            trained[row.dataset, row.label, row.noise_sigma].append(row)
    if not trained:
        return ""
    found = _by_network(attacks)
    data = {dataset for dataset, _, _ in trained}
    lines = []
    for key in sorted({*trained, *(key for key in found if key[0] in data)}):
        dataset, label, sigma = key
        some, figures = trained.get(key, []), found.get(key, {})
        edge = [row.accuracy_edge_only for row in some if row.accuracy_edge_only is not None]
        bits = some[0].bits_per_input if some else _bits(figures)
        lines.append(
            (
                dataset,
                label,
                f"{sigma:g}",
                f"{bits:,.4g}",
                _percent([row.accuracy for row in some]),
                _percent(edge),
                *(_figure(figures.get(which)) for which, _ in _FIGURES),
            )
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (_HEAD, *lines))
    head, _, body = table.partition("\n")
    pictures = "".join(f"\n![bounded]({link})\n" for link in links)
    return f"{_INTRO}\n{head}\n{'|---' * len(_HEAD)}|\n{body}\n{pictures}"


def _by_network(
    attacks: Sequence[Attacked],
) -> dict[tuple[str, str, float], dict[tuple[str, str, str, int], Attacked]]:
    """Figures of each data set, network and sigma; the network as its arm is called."""
    wanted = {which for which, _ in _FIGURES}
    found: dict[Any, dict[Any, Attacked]] = defaultdict(dict)
    for row in attacks:
        which = row["attack"], row["metric"], row["mode"], row.get("repeats", 1)
        if which in wanted:
            label = str(row["bundle"]).removeprefix(f"{row['dataset']}-")
            found[row["dataset"], label, float(row["sigma"])][which] = row
    return found


def _bits(figures: Mapping[tuple[str, str, str, int], Attacked]) -> float:
    """Of one copy."""
    (*_, copies), row = next(iter(figures.items()))
    bits: float = row["bound_bits"] / copies
    return bits


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * fmean(shares):.2f}" if shares else ""


def _figure(row: Attacked | None) -> str:
    return f"{row['value']:.2f} ({row['floor']:.2f})" if row is not None else ""
