"""``datamix profile-device``: measure a device for ``datamix simulate --profiles``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def profile_device(
    bundle: Annotated[str, typer.Argument(help="Folder or URI of the bundle.")],
    output: Annotated[Path, typer.Option(help="Write the profile to this YAML file.")],
    name: Annotated[str, typer.Option(help="Name of this kind of device.")] = "measured",
    link: Annotated[
        str | None, typer.Option(help="A kind of link to go with it: 3g, 4g, 5g, wifi, fibre.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="What it is measured on; else the processor found.")
    ] = None,
    runtime: Annotated[
        Literal["auto", "onnx", "torch"],
        typer.Option(help="What runs stem and head; auto: onnx where exported and installed."),
    ] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of one part.")] = 1,
    rounds: Annotated[int, typer.Option(help="Groups to infer.")] = 200,
) -> None:
    """Measure how long this device takes for stem, mixing, messages, de-mixing and head."""
    from datamix.errors import ConfigError
    from edge.device import open_device
    from edge.fleet import measuring, profiles

    known = profiles.read_kinds(profiles.BUILT_IN).links
    if link is not None and link not in known:
        raise ConfigError(f"link is {link!r}, expected one of {', '.join(known)}")
    device = open_device(bundle, runtime=runtime, threads=threads)
    parts = f"{type(device).__name__}, {threads} thread{'s' if threads > 1 else ''}"
    found = measuring.measure(device, rounds, runtime=parts, machine=machine)
    measuring.write(output, name, found.kind, link)
    print(measuring.table(name, found))
