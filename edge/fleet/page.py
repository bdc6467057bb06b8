"""The report of one run or of many as one HTML file that needs nothing else, not even a network.

Each plot has its numbers as a table behind it and a sentence for those who do not see it. The page
follows the reader's choice of light or dark and is as wide as the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from datamix.errors import ConfigError
from edge.fleet.drawing import Plot
from edge.fleet.load_plots import load_plots
from edge.fleet.plots import run_plots
from edge.fleet.report import Summary
from edge.fleet.series import Series
from edge.fleet.view import overview, rows

_STYLE = """
:root { color-scheme: light dark; --ink: #111; --paper: #fff; --soft: #444; --line: #bbb;
  --faint: #ddd; --shade: #eee; --blue: #0072b2; --orange: #d55e00; --green: #009e73;
  --purple: #a8507f; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #16181c; --soft: #bbb;
  --line: #555; --faint: #3a3d42; --shade: #24272c; --blue: #56b4e9; --orange: #f59b3d;
  --green: #4fd1a5; --purple: #e6a3c8; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #222; --line: #888; --faint: #ccc;
  --shade: #eee; --blue: #0072b2; --orange: #d55e00; --green: #009e73; --purple: #a8507f; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; }
a { color: var(--blue); }
.verdict { border-left: .4rem solid var(--ink); padding: .5rem 1rem; font-weight: 600; }
.invalid { border-left-style: double; border-left-width: .8rem; }
.note { border: 1px solid var(--line); padding: .5rem 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 2rem 1.5rem; margin: 1.5rem 0; align-items: start; grid-auto-flow: dense; }
@media (min-width: 52rem) { .tall { grid-row: span 2; } }
figure { margin: 0; min-width: 0; max-width: 40rem; break-inside: avoid; }
figcaption { font-size: .9rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { fill: currentColor; }
details { font-size: .9rem; margin-top: .3rem; } summary { cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; } .wide td:first-child { white-space: nowrap; }
.figures td { overflow-wrap: anywhere; } .figures th { width: 14rem; }
@media (max-width: 34rem) { body { margin: 1rem auto; } .figures th { width: 8rem; } }
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of a page.

    Attributes:
        name: as its heading.
        summary: the figures, and the run over time.
        extra: more names and figures, shown first.
        about: settings, command and machine, shown last.
    """

    name: str
    summary: Summary
    extra: Sequence[tuple[str, str]] = ()
    about: Sequence[tuple[str, str]] = ()


def write_page(
    path: str | Path,
    summary: Summary,
    series: Series,
    extra: Sequence[tuple[str, str]] = (),
    title: str = "DataMix: a fleet's report",
) -> None:
    """Write the report of a run.

    Args:
        path: of the HTML file; replaced if it exists.
        summary: the figures.
        series: the run second by second.
        extra: more names and figures, shown first (the demo's accuracy, for one).
        title: of the page.

    Raises:
        ConfigError: it cannot be written.
    """
    body = _run(Entry("", summary, extra), series, level=2, salt="")
    _write(path, title, [_privacy([summary]), *body])


def write_report(path: str | Path, entries: Sequence[Entry], title: str) -> None:
    """Write the report of one or more runs: together against their load, then each for itself.

    Raises:
        ConfigError: there is no run, or the page cannot be written.
    """
    if not entries:
        raise ConfigError("the report got no run, expected at least one")
    summaries = [entry.summary for entry in entries]
    parts = [_privacy(summaries)]
    if len(entries) > 1:
        head, lines = overview([(entry.name, entry.summary) for entry in entries])
        links = [
            f'<a href="#run-{place}">{escape(line[0])}</a>' for place, line in enumerate(lines)
        ]
        cells = [[link, *map(escape, line[1:])] for link, line in zip(links, lines, strict=True)]
        parts += ["<h2>All runs</h2>", _table(head, cells)]
        parts.append(_figures(load_plots([(entry.name, entry.summary) for entry in entries])))
    for place, entry in enumerate(entries):
        parts.append(f'<section id="run-{place}">')
        if len(entries) > 1:
            parts.append(f"<h2>{escape(entry.name)}</h2>")
        parts += _run(entry, entry.summary.series, level=2, salt=f"run {place}")
        parts.append("</section>")
    _write(path, title, parts)


def _run(entry: Entry, series: Series, level: int, salt: str) -> list[str]:
    summary = entry.summary
    valid = "Valid: the generator kept up."
    verdict = valid if summary.valid else f"INVALID: {summary.invalid_reason}"
    parts = [
        f'<p class="verdict{"" if summary.valid else " invalid"}">{escape(verdict)}</p>',
        _figures(run_plots(summary, series, salt)),
    ]
    if not series.failures:
        parts.append("<p>No inference failed: there are no failures to plot.</p>")
    if len(summary.by_profile) == 1:
        only = summary.by_profile[0]
        parts.append(f"<p>All {only['devices']} devices that were due had one profile.</p>")
    parts += [f"<h{level}>All figures</h{level}>", _pairs([*entry.extra, *rows(summary)])]
    if entry.about:
        parts += [f"<h{level}>Settings and machine</h{level}>", _pairs(entry.about)]
    return parts


def _write(path: str | Path, title: str, parts: Sequence[str]) -> None:
    body = "\n".join(parts)
    # Nothing may be fetched and nothing may run, whatever stands in a run's name.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _privacy(summaries: Sequence[Summary]) -> str:
    notes = dict.fromkeys(escape(summary.privacy) for summary in summaries)
    return f'<p class="note"><strong>Privacy.</strong> {"<br>".join(notes)}</p>'


def _figures(plots: Sequence[Plot]) -> str:
    return '<div class="plots">\n' + "\n".join(map(_figure, plots)) + "\n</div>"


def _figure(plot: Plot) -> str:
    numbers = _table(plot.head, [[escape(cell) for cell in row] for row in plot.rows])
    tall = ' class="tall"' if plot.tall else ""
    return (
        f"<figure{tall}><h3>{escape(plot.heading)}</h3>{plot.svg}"
        f"<figcaption>{escape(plot.caption)}</figcaption>"
        f"<details><summary>Numbers of “{escape(plot.heading)}”</summary>{numbers}</details>"
        "</figure>"
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        f"<div class='wide' tabindex='0' role='group' aria-label='table'><table><thead><tr>{top}"
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    body = "\n".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(figure)}</td></tr>"
        for name, figure in pairs
    )
    return f"<table class='figures'>\n{body}\n</table>"
