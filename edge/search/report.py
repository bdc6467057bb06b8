"""The outcome of a search as text, as JSON, and as the command that trains what was chosen."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge.search.budget import Costs
from edge.search.run import Costed, Entry, Refused, SearchResult
from edge.search.space import Candidate, Options

_COST_TITLES = ("edge FLOPs", "share", "collapsed", "bytes", "trips", "weights")
_MOST_REFUSED = 10  # lines in the terminal; the JSON has them all


Label = Callable[[Candidate], str]


def table(result: SearchResult, label: Label) -> str:
    """Plain lines for a terminal: the finalists, and how many others there were."""
    chosen = result.chosen
    finalists = [entry for entry in result.entries if entry.rung == chosen.rung]
    rows = [
        (
            _mark(entry, result),
            label(entry.candidate),
            f"{entry.measured.accuracy:.2%} ± {entry.standard_error:.2%}",
            *_cost_cells(entry.costs),
        )
        for entry in finalists
    ]
    return "\n".join(
        (
            _aligned(("", "options", "accuracy", *_COST_TITLES), rows, left=2),
            "",
            f"Each was trained for {chosen.seconds:g} CPU s. Accuracy: on {chosen.measured.n:,}"
            " inputs held out from the training data, with its standard error.",
            "Share: of FLOPs on the edge, layer by layer; collapsed: with linear blocks at their"
            " cheapest. Front: beaten by no finalist in all of",
            "accuracy, edge FLOPs, bytes and round trips.",
            f"{len(result.entries) - len(finalists)} dropped after shorter trainings,"
            f" {len(result.refused)} refused untrained, {len(result.failed)} failed,"
            f" {result.left_out} left out by the draw.",
        )
    )


def cost_table(within: Sequence[Costed], label: Label) -> str:
    """Plain lines for a terminal: what every candidate costs, nothing trained."""
    rows = [(label(one.candidate), *_cost_cells(one.costs)) for one in within]
    return _aligned(("options", *_COST_TITLES), rows, left=1)


def refused_lines(refused: Sequence[Refused], label: Label) -> list[str]:
    """The first of those refused, with the reason, and how many more there are."""
    lines = [f"refused: {label(one.candidate)}: {one.reason}" for one in refused[:_MOST_REFUSED]]
    if len(refused) > _MOST_REFUSED:
        lines.append(f"refused: {len(refused) - _MOST_REFUSED} more")
    return lines


def to_json(result: SearchResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for ``json.dumps``: ``about`` first, then what was found."""
    return {
        **about,
        "chosen": _entry(result.chosen, result),
        "front": [_entry(entry, result) for entry in result.front],
        "trained": [_entry(entry, result) for entry in result.entries],
        "refused": [
            {**_architecture(one.candidate), "reason": one.reason} for one in result.refused
        ],
        "failed": [
            {**_architecture(one.trial.candidate), "problem": one.problem} for one in result.failed
        ],
        "left_out": result.left_out,
    }


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write beside ``path`` and rename, so that there is never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def train_command(
    candidate: Candidate,
    *,
    dataset: str,
    directory: str | None,
    preset: str | None,
    method: str,
    group_size: int,
    output: str,
) -> str:
    """The command that trains ``candidate`` on the whole training split, for a shell."""
    words = ["datamix", "train", "--output", output, "--dataset", dataset]
    if directory is not None:
        words += ["--data", directory]
    if preset is not None:
        words += ["--preset", preset]
    words += ["--method", method, "--group-size", str(group_size)]
    words += ["--architecture", candidate.architecture]
    for name, value in candidate.options:
        words += ["--option", f"{name}={value}"]
    return shlex.join(words)


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns under their titles, the first ``left`` of them to the left, the others right."""
    lines = [titles, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _mark(entry: Entry, result: SearchResult) -> str:
    if entry == result.chosen:
        return "chosen"
    return "front" if entry in result.front else ""


def _cost_cells(costs: Costs) -> list[str]:
    return [
        f"{costs.edge_flops / 1e6:.2f} M",
        f"{costs.edge_flops_share:.1%}",
        f"{costs.edge_flops_share_collapsed:.1%}",
        f"{costs.bytes_per_inference:,}",
        str(costs.round_trips),
        f"{costs.parameters_device_bytes / 1e3:.0f} kB",
    ]


def _entry(entry: Entry, result: SearchResult) -> dict[str, Any]:
    return {
        **_architecture(entry.candidate),
        "accuracy": entry.measured.accuracy,
        "accuracy_standard_error": entry.standard_error,
        "held_out_inputs": entry.measured.n,
        "training_cpu_seconds": entry.seconds,
        "rung": entry.rung,
        "on_front": entry in result.front,
        **asdict(entry.costs),
        "edge_flops_share": entry.costs.edge_flops_share,
        "edge_flops_share_collapsed": entry.costs.edge_flops_share_collapsed,
    }


def _architecture(candidate: Candidate) -> dict[str, Any]:
    options: Options = candidate.options
    return {"architecture": candidate.architecture, "options": dict(options)}
