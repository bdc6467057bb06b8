"""The report of a run as one HTML file that needs nothing else, not even a network.

Plots are inline SVG. Lines differ by dash and label and not by colour alone (the colours are Okabe
and Ito's, which colour-blind people can tell apart), so the page survives a black-and-white print.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.fleet.report import Series, Summary
from edge.fleet.view import rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 2rem auto;
       max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-bottom: .3rem; }
.verdict { border-left: .4rem solid #111; padding: .5rem 1rem; font-weight: 600; }
.note { border: 1px solid #111; padding: .5rem 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .9rem; color: #333; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #bbb;
         vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
"""


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
    """
    table = "\n".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(figure)}</td></tr>"
        for name, figure in [*extra, *rows(summary)]
    )
    plots = "\n".join(
        f"<figure><h2>{html.escape(heading)}</h2>{svg}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for heading, svg, caption in _plots(series)
    )
    verdict = (
        "Valid: the generator kept up." if summary.valid else (f"INVALID: {summary.invalid_reason}")
    )
    page = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p class="verdict">{html.escape(verdict)}</p>
<p class="note"><strong>Privacy.</strong> {html.escape(summary.privacy)}</p>
<div class="plots">
{plots}
</div>
<h2>All figures</h2>
<table>
{table}
</table>
</body>
</html>
"""
    Path(path).write_text(page, encoding="utf-8")


def _plots(series: Series) -> list[tuple[str, str, str]]:
    """(heading, SVG, caption) of every plot."""
    second = [value + 0.5 for value in series.second]
    plots = [
        (
            "Latency over time",
            _draw(
                lambda axes: _lines(
                    axes,
                    second,
                    [("p99", _ms(series.p99_s), "--"), ("p50", _ms(series.p50_s), "-")],
                    "time in s",
                    "latency in ms",
                )
            ),
            "By the second in which an inference was due; from the scheduled send to the answer.",
        ),
        (
            "How many wait how long",
            _draw(lambda axes: _distribution(axes, series)),
            "Share of inferences (vertical) that were done within a latency (horizontal).",
        ),
        (
            "Offered and answered",
            _draw(
                lambda axes: _lines(
                    axes,
                    second,
                    [("offered", series.offered, "--"), ("answered", series.answered, "-")],
                    "time in s",
                    "requests per s",
                )
            ),
            "Where the lines part, a queue grows.",
        ),
    ]
    if any(map(math.isfinite, series.batch_rows)):
        plots.append(
            (
                "Rows per batch",
                _draw(
                    lambda axes: _lines(
                        axes,
                        second,
                        [("rows per batch", series.batch_rows, "-")],
                        "time in s",
                        "rows",
                    )
                ),
                "How many mixtures, of whichever devices, the cloud computed at once.",
            )
        )
    if any(map(math.isfinite, series.engine_busy)):
        busy = [100 * value for value in series.engine_busy]
        plots.append(
            (
                "Engine use",
                _draw(
                    lambda axes: _lines(
                        axes, second, [("engine busy", busy, "-")], "time in s", "% of time"
                    )
                ),
                "Share of each second in which the engine computed.",
            )
        )
    return plots


def _lines(
    axes: Axes,
    x: Sequence[float],
    lines: Sequence[tuple[str, Sequence[float], str]],
    x_label: str,
    y_label: str,
) -> None:
    """Lines over time from zero, named at their side of the legend."""
    for (label, values, dash), colour, marker in zip(
        lines, (_ORANGE, _BLUE, _GREEN), "os^", strict=False
    ):
        known = [(a, b) for a, b in zip(x, values, strict=True) if math.isfinite(b)]
        axes.plot(
            [a for a, _ in known],
            [b for _, b in known],
            dash,
            color=colour,
            marker=marker,
            markersize=3,
            label=label,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    highest = max((b for _, values, _ in lines for b in values if math.isfinite(b)), default=0)
    axes.set_ylim(0, 1.1 * highest or 1)
    if len(lines) > 1:
        axes.legend(frameon=False)


def _distribution(axes: Axes, series: Series) -> None:
    axes.step(
        [latency_s * 1e3 for _, latency_s in series.latencies_s],
        [share * 100 for share, _ in series.latencies_s],
        where="post",
        color=_BLUE,
    )
    axes.set_xlabel("latency in ms (logarithmic)")
    axes.set_ylabel("% of inferences")
    if series.latencies_s:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 102)


def _draw(fill: Callable[[Any], None]) -> str:
    """One plot as an SVG element, text left as text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "datamix", "font.size": 10}):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(color="#ddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        fill(axes)
        # Without metadata: matplotlib's would name a web address, and the page asks for nothing.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _ms(values: Sequence[float]) -> list[float]:
    return [value * 1e3 for value in values]
