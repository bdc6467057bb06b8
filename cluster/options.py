"""Options that several commands share, and the token that a file or the environment holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

Bundle = Annotated[str | None, typer.Option(help="Folder or URI of the bundle the devices run.")]
Inputs = Annotated[
    str | None, typer.Option(help=".npz of images or pcm, and labels; else the shipped sample.")
]
Workload = Annotated[
    Literal["bundle", "echo"],
    typer.Option(help="bundle: real inference; echo: for --engine null or emulated."),
]
Rows = Annotated[int, typer.Option(help="Rows per message of the echo workload.")]
Verify = Annotated[bool, typer.Option(help="Compare every answer with the local one.")]
# Not the token itself: every user of the machine sees the arguments of its processes.
TokenFile = Annotated[
    Path | None, typer.Option(help="File with the bearer token; else $DATAMIX_TOKEN, or none.")
]
CaFile = Annotated[
    Path | None, typer.Option(help="PEM file of the authorities to trust; else this machine's.")
]
ModeName = Annotated[
    str | None, typer.Option("--mode", help="mix, bounded or split; else the bundle's own.")
]
SecondUrl = Annotated[
    str | None, typer.Option(help="Base URL of operator B, for split; url is operator A's.")
]
SecondTokenFile = Annotated[Path | None, typer.Option(help="File with operator B's bearer token.")]
AllowSameOperator = Annotated[
    bool, typer.Option(help="Go on where both ends have one operator: NOT private.")
]
TraceEndpoint = Annotated[
    str | None,
    typer.Option(help="Export traces there by OTLP: http://host:4318/v1/traces (docs/tracing.md)."),
]


def read_token(file: Path | None) -> str | None:
    """The bearer token of a file; without one $DATAMIX_TOKEN, or None."""
    if file is None:
        return os.environ.get("DATAMIX_TOKEN") or None
    from datamix import tokens

    return tokens.read_token(file)


Profiles = Annotated[
    str | None,
    typer.Option(help="Kinds of devices: phone/4g:0.7,laptop/wifi:0.3, or a YAML file."),
]
