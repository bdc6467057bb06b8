"""What ``datamix report`` and ``datamix compare`` do: read records, show, write."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datamix.errors import ConfigError
from edge.fleet.compare import Comparison, Difference, compare
from edge.fleet.recorder import write_json
from edge.fleet.report import summarise
from edge.fleet.saved import about, load_run
from edge.fleet.view import duration, show, show_overview


def report(folders: Sequence[Path], html_path: Path | None, json_path: Path | None) -> int:
    """Fold runs into one report; returns the worst of their exit codes.

    Raises:
        ConfigError: a folder holds no run, or a file cannot be written.
    """
    _check(html_path, json_path)
    names = unique_names(folders)
    runs = [
        (name, summarise(load_run(folder))) for name, folder in zip(names, folders, strict=True)
    ]
    if json_path is not None:
        entries = [
            {"run": name, **one.as_dict(), "series": one.series.as_dict()} for name, one in runs
        ]
        _write(json_path, {"runs": entries})
    if html_path is not None:
        from edge.fleet.page import Entry, write_report

        write_report(
            html_path,
            [
                Entry(name, summary, about=about(folder))
                for (name, summary), folder in zip(runs, folders, strict=True)
            ],
            "DataMix: a fleet's report" if len(runs) == 1 else f"DataMix: {len(runs)} runs",
        )
    if len(runs) > 1:
        show_overview(runs)
    for name, summary in runs:
        show(summary, title="Fleet" if len(runs) == 1 else name)
    return max(summary.exit_code for _, summary in runs)


def compare_runs(a: Path, b: Path, json_path: Path | None) -> Comparison:
    """Compare two records and show how they differ.

    Raises:
        ConfigError: a folder holds no run, or the file cannot be written.
    """
    _check(None, json_path)
    names = unique_names([a, b])
    found = compare((names[0], load_run(a)), (names[1], load_run(b)))
    if json_path is not None:
        _write(json_path, found.as_dict())
    show_comparison(found)
    return found


def show_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print the figures of both, the difference, and what it means."""
    console = console or Console()
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    view = Table(
        "", found.a, found.b, "difference (95%)", "ratio (95%)", f"{found.b} is",
        title=f"{found.b} against {found.a}", title_justify="left",
    )  # fmt: skip
    for one in found.differences:
        view.add_row(
            one.name,
            _value(one, one.a),
            _value(one, one.b),
            _difference(one),
            _ratio(one),
            one.verdict,
        )
    console.print(view)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart.

    Raises:
        ConfigError: one is named twice.
    """
    paths = [folder.absolute() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("a run is named twice, expected each once")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def _value(one: Difference, value: float | None) -> str:
    if value is None:
        return "not enough samples"
    if one.unit == "s":
        return duration(value)
    return f"{value:.2%}" if one.unit == "share" else f"{value:.1f}/s"


def _difference(one: Difference) -> str:
    if one.difference is None or one.difference_interval is None:
        return "-"
    low, high = one.difference_interval
    if one.unit == "s":
        factor, unit, digits = 1e3, " ms", 2
    elif one.unit == "share":
        factor, unit, digits = 100.0, " points", 2
    else:
        factor, unit, digits = 1.0, "/s", 1
    texts = [f"{factor * value:+.{digits}f}" for value in (one.difference, low, high)]
    return f"{texts[0]}{unit} ({texts[1]} to {texts[2]})"


def _ratio(one: Difference) -> str:
    if one.ratio is None or one.ratio_interval is None:
        return "-"
    return f"{one.ratio:.3f} ({one.ratio_interval[0]:.3f} to {one.ratio_interval[1]:.3f})"


def _check(html_path: Path | None, json_path: Path | None) -> None:
    """Refuse what cannot be written before anything is read."""
    if html_path is not None and find_spec("matplotlib") is None:
        raise ConfigError("--html needs matplotlib, expected it installed (the extra 'report')")
    for path in (html_path, json_path):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is no folder, expected one to write {path.name} to")


def _write(path: Path, body: dict[str, Any]) -> None:
    try:
        write_json(path, body)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
