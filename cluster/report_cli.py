"""`datamix report` and `datamix compare`: parse and call, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, from simulate --out.")],
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write the page to this file.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write figures and series to this file.")
    ] = None,
) -> None:
    """Fold runs of the fleet into one report; exits with the worst of their codes."""
    from edge.fleet.reporting import report as run

    raise typer.Exit(run(runs, html_path, json_path))


def compare(
    a: Annotated[Path, typer.Argument(help="Folder of the run to measure against.")],
    b: Annotated[Path, typer.Argument(help="Folder of the other run.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the comparison to this file.")
    ] = None,
) -> None:
    """Say whether run B is better than A, worse, or no difference is seen, with intervals."""
    from edge.fleet.reporting import compare_runs

    compare_runs(a, b, json_path)
