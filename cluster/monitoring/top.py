"""``datamix top``: the live page's figures in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.panel import Panel as Box
from rich.table import Table
from rich.text import Text

from cluster.monitoring.board import Panel, Unit, live_panels
from cluster.monitoring.live import STATES, Live

_MOST = 8  # series of a panel
_WIDTH = 46
_STYLES = {
    "ok": "green",
    "no data": "yellow",
    "cloud down": "bold red",
    "no prometheus": "bold red",
}


def short(value: float) -> str:
    """Three digits and the letter of a thousand, a million or a billion."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def cell(value: float, unit: Unit) -> str:
    """A value in its unit."""
    match unit:
        case "ratio":
            return f"{value:.1%}"
        case "seconds":
            return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
        case "per_s":
            return f"{short(value)}/s"
        case "bytes":
            return f"{short(value)}B"
        case "bytes_per_s":
            return f"{short(value)}B/s"
        case "watts":
            return f"{short(value)} W"
        case "celsius":
            return f"{value:.0f} °C"
        case "joules":
            return f"{short(value)} J"
        case _:
            return short(value)


def render(told: dict[str, object]) -> RenderableType:
    """One screen of what :meth:`cluster.monitoring.live.Live.now` tells."""
    state = str(told["state"])
    parts: list[RenderableType] = [
        Text(STATES[state], style=_STYLES[state])  # type: ignore[index]
    ]
    alerts = told["alerts"]
    assert isinstance(alerts, list)
    for one in alerts:
        if one["state"] == "firing":
            parts.append(Text(f"ALERT {one['name']}: {one['summary']}", style="bold red"))
    values = told["panels"]
    assert isinstance(values, dict)
    boxes = [_box(panel, values.get(panel.name, [])) for panel in live_panels()]
    return Group(*parts, Columns(boxes))


def _box(panel: Panel, series: list[dict[str, object]]) -> Box:
    table = Table.grid(expand=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    rows = [(str(one["legend"]), _last(one)) for one in series]
    if panel.kind == "heat":
        rows = _apart(rows)
    for legend, value in rows[:_MOST]:
        unit = "per_s" if panel.kind == "heat" else panel.unit
        table.add_row(legend, "–" if value is None else cell(value, unit))
    if len(rows) > _MOST:
        table.add_row(f"and {len(rows) - _MOST} more", "")
    if not rows:
        table.add_row(Text("no data", style="dim"), "")
    return Box(table, title=panel.title, title_align="left", width=_WIDTH)


def _last(series: dict[str, object]) -> float | None:
    points = series["points"]
    assert isinstance(points, list)
    return float(points[-1][1]) if points else None


def _apart(buckets: list[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    """What is in each bucket, of what is up to each bound; empty ones left out."""
    ordered = sorted((float(bound), value or 0.0) for bound, value in buckets)
    found: list[tuple[str, float | None]] = []
    below = 0.0
    for bound, value in ordered:
        if value > below:
            found.append((f"≤ {bound:g}" if bound < float("inf") else "more", value - below))
        below = max(below, value)
    return found


def watch(
    live: Live,
    console: Console,
    *,
    period_s: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the newest figures until interrupted; without a terminal, once."""
    if not console.is_terminal:
        console.print(render(live.now()))
        return
    with Screen(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            screen.update(render(live.now()), refresh=True)
            sleep(period_s)
