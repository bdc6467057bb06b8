"""`datamix ledger`: parses, calls and prints, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from datamix.errors import ConfigError


def ledger(
    file: Annotated[Path, typer.Argument(help="The device's ledger.")],
    budget_bits: Annotated[
        float | None, typer.Option(help="Bits that a source may spend, for the shares.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What each input source has given away: inputs, inferences, bits, per session and mode."""
    import json
    from dataclasses import asdict

    from edge.ledger import Ledger

    if not file.is_file():  # opening would make one
        raise ConfigError(f"{file} is no file, expected a ledger")
    with Ledger(file, budget_bits=budget_bits) as found:
        sources, rows = found.sources(), found.report()
    if as_json:
        print(
            json.dumps(
                {
                    "budget_bits": budget_bits,
                    "sources": [asdict(source) | {"share": source.share} for source in sources],
                    "rows": [asdict(row) for row in rows],
                },
                indent=1,
            )
        )
        return
    totals = [("source", "bits", "unbounded", "of budget", "")]
    totals += [
        (
            source.source,
            f"{source.bits:.6g}",
            f"{source.unbounded:,}",
            _share(source.share),
            source.warning or "",
        )
        for source in sources
    ]
    print(_table(totals, left={0, 4}))
    lines: list[tuple[str, ...]] = [_HEAD]
    lines += [
        (
            *(row.source, row.session, row.bundle, row.mode),
            *(f"{count:,}" for count in (row.inputs, row.inferences, row.rounds)),
            f"{row.bits:.6g}",
            f"{row.unbounded:,}",
            _share(row.share),
            _time(row.first_s),
            _time(row.last_s),
        )
        for row in rows
    ]
    print()
    print(_table(lines, left={0, 1, 2, 3}))


_HEAD = (
    *("source", "session", "bundle", "mode"),
    *("inputs", "inferences", "rounds", "bits", "unbounded", "of budget"),
    *("first (UTC)", "last (UTC)"),
)


def _table(lines: Sequence[Sequence[str]], left: set[int]) -> str:
    """Lines of equal cells under each other; ``left`` says which columns are text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _time(seconds: float) -> str:
    """UTC, to the second; the number itself where no calendar has it."""
    from datetime import UTC, datetime

    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g}"
