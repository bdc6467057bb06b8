"""What every benchmark writes beside its figures: machine, versions, command; table and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="write the result here too")
    return made


def _command() -> str:
    """This run as somebody else would type it."""
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command of this run."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {
            name: version(name)
            for name in (
                "ray",
                "torch",
                "pyarrow",
                "numpy",
                "picows",
                "uvicorn",
                "uvloop",
                "websockets",
            )
        },
        "commit": commit,
        "command": _command(),
    }


def show(
    title: str,
    rows: list[dict[str, Any]],
    notes: list[str],
    path: Path | None,
    *,
    packages: Mapping[str, str] | None = None,
    **figures: Any,
) -> None:
    """Print one table, and write figures, rows and environment as JSON where asked to.

    ``packages`` are releases that took part from another environment than this one.
    """
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(
            *(
                f"{v:,.3g}"
                if isinstance(v, float) and abs(v) < 100
                else f"{v:,.0f}"
                if isinstance(v, float)
                else str(v)
                for v in row.values()
            )
        )
    console = Console(width=max(120, Console().width))
    console.print(table)
    for name, value in figures.items():
        console.print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for note in notes:
        console.print(f"note: {note}")
    if path is not None:
        measured_on = environment()
        measured_on["packages"] |= packages or {}
        result = {
            "title": title,
            "figures": figures,
            "rows": rows,
            "notes": notes,
            "environment": measured_on,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
