"""``datamix canaries``: give bundles that were saved without canaries their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def canaries(
    bundles: Annotated[list[Path], typer.Argument(help="Local folders of bundles.")],
) -> None:
    """Add what the backbone makes of noise, so that whoever serves a bundle can check it."""
    from datamix.bundle import add_canaries

    for bundle in bundles:
        manifest = add_canaries(bundle)
        print(f"{bundle}: canaries for {len(manifest.blocks)} blocks of {manifest.name}")
