"""`datamix gpu-exporter`: this machine's GPUs for Prometheus."""

from __future__ import annotations

from typing import Annotated

import typer


def gpu_exporter(
    port: Annotated[int, typer.Option(help="Where Prometheus scrapes; 0 for a free one.")] = 9835,
    host: Annotated[str, typer.Option(help="What to listen on.")] = "0.0.0.0",
) -> None:
    """Serve this machine's GPUs to Prometheus, for nodes without Ray; Ctrl-C ends it."""
    from cluster.gpu import export_gpus
    from cluster.serve import wait_for_signal
    from deployments import nvml

    export_gpus(port, host, nvml.load(), wait_for_signal)
