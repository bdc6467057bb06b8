"""The outcome of a search as a picture: accuracy against each cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datamix.errors import ConfigError
from edge.search.run import Entry, SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people who see few colours can tell apart; and a mark for each.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
FORMATS = (".svg", ".png")


def plot(result: SearchResult, path: Path, title: str) -> None:
    """Draw to ``path``, an ``.svg`` or ``.png``.

    Filled: on the front. Hollow: finalists that are not. Faint: dropped after a shorter training.
    The steps show the best accuracy that each cost buys; a star marks what was chosen.

    Raises:
        ConfigError: another kind of file.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"plot is {path}, expected a name that ends in {' or '.join(FORMATS)}")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "datamix", "font.size": 9}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, result, lambda entry: entry.costs.edge_flops / 1e6)
        left.set_xlabel("FLOPs on the device per input, millions")
        left.set_ylabel("accuracy on held-out data, %")
        _panel(right, result, lambda entry: entry.costs.bytes_per_inference / 1e3)
        right.set_xlabel("bytes on the wire per input, thousands")
        figure.legend(*right.get_legend_handles_labels(), frameon=False, loc="outside right upper")
        figure.suptitle(title)
        svg = path.suffix == ".svg"
        # Without a date, so that the same outcome gives the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if svg else None)


def staircase(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, accuracy) pairs with more accuracy than every cheaper one, cheapest first."""
    found: list[tuple[float, float]] = []
    for cost, accuracy in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):
        if not found or accuracy > found[-1][1]:
            found.append((cost, accuracy))
    return found


def _panel(axes: Axes, result: SearchResult, x: Callable[[Entry], float]) -> None:
    axes.grid(color="#ddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    dropped = [entry for entry in result.entries if entry.rung < result.chosen.rung]
    axes.plot([x(e) for e in dropped], [_y(e) for e in dropped], ".", color="#bbb", label="dropped")
    for trips in sorted({entry.costs.round_trips for entry in result.entries}):
        colour, mark = _STYLES[(trips - 1) % len(_STYLES)]
        for filled in (False, True):
            some = [
                entry
                for entry in result.entries
                if entry.rung == result.chosen.rung
                and entry.costs.round_trips == trips
                and (entry in result.front) == filled
            ]
            if not some:
                continue
            axes.errorbar(
                [x(e) for e in some],
                [_y(e) for e in some],
                [100 * e.standard_error for e in some],
                fmt=mark,
                color=colour,
                markerfacecolor=colour if filled else "none",
                elinewidth=0.6,
                label=f"{trips} round trip{'s' * (trips > 1)}{'' if filled else ', not on front'}",
            )
    steps = staircase([(x(entry), _y(entry)) for entry in result.front])
    axes.step(*zip(*steps, strict=True), where="post", color="#555", linewidth=0.8)
    axes.plot(
        [x(result.chosen)],
        [_y(result.chosen)],
        "*",
        markersize=16,
        markerfacecolor="none",
        markeredgecolor="black",
        label="chosen",
    )


def _y(entry: Entry) -> float:
    return 100 * entry.measured.accuracy
