"""`datamix costs`: parses and calls, nothing else."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from datamix.errors import ConfigError


def costs(
    architecture: Annotated[str, typer.Option(help="Name of the network.")],
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, one of the network's options; repeat.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs mixed together; 0: no mixing.")] = 8,
    wire_dtype: Annotated[
        Literal["float32", "float16", "int8", "int16"],
        typer.Option(help="Of the values on the wire."),
    ] = "float16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What each part of a network costs: parameters, FLOPs, activations, bytes per round."""
    import json

    import torch

    from datamix.models import Architecture, build
    from datamix.models import costs as compute

    with torch.device("meta"):
        model = build(Architecture(architecture, dict(map(parse_option, option or ()))))
    found = compute(model, group_size=group_size, wire_dtype=wire_dtype)
    print(json.dumps(found.to_json(), indent=1) if as_json else found.table())


def parse_option(text: str) -> tuple[str, int | str]:
    """``KEY=VALUE`` apart; a value of digits is a number.

    Raises:
        ConfigError: there is no ``=``, or nothing before it.
    """
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise ConfigError(f"option is {text!r}, expected KEY=VALUE")
    return key, int(value) if value.isascii() and value.isdigit() else value
