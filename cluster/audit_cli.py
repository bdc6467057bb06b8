"""`datamix audit`: parses and calls, nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from edge.audit.report import Report

_STYLES = {"leaks": "bold red", "failed": "bold red", "bounded": "yellow"}


def audit(
    bundle: Annotated[str, typer.Option(help="Folder or URI of the bundle.")],
    mode: Annotated[
        Literal["mix", "bounded", "split"] | None,
        typer.Option(help="What leaves the device; else the bundle's own, or the capture's."),
    ] = None,
    capture: Annotated[
        Path | None,
        typer.Option(help="Audit this recording; scored where FILE.truth.npz is beside it."),
    ] = None,
    groups: Annotated[int, typer.Option(help="Inferences to record.")] = 100,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs mixed together; else the bundle's.")
    ] = None,
    attacks: Annotated[
        str | None, typer.Option(help="Names with commas between; else the whole suite.")
    ] = None,
    budget_s: Annotated[float, typer.Option(help="Seconds for all attacks together.")] = 600.0,
    dataset: Annotated[
        str, typer.Option(help="Victims and public data: a name, or the shipped sample.")
    ] = "sample",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set; else $DATAMIX_DATA.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random but the protection.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="Record at this cloud, operator A; else in this process.")
    ] = None,
    second_url: Annotated[
        str | None, typer.Option(help="Operator B, in the mode split; else in this process.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token of these clouds.")
    ] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM file of the authorities to trust; else this machine's.")
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write rows as they come; the same command goes on from it."),
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write the page to this file.")
    ] = None,
) -> None:
    """Attack what really crosses the wire, and set each figure beside what guessing reaches."""
    from datamix.tokens import read_token
    from edge.access import Access
    from edge.audit.command import AuditConfig, run, summary
    from edge.audit.record import Ends

    token = None if token_file is None else read_token(token_file)
    access = Access(token, None if ca_file is None else str(ca_file))
    outcome = run(
        AuditConfig(
            bundle=bundle,
            mode=mode,
            capture=capture,
            groups=groups,
            group_size=group_size,
            attacks=None if attacks is None else tuple(attacks.split(",")),
            budget_s=budget_s,
            dataset=dataset,
            directory=data,
            seed=seed,
            ends=Ends(url, second_url, access),
            json_path=json_path,
            html_path=html_path,
        ),
        partial(print, flush=True),
    )
    print(summary(outcome.report))
    show(outcome.report)
    raise typer.Exit(130 if outcome.interrupted else int(outcome.failed))


def show(report: Report) -> None:
    """The rows as a table on this terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edge.audit.page import figure

    table = Table()
    for name in ("attack", "operator", "metric", "figure", "floor", "seconds", "verdict"):
        table.add_column(name, no_wrap=name in ("attack", "metric"))
    for row in report.rows:
        style = _STYLES.get(row.verdict.split(" ")[0], "")
        table.add_row(
            escape(row.attack),
            row.operator,
            row.metric,
            figure(row.value, row.low, row.high),
            figure(row.floor, row.floor_low, row.floor_high),
            f"{row.seconds:.1f}",
            escape(row.verdict),
            style=style,
        )
    Console().print(table)
