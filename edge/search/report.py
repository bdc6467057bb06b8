"""The outcome of a search as text, as JSON, and as the command that trains what was chosen."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge.search.budget import Costs
from edge.search.run import Costed, Entry, Refused, SearchResult
from edge.search.space import Candidate, Options

_MOST_REFUSED = 10  # lines in the terminal; the JSON has them all

Label = Callable[[Candidate], str]


def show(result: SearchResult, label: Label, console: Console) -> None:
    """Print the finalists, and how many others there were."""
    table = Table(
        "",
        "options",
        *_right("accuracy", "edge FLOPs", "share", "collapsed", "bytes", "trips", "weights"),
        title=f"finalists, each trained for {result.chosen.seconds:g} CPU s",
        title_justify="left",
    )
    finalists = [entry for entry in result.entries if entry.rung == result.chosen.rung]
    for entry in finalists:
        accuracy = f"{entry.measured.accuracy:.2%} ± {entry.standard_error:.2%}"
        table.add_row(
            _mark(entry, result), label(entry.candidate), accuracy, *_cost_cells(entry.costs)
        )
    console.print(table)
    console.print(
        f"★ chosen; ● on the Pareto front of accuracy, edge FLOPs, bytes and round trips. Accuracy"
        f" on {result.chosen.measured.n} inputs held out from the training data, with its standard"
        " error; share: of FLOPs on the edge, layer by layer, and with linear blocks collapsed.",
        style="dim",
    )
    dropped = len(result.entries) - len(finalists)
    console.print(
        f"{dropped} dropped after shorter trainings, {len(result.refused)} refused untrained,"
        f" {len(result.failed)} failed, {result.left_out} left out by the draw"
    )


def show_costs(
    within: Sequence[Costed], refused: Sequence[Refused], label: Label, console: Console
) -> None:
    """Print what every candidate costs, nothing trained."""
    table = Table(
        "options", *_right("edge FLOPs", "share", "collapsed", "bytes", "trips", "weights")
    )
    for one in within:
        table.add_row(label(one.candidate), *_cost_cells(one.costs))
    console.print(table)
    show_refused(refused, label, console)


def show_refused(refused: Sequence[Refused], label: Label, console: Console) -> None:
    """Print the first of those refused, with the reason."""
    for one in refused[:_MOST_REFUSED]:
        console.print(f"refused: {label(one.candidate)}: {one.reason}", style="dim", markup=False)
    if len(refused) > _MOST_REFUSED:
        console.print(f"refused: {len(refused) - _MOST_REFUSED} more", style="dim")


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
    candidate: Candidate, *, dataset: str, directory: str | None, group_size: int, output: str
) -> str:
    """The command that trains ``candidate`` on the whole training split, for a shell."""
    words = ["datamix", "train", "--output", output, "--dataset", dataset]
    if directory is not None:
        words += ["--data", directory]
    words += ["--group-size", str(group_size), "--architecture", candidate.architecture]
    for name, value in candidate.options:
        words += ["--option", f"{name}={value}"]
    return shlex.join(words)


def _right(*titles: str) -> list[Any]:
    from rich.table import Column

    return [Column(title, justify="right") for title in titles]


def _mark(entry: Entry, result: SearchResult) -> str:
    if entry == result.chosen:
        return "★"
    return "●" if entry in result.front else ""


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
