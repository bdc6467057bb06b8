"""``datamix up``, ``down`` and ``status``: a cluster of machines, from its file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from datamix.errors import ConfigError

File = Annotated[
    Path,
    typer.Argument(help="cluster.yaml, or one of cluster/launch/; run it in the top folder."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def up(
    file: File,
    serve: Annotated[
        Path, typer.Option(help="What to serve; deployments/serve-cpu.yaml without GPUs.")
    ] = Path("deployments/serve.yaml"),
    deploy: Annotated[bool, typer.Option(help="Serve it; else start the nodes only.")] = True,
    yes: Yes = False,
) -> None:
    """Start a cluster, or update it, and serve an application: ray up, serve deploy."""
    from cluster import launcher

    cluster = launcher.read_cluster(file)
    _ask(
        f"Start cluster {cluster.name!r} ({cluster.provider}): a head, and up to "
        f"{cluster.max_workers} workers as they are needed? If it runs, Ray is restarted.",
        yes,
    )
    launcher.up(cluster, serve if deploy else None)
    if deploy:
        print(f"deployed; until it answers, workers may have to start: datamix status {file}")


def down(file: File, yes: Yes = False) -> None:
    """Stop a cluster and give its machines back: ray down."""
    from cluster import launcher

    cluster = launcher.read_cluster(file)
    _ask(f"Stop cluster {cluster.name!r} ({cluster.provider}) and all that it serves?", yes)
    launcher.down(cluster)


def status(file: File) -> None:
    """Show a cluster's nodes and applications; exit code 1 unless all of these run."""
    from cluster import launcher

    found = launcher.status(launcher.read_cluster(file))
    print(found)
    raise typer.Exit(0 if found.serves else 1)


def _ask(question: str, yes: bool) -> None:
    """Go on, or end with 1 where somebody says no.

    Raises:
        ConfigError: nobody is there to be asked.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to confirm, expected --yes")
    if not typer.confirm(question):
        raise typer.Exit(1)
