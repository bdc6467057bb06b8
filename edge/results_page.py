"""The page of results: tables from the rows, the paper's claims, plots."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from datamix.errors import ConfigError
from edge.claims import judge
from edge.results import Row, read_rows
from edge.results_bounded import read_attacks, section
from edge.results_plots import draw_curves, draw_plots

_INTRO = """\
# Results

Made by `datamix results` from `{rows}`: do not edit. Data sets: {datasets}. Seeds: {seeds}.
Rows: {count}.

Accuracies are of the test split, as deployed: features are mixed with fresh matrices and rounded to
float16 on the wire, both ways. Mean over the seeds, with the lowest and the highest in brackets.
*Drop* is against the network `unmixed` of the same preset, seed and budget, in points, seed by
seed; *drop, same weights* is what mixing and rounding cost on one checkpoint. *Device* is the
device's share of FLOPs with mixing, layer by layer / against collapsed blocks. *Bytes* are float16
feature values, both ways, without framing. [How each method is trained](training.md). Mixing is
[no protection](privacy.md).
"""


def write_page(rows_path: Path, page: Path, plots: Path, attacks: Path | None = None) -> None:
    """Write the page, and its plots into the folder ``plots``.

    Args:
        rows_path: the rows.
        page: to write.
        plots: folder for pictures.
        attacks: what ``benchmarks.attacks`` wrote, for the mode bounded.

    Raises:
        ConfigError: there are no rows.
    """
    rows = read_rows(rows_path)
    if not rows:
        raise ConfigError(f"{rows_path} has no rows, expected some")
    plots.mkdir(parents=True, exist_ok=True)
    pictures = draw_plots(rows, plots)
    links = {
        data: [Path(os.path.relpath(picture, page.parent)).as_posix() for picture in found]
        for data, found in pictures.items()
    }
    name = Path(os.path.relpath(rows_path, page.parent)).as_posix()
    curves = [
        Path(os.path.relpath(picture, page.parent)).as_posix()
        for picture in draw_curves(rows, plots)
    ]
    attacked = read_attacks(attacks) if attacks is not None else []
    page.write_text(render(rows, name, links, section(rows, attacked, curves)))


def render(
    rows: Sequence[Row], rows_name: str, pictures: dict[str, list[str]], bounded: str = ""
) -> str:
    """The page as Markdown; ``pictures`` are links by data set, ``bounded`` its own section."""
    datasets = sorted({row.dataset for row in rows})
    intro = _INTRO.format(
        rows=rows_name,
        count=len(rows),
        datasets=", ".join(datasets),
        seeds=", ".join(map(str, sorted({row.seed for row in rows}))),
    )
    parts = [intro, "## The paper's claims, one by one\n", _claims(rows)]
    for data in datasets:
        some = [row for row in rows if row.dataset == data]
        parts += [f"## {data}\n", _table(some), _networks(some)]
        parts += [f"![{data}]({link})\n" for link in pictures.get(data, [])]
    parts += [bounded] if bounded else []
    parts += ["## Every row\n", _every_row(rows)]
    return "\n".join(parts)


def _claims(rows: Sequence[Row]) -> str:
    lines = []
    for claim in judge(rows):
        verdict = f"**{claim.verdict}**" + (f" {claim.where}" if claim.where else "")
        lines.append((claim.claim, claim.about, verdict, claim.rule, claim.evidence))
    return _markdown(("claim", "of", "verdict", "rule", "figures"), lines)


def _table(rows: Sequence[Row]) -> str:
    """One line per arm, K and law, over the seeds."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        place = (row.budget, _rank(row), row.label, row.group_size, row.law, row.noise_sigma)
        groups[place].append(row)
    lines = []
    for key in sorted(groups, key=lambda k: tuple(map(_sortable, k))):
        some = groups[key]
        first = some[0]
        mixed = first.method not in ("unmixed", "edge-only")
        law = first.law + (f", noise {first.noise_sigma:g}" if first.noise_sigma else "")
        shares = f"{first.edge_flops_share:.1%} / {first.edge_flops_share_collapsed:.1%}"
        lines.append(
            (
                first.label,
                str(first.group_size) if mixed else "",
                law if mixed else "",
                str(len(some)),
                _spread([row.accuracy for row in some]),
                _points([(row.accuracy_unmixed, row.accuracy) for row in some]),
                _points([(row.accuracy_same_weights, row.accuracy) for row in some]),
                _points([(row.accuracy_float32, row.accuracy_int8) for row in some]),
                shares,
                f"{first.bytes_per_inference:,}",
                str(first.round_trips),
                first.budget,
                f"{fmean(row.cpu_seconds for row in some):.0f}",
            )
        )
    head = (
        "arm", "K", "law", "seeds", "accuracy", "drop", "drop, same weights", "drop by int8",
        "device", "bytes", "round trips", "budget", "CPU s",
    )  # fmt: skip
    return _markdown(head, lines)


_ORDER = ("unmixed", "edge-only", "linear", "bounded", "nonlinear", "datamix")


def _rank(row: Row) -> int:
    return _ORDER.index(row.method) if row.method in _ORDER else len(_ORDER)


def _sortable(value: object) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def _networks(rows: Sequence[Row]) -> str:
    """What each arm's network is."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(row.label, row)
    lines = [
        (
            label,
            row.architecture,
            " ".join(f"{key}={value}" for key, value in sorted(row.options.items())),
            f"{row.parameters:,}",
            f"{row.edge_flops / 1e6:.2f} M",
            f"{row.cloud_flops / 1e6:.2f} M",
        )
        for label, row in sorted(seen.items())
    ]
    head = ("arm", "network", "options", "parameters", "FLOPs, device", "FLOPs, cloud")
    return _markdown(head, lines)


def _every_row(rows: Sequence[Row]) -> str:
    lines = [
        (
            row.dataset,
            row.label,
            str(row.group_size),
            row.law,
            str(row.seed),
            f"{row.accuracy:.2%}",
            f"{row.seconds:.0f}",
            row.machine,
            row.commit,
            f"`{row.command}`",
        )
        for row in sorted(
            rows,
            key=lambda row: (row.dataset, _rank(row), row.label, row.group_size, row.law, row.seed),
        )  # fmt: skip
    ]
    head = (
        "data", "arm", "K", "law", "seed", "accuracy", "seconds", "machine", "commit", "command"
    )  # fmt: skip
    return _markdown(head, lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * fmean(values):.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ({100 * min(values):.2f} to {100 * max(values):.2f})"


def _points(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Mean of first minus second, in points; empty where one is missing."""
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return f"{100 * fmean(known):+.2f}" if len(known) == len(pairs) else ""


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [f"| {' | '.join(cells)} |" for cells in lines]
    rule = "|" + "---|" * len(head)
    return "\n".join([f"| {' | '.join(head)} |", rule, *body]) + "\n"
