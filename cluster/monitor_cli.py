"""`datamix monitor` and `datamix gpu-exporter`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def monitor(
    address: Annotated[
        str, typer.Option(help="The running Ray cluster: auto, or host:port as serve prints it.")
    ] = "auto",
    port: Annotated[int, typer.Option(help="Of Prometheus; 0 for a free one.")] = 9090,
    prometheus: Annotated[
        str | None, typer.Option(help="The program; else the one on the PATH.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder to keep what is recorded; else gone at the end.")
    ] = None,
    gpu_exporter: Annotated[
        list[str] | None, typer.Option(help="host:port of a datamix gpu-exporter; several may be.")
    ] = None,
    fleet: Annotated[
        list[str] | None,
        typer.Option(help="host:port of a datamix simulate --metrics; several may be."),
    ] = None,
    interval: Annotated[
        int, typer.Option(help="Seconds between scrapes, and between looks at the rules.", min=1)
    ] = 10,
    page_port: Annotated[
        int, typer.Option(help="Of the live page; 0 for a free one, -1 for no page.", min=-1)
    ] = 9400,
) -> None:
    """Run Prometheus with our rules and alerts on a running cluster; Ctrl-C ends it."""
    from cluster.monitoring.run import Options
    from cluster.monitoring.run import monitor as run
    from cluster.serve import wait_for_signal

    page = None if page_port < 0 else page_port
    options = Options(
        port, prometheus, data, tuple(gpu_exporter or ()), tuple(fleet or ()), interval, page
    )
    run(
        address,
        options,
        wait=wait_for_signal,
        say=lambda text: print(f"… {text}", file=sys.stderr, flush=True),
    )


def gpu_exporter(
    port: Annotated[int, typer.Option(help="Where Prometheus scrapes; 0 for a free one.")] = 9835,
    host: Annotated[str, typer.Option(help="What to listen on.")] = "0.0.0.0",
) -> None:
    """Serve this machine's GPUs to Prometheus, for nodes without Ray; Ctrl-C ends it."""
    from cluster.gpu import export_gpus
    from cluster.serve import wait_for_signal
    from deployments import nvml

    export_gpus(port, host, nvml.load(), wait_for_signal)
