"""``datamix deploy``: parses and calls, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def deploy(
    config: Annotated[Path, typer.Argument(help="Serve configuration: deployments/serve.yaml.")],
    address: Annotated[
        str,
        typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="Ray's dashboard, http://host:port."),
    ] = "http://127.0.0.1:8265",
    within: Annotated[
        float,
        typer.Option(help="Seconds until it must run, the start of nodes included."),
    ] = 900,
) -> None:
    """Deploy on a running cluster, and go back to what ran before if it fails."""
    from cluster.rollout import connect, read_settings
    from cluster.rollout import deploy as run

    def say(line: str) -> None:
        print(f"… {line}", file=sys.stderr, flush=True)

    run(connect(address), read_settings(config), within_s=within, say=say)
    print("deployed")
