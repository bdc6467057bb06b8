"""`datamix models list|load|promote|rollback|unload`: parses and calls, nothing else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="See and change the models that a cloud serves.")

_Address = Annotated[
    str,
    typer.Option(envvar="RAY_ADDRESS", help="The Ray cluster, auto or host:port."),
]
_Model = Annotated[str, typer.Argument(help="Name of the model.")]
_Version = Annotated[str, typer.Argument(help="Version of the model.")]


@app.command("list")
def list_(
    address: _Address = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Every version, whether it is current, and on how many replicas it is ready."""
    import json

    from rich.console import Console
    from rich.table import Table

    from cluster.models import connected

    with connected(address) as models:
        rows = models.list()
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table("model", "version", "", "ready on", "requests", "bundle", "problem")
    for row in rows:
        table.add_row(
            row.name,
            row.version,
            "current" if row.current else "",
            f"{row.ready} of {row.replicas}",
            str(row.requests),
            row.bundle or "",
            row.reason,
        )
    Console().print(table)


@app.command()
def load(
    bundle: Annotated[str, typer.Argument(help="Folder or URI, as the cluster's nodes see it.")],
    promote: Annotated[bool, typer.Option(help="Make it current once it is ready.")] = False,
    address: _Address = "auto",
) -> None:
    """Load a version on every replica, beside what they serve."""
    from cluster.local import absolute
    from cluster.models import connected

    with connected(address) as models:
        entry = models.load(absolute(bundle), promote=promote)
    print(f"{entry.name} {entry.version} is ready on every replica")
    if promote:
        print(f"{entry.name} {entry.version} is current")


@app.command()
def promote(model: _Model, version: _Version, address: _Address = "auto") -> None:
    """Make a version current: requests that name none get it."""
    from cluster.models import connected

    with connected(address) as models:
        models.promote(model, version)
    print(f"{model} {version} is current")


@app.command()
def rollback(model: _Model, address: _Address = "auto") -> None:
    """Make the version current that was so before."""
    from cluster.models import connected

    with connected(address) as models:
        version = models.rollback(model)
    print(f"{model} {version} is current again")


@app.command()
def unload(model: _Model, version: _Version, address: _Address = "auto") -> None:
    """Let go of a version; it answers what it has, and is found no more."""
    from cluster.models import connected

    with connected(address) as models:
        models.unload(model, version)
    print(f"{model} {version} is unloaded")
