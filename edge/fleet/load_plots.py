"""Several runs: percentiles, goodput and use against what was offered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edge.fleet.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    Plot,
    above,
    draw,
    line_plot,
    number,
    or_nan,
    plain_ticks,
)
from edge.fleet.quantiles import LABELS
from edge.fleet.report import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PERCENTILES = (
    "From the scheduled send to the answer, with 95% intervals. A percentile of which a run has "
    "too few samples is not there."
)


def load_plots(runs: Sequence[tuple[str, Summary]]) -> list[Plot]:
    """Percentiles, goodput and use of several runs against what they offered.

    Runs that were all offered the same are set below each other instead.
    """
    runs = sorted(runs, key=lambda run: run[1].offered_inferences_per_s)
    offered = [summary.offered_inferences_per_s for _, summary in runs]
    if offered[-1] - offered[0] <= 0.02 * offered[-1]:
        return [_side_by_side(runs)]
    x_label = "offered inferences per s"

    def from_zero(axes: Axes) -> None:
        axes.set_xlim(0, 1.05 * offered[-1])

    return [
        _against_load(runs, offered, x_label),
        line_plot(
            "Goodput against load",
            "Inferences answered right, and within the SLO where there is one, beside those that "
            "were due.",
            offered,
            [
                ("offered", offered),
                ("goodput", [one.goodput_inferences_per_s for _, one in runs]),
            ],
            (x_label, "inferences per s"),
            salt="load goodput",
            also=from_zero,
        ),
        line_plot(
            "Use against load",
            "Share of time in which the engines computed, and cores of the busiest generator "
            "process.",
            offered,
            [
                ("engine busy", [100 * or_nan(one.engine_busy_ratio) for _, one in runs]),
                ("generator", [100 * one.generator_cpu_ratio for _, one in runs]),
            ],
            (x_label, "% of time"),
            salt="load use",
            also=from_zero,
        ),
    ]


def _against_load(
    runs: Sequence[tuple[str, Summary]], offered: Sequence[float], x_label: str
) -> Plot:
    joined = len({(one.workload, one.model, one.mode) for _, one in runs}) == 1

    def fill(axes: Axes) -> None:
        for place, name in enumerate(LABELS):
            middle, spans = _with_spans(runs, name)
            if any(map(math.isfinite, middle)):
                axes.errorbar(
                    offered,
                    middle,
                    yerr=spans,
                    linestyle=("-", "-.", "--", ":")[place] if joined else "",
                    label=LABELS[name],
                    **_mark(place),
                )
        _cross_out(axes, runs, lambda place, _, value: (offered[place], value))
        axes.set_xlabel(x_label)
        axes.set_ylabel("latency in ms (logarithmic)")
        axes.set_xlim(0, 1.05 * offered[-1])
        if axes.get_legend_handles_labels()[1]:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
            above(axes)

    alt = "Percentiles of the latency in ms against the offered load; the table has the numbers."
    return Plot(
        "Percentiles against load",
        draw(fill, "load", alt),
        f"{_PERCENTILES} The cross marks a run that is not valid.",
        alt,
        ("run", x_label, *(f"{label}, ms" for label in LABELS.values()), "valid"),
        _percentile_rows(runs),
    )


def _side_by_side(runs: Sequence[tuple[str, Summary]]) -> Plot:
    def fill(axes: Axes) -> None:
        places = list(range(len(runs)))
        for place, name in enumerate(LABELS):
            middle, spans = _with_spans(runs, name)
            if any(map(math.isfinite, middle)):
                heights = [at + _apart(name) for at in places]
                axes.errorbar(
                    middle, heights, xerr=spans, linestyle="", label=LABELS[name], **_mark(place)
                )
        _cross_out(axes, runs, lambda at, key, value: (value, at + _apart(key)))
        axes.set_yticks(places, [name for name, _ in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_xlabel("latency in ms (logarithmic)")
        if axes.get_legend_handles_labels()[1]:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
            above(axes)

    alt = "Percentiles of the latency in ms of each run; the table has the numbers."
    return Plot(
        "Percentiles by run",
        draw(fill, "runs", alt, 1.4 + 0.4 * len(runs)),
        f"{_PERCENTILES} All runs were offered the same load. A cross marks one that is not valid.",
        alt,
        ("run", "offered inferences per s", *(f"{one}, ms" for one in LABELS.values()), "valid"),
        _percentile_rows(runs),
    )


def _with_spans(
    runs: Sequence[tuple[str, Summary]], name: str
) -> tuple[list[float], list[list[float]]]:
    """A percentile of every run in ms, and how far its interval reaches down and up."""
    middle = [1e3 * or_nan(one.latency_s[name]) for _, one in runs]
    spans = [one.latency_interval_s[name] or (math.nan, math.nan) for _, one in runs]
    down = [value - 1e3 * low for value, (low, _) in zip(middle, spans, strict=True)]
    up = [1e3 * high - value for value, (_, high) in zip(middle, spans, strict=True)]
    return middle, [down, up]


def _apart(name: str) -> float:
    """Percentiles of one run stand a little apart: their intervals may cover each other."""
    return 0.12 * (list(LABELS).index(name) - 1.5)


def _mark(place: int) -> dict[str, Any]:
    colour = (BLUE, GREEN, ORANGE, INK)[place]
    return {"color": colour, "marker": "os^D"[place], "markersize": 4, "capsize": 3}


def _cross_out(
    axes: Axes,
    runs: Sequence[tuple[str, Summary]],
    at: Callable[[int, str, float], tuple[float, float]],
) -> None:
    """A cross on each percentile of a run that is not valid."""
    crosses = [
        at(place, name, 1e3 * value)
        for place, (_, one) in enumerate(runs)
        for name in LABELS
        if not one.valid and (value := one.latency_s[name]) is not None
    ]
    if crosses:
        x, y = zip(*crosses, strict=True)
        axes.plot(x, y, "x", color=INK, markersize=9, label="not valid")


def _percentile_rows(runs: Sequence[tuple[str, Summary]]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            number(one.offered_inferences_per_s),
            *(with_interval(one, key) for key in LABELS),
            "yes" if one.valid else "no",
        )
        for name, one in runs
    ]


def with_interval(summary: Summary, name: str) -> str:
    """A percentile and its interval in ms."""
    value, span = summary.latency_s[name], summary.latency_interval_s[name]
    if value is None or span is None:
        return "not enough samples"
    return f"{number(1e3 * value)} ({number(1e3 * span[0])} to {number(1e3 * span[1])})"
