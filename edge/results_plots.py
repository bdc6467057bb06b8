"""Plots of the results: accuracy of each arm, and accuracy over K."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from edge.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people who see few colours can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_plots(rows: Sequence[Row], folder: Path) -> dict[str, list[Path]]:
    """Draw an SVG per data set into ``folder``; returns the files by data set.

    The same rows give the same file.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {}
    for data in sorted({row.dataset for row in rows}):
        # What has noise has a figure of its own, over bits.
        clear = [row for row in rows if row.bits_per_input is None]
        some = [row for row in clear if row.dataset == data and row.law == "haar"]
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "datamix", "font.size": 9}):
            figure = Figure(figsize=(11, 4.2), layout="constrained")
            FigureCanvasAgg(figure)
            left, right = figure.subplots(1, 2, sharey=True)
            _over_group_size(left, some)
            _over_edge_flops(right, some)
            left.set_ylabel("test accuracy, %")
            figure.legend(
                *left.get_legend_handles_labels(), frameon=False, loc="outside right upper"
            )
            figure.suptitle(f"{data}: a mark per seed, lines through the means")
            path = folder / f"{data}.svg"
            figure.savefig(path, metadata={"Date": None})
        found[data] = [path]
    return found


def draw_curves(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw accuracy over bits of the mode bounded, an SVG per data set that has such rows."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = []
    for data in sorted({row.dataset for row in rows if row.bits_per_input is not None}):
        some = [row for row in rows if row.dataset == data and row.bits_per_input is not None]
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "datamix", "font.size": 9}):
            figure = Figure(figsize=(6, 4), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            _style(axes)
            for index, (label, of_arm) in enumerate(_by_arm(some).items()):
                bits = sorted({row.bits_per_input or 0.0 for row in of_arm})
                means = [
                    100 * fmean(row.accuracy for row in of_arm if row.bits_per_input == one)
                    for one in bits
                ]
                axes.plot(bits, means, "o-", color=_COLOURS[index], markersize=4, label=label)
            edge = [
                row.accuracy for row in rows if (row.dataset, row.method) == (data, "edge-only")
            ]
            if edge:
                axes.axhline(100 * fmean(edge), color="#000000", linestyle=":", label="edge-only")
            axes.set_xscale("log")
            axes.set_xlabel("bits of one input that the cloud may learn, at most")
            axes.set_ylabel("test accuracy, %")
            axes.legend(frameon=False)
            figure.suptitle(f"{data}: the mode bounded")
            path = folder / f"{data}-bounded.svg"
            figure.savefig(path, metadata={"Date": None})
        found.append(path)
    return found


def _by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    arms: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.label, row.group_size)):
        arms[row.label].append(row)
    return arms


def _style(axes: Axes) -> None:
    axes.grid(color="#ddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _over_group_size(axes: Axes, rows: Sequence[Row]) -> None:
    """Lines over K for what is mixed, level lines for what is not."""
    _style(axes)
    for index, (label, some) in enumerate(_by_arm(rows).items()):
        colour = _COLOURS[index % len(_COLOURS)]
        if some[0].method in ("unmixed", "edge-only"):
            level = 100 * fmean(row.accuracy for row in some)
            dashes = "--" if some[0].method == "unmixed" else ":"
            axes.axhline(level, color=colour, linestyle=dashes, label=label)
            continue
        sizes = sorted({row.group_size for row in some})
        means = [
            100 * fmean(row.accuracy for row in some if row.group_size == size) for size in sizes
        ]
        axes.plot(sizes, means, color=colour, linewidth=1)
        axes.plot(
            [row.group_size for row in some],
            [100 * row.accuracy for row in some],
            "o",
            color=colour,
            markersize=4,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("group size K")


def _over_edge_flops(axes: Axes, rows: Sequence[Row]) -> None:
    _style(axes)
    for index, some in enumerate(_by_arm(rows).values()):
        axes.plot(
            [row.edge_flops / 1e6 for row in some],
            [100 * row.accuracy for row in some],
            "o",
            color=_COLOURS[index % len(_COLOURS)],
            markersize=4,
        )
    axes.set_xlabel("FLOPs on the device per input, millions")
