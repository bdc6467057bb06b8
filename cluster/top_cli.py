"""`datamix top`: a cluster's figures in the terminal."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

PrometheusUrl = Annotated[
    str, typer.Option(help="The Prometheus that scrapes the cluster, such as datamix monitor's.")
]


def top(prometheus: PrometheusUrl = "http://127.0.0.1:9090") -> None:
    """Show what a cluster does now, anew each second; Ctrl-C ends it."""
    from rich.console import Console

    from cluster.monitoring.live import Live, Prometheus
    from cluster.monitoring.top import watch

    with (
        contextlib.closing(Prometheus(prometheus)) as server,
        contextlib.closing(Live(server)) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        watch(live, Console())
