"""The ``datamix`` command: parses its arguments and calls one function, nothing else.

Imports that cost time (torch, Ray, matplotlib) stay inside the command that needs them, so that
``datamix --help`` answers at once.

Exit codes: 0 done; 1 failed, with one sentence on stderr; 2 wrong usage or setting; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from datamix.errors import ConfigError, DataMixError

app = typer.Typer(
    name="datamix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("datamix-cluster"))
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Devices mix, an untrusted cloud computes, devices de-mix."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``sys.argv`` by default, and exit with the code it earned."""
    try:
        app(arguments, prog_name="datamix")
    except DataMixError as error:
        print(f"datamix: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
