"""Plots as inline SVG that the page's style sheet colours, with the numbers behind them.

Lines differ by dash, marker and label and not by colour alone, so a plot survives a black-and-white
print. Colours are Okabe and Ito's, which colour-blind people can tell apart; they stand in the SVG
as CSS variables, so that a dark page has others.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What stands in the drawing -> what stands in the SVG.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
INK, FAINT, SHADE = "#000000", "#dddddd", "#eeeeee"
_VARIABLES = {
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    INK: "currentColor",
    FAINT: "var(--faint)",
    SHADE: "var(--shade)",
}
COLOURS = (ORANGE, BLUE, GREEN, PURPLE, INK)
_MARKERS, _DASHES = "os^Dv", ("--", "-", ":", "-.", (0, (1, 1)))
_TABLE_ROWS = 60
WIDTH_INCHES, HEIGHT_INCHES = 5.0, 3.0

Line = tuple[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of a page.

    Attributes:
        heading: above it.
        svg: the picture.
        caption: below it, one sentence.
        alt: what a reader who does not see it should know.
        head: of the table of its numbers.
        rows: of that table.
        tall: whether it is twice as high as others.
    """

    heading: str
    svg: str
    caption: str
    alt: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    tall: bool = False


def line_plot(
    heading: str,
    caption: str,
    x: Sequence[float],
    lines: Sequence[Line],
    labels: tuple[str, str],
    *,
    salt: str,
    also: Callable[[Axes], None] | None = None,
) -> Plot:
    """Lines over ``x`` from zero up; NaN is a point that is not known.

    Args:
        heading: of the plot.
        caption: of the plot.
        x: places.
        lines: label and values.
        labels: of the axes.
        salt: different for every plot of a page, for the names inside its SVG.
        also: draws more.
    """

    def fill(axes: Axes) -> None:
        for place, (label, values) in enumerate(lines):
            known = [(a, b) for a, b in zip(x, values, strict=True) if math.isfinite(b)]
            axes.plot(
                [a for a, _ in known],
                [b for _, b in known],
                linestyle=_DASHES[place % len(_DASHES)] if len(lines) > 1 else "-",
                color=COLOURS[place % len(COLOURS)] if len(lines) > 1 else BLUE,
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=3 if len(known) <= 120 else 0,
                linewidth=1.4,
                label=label,
                zorder=3 - place / 10,  # a broken line over a whole one that it coincides with
            )
        if also is not None:
            also(axes)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        highest = max((b for _, values in lines for b in values if math.isfinite(b)), default=0)
        axes.set_ylim(0, 1.1 * highest or 1)
        axes.locator_params(axis="x", steps=[1, 2, 5, 10])
        if len(lines) > 1:
            above(axes)

    step = max(1, math.ceil(len(x) / _TABLE_ROWS))
    rows = [
        tuple(number(value) for value in (x[place], *(values[place] for _, values in lines)))
        for place in range(0, len(x), step)
    ]
    parts = [f"{label} {_range(values)}" for label, values in lines]
    alt = f"{heading}: {labels[1]} over {labels[0]}; {'; '.join(parts)}."
    return Plot(
        heading, draw(fill, salt, alt), caption, alt, (labels[0], *(one for one, _ in lines)), rows
    )


def above(axes: Any) -> None:
    """The legend over the plot, where no line runs."""
    names = axes.get_legend_handles_labels()[1]
    axes.legend(
        frameon=False,
        ncols=5 if sum(map(len, names)) < 30 else 3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
        columnspacing=1,
        handletextpad=0.4,
    )


def draw(fill: Callable[[Any], None], salt: str, alt: str, height: float = HEIGHT_INCHES) -> str:
    """One plot as an SVG element, text left as text, colours as the page's variables."""
    return draw_figure(lambda figure: fill(tidy(figure.add_subplot())), salt, alt, height)


def tidy(axes: Any) -> Any:
    """A grid that is hardly seen, and no frame."""
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_figure(fill: Callable[[Any], None], salt: str, alt: str, height: float) -> str:
    """The same for a figure of several parts."""
    from html import escape

    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"datamix {salt}",
        "font.size": 10,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.facecolor": "none",
        "hatch.linewidth": 0.8,
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure)
        # Without metadata: matplotlib's would name a web address, and the page asks for nothing.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names that nothing refers to; two plots of one page would share them.
    text = re.sub(r'<g id="[A-Za-z0-9.]+_\d+"', "<g", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "not known"
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} to {high}"


def number(value: float) -> str:
    """Three digits that matter."""
    if not math.isfinite(value):
        return "-"
    if value and abs(value) < 100:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".rstrip("0").rstrip(".")
    return f"{value:.0f}"


def plain_ticks(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def or_nan(value: float | None) -> float:
    """A figure that may not be known as a place on an axis."""
    return math.nan if value is None else value
