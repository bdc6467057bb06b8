"""The plots of one run, in reading order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge.fleet.drawing import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    SHADE,
    Plot,
    above,
    draw,
    draw_figure,
    line_plot,
    number,
    or_nan,
    plain_ticks,
    tidy,
)
from edge.fleet.load_plots import with_interval
from edge.fleet.quantiles import LABELS
from edge.fleet.report import Summary
from edge.fleet.series import Series
from edge.fleet.waterfall import PARTS, REST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIME = "time in s"
_NAMES = {part: part.removesuffix("_s") for part in PARTS} | {REST: "network, waiting"}


def run_plots(summary: Summary, series: Series, salt: str = "") -> list[Plot]:
    """Every plot for which a run has something to show."""
    middle = [value + series.width_s / 2 for value in series.second]
    bin_name = "second" if series.width_s == 1 else f"{series.width_s:g} seconds"
    plots = [
        line_plot(
            "Latency over time",
            f"By the {bin_name} in which an inference was due; from the scheduled send to the "
            f"answer.{_warm_up_caption(summary)}",
            middle,
            [("p99", _ms(series.p99_s)), ("p50", _ms(series.p50_s))],
            (TIME, "latency in ms"),
            salt=f"{salt} latency",
            also=lambda axes: _marks(axes, summary),
        ),
        _distribution(summary, series, f"{salt} distribution"),
        line_plot(
            "Offered, answered, retried",
            "Where offered and answered part, a queue grows. Retries are in neither of them.",
            middle,
            [
                ("offered", series.offered),
                ("answered", series.answered),
                ("retried", series.retried),
            ],
            (TIME, "requests per s"),
            salt=f"{salt} offered",
        ),
    ]
    if summary.waterfall_s is not None and summary.waterfall_slowest_s is not None:
        plots.append(_waterfall(summary, f"{salt} waterfall"))
    if any(map(math.isfinite, series.batch_rows)):
        plots.append(
            line_plot(
                "Rows per batch",
                "How many mixtures, of whichever devices, the cloud computed at once.",
                middle,
                [("rows per batch", series.batch_rows)],
                (TIME, "rows"),
                salt=f"{salt} batch",
            )
        )
    if series.batches:
        plots.append(_batches(series, f"{salt} batches"))
    if any(map(math.isfinite, series.engine_busy)):
        plots.append(
            line_plot(
                "Engine use",
                f"Share of each {bin_name} in which the engine computed.",
                middle,
                [("engine busy", [100 * value for value in series.engine_busy])],
                (TIME, "% of time"),
                salt=f"{salt} busy",
            )
        )
    if series.failures:
        plots.append(
            line_plot(
                "Failures by kind",
                f"Inferences by the {bin_name} in which they were due that were not answered "
                f"right; a number is the HTTP status.",
                middle,
                list(series.failures.items()),
                (TIME, "inferences per s"),
                salt=f"{salt} failures",
            )
        )
    if len(summary.by_profile) > 1:
        plots.append(_profiles(summary, f"{salt} profiles"))
    return plots


def _waterfall(summary: Summary, salt: str) -> Plot:
    """Each part in a row of its own, beginning where the one before ended: no colours to tell."""
    columns = [
        ("mean", summary.waterfall_s or {}),
        ("mean of the slowest 1%", summary.waterfall_slowest_s or {}),
    ]
    names = list(_NAMES.values())

    def fill(figure: Any) -> None:
        for axes, (title, parts), colour, hatch in zip(
            figure.subplots(2, 1), columns, (BLUE, ORANGE), ("", "////"), strict=True
        ):
            tidy(axes)
            begin = 0.0
            widths = [1e3 * parts[part] for part in _NAMES]
            whole = sum(widths)
            for place, width in enumerate(widths):
                axes.barh(place, width, left=begin, color=colour, hatch=hatch, edgecolor=INK,
                          linewidth=0.5)  # fmt: skip
                begin += width
                axes.text(begin + 0.01 * whole, place, number(width), va="center", fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.invert_yaxis()
            axes.set_xlim(0, whole * 1.12 or 1)
            axes.set_title(f"{title}: {number(whole)} ms", fontsize=10, loc="left")
        axes.set_xlabel("ms after the scheduled send")

    rows = [
        (name, *(number(1e3 * parts[part]) for _, parts in columns))
        for part, name in _NAMES.items()
    ]
    alt = "Where an inference's time goes, in ms, mean: " + ", ".join(
        f"{name} {mean}" for name, mean, _ in rows
    )
    return Plot(
        "Where the time goes",
        draw_figure(fill, salt, alt, 5.0),
        "Parts of an answered inference, all rounds together, each beginning where the one before "
        "ends. Queue and compute are by the cloud's clock; what no part explains is network, "
        "waiting for a processor, and retries. A part that is neither run nor simulated is 0.",
        alt,
        ("part", "mean, ms", "slowest 1%, ms"),
        rows,
        tall=True,
    )


def _distribution(summary: Summary, series: Series, salt: str) -> Plot:
    points = series.latencies_s

    def fill(axes: Axes) -> None:
        axes.step(
            [latency_s * 1e3 for _, latency_s in points],
            [share * 100 for share, _ in points],
            where="post",
            color=BLUE,
        )
        axes.set_xlabel("latency in ms (logarithmic)")
        axes.set_ylabel("% of inferences")
        if points:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
        if summary.slo_s is not None:
            axes.axvline(summary.slo_s * 1e3, color=INK, linestyle=":")
            axes.text(summary.slo_s * 1e3, 3, "SLO ", fontsize=9, ha="right")
        axes.set_ylim(0, 102)

    rows = [
        (LABELS[name], with_interval(summary, name)) for name in LABELS
    ] + [("largest", number(1e3 * or_nan(summary.latency_s["max"])))]  # fmt: skip
    alt = "Distribution of the latency in ms: " + ", ".join(f"{a} {b}" for a, b in rows)
    return Plot(
        "How many wait how long",
        draw(fill, salt, alt),
        f"Share of inferences (vertical) that were done within a latency (horizontal)."
        f"{' Warm-up excluded.' if summary.warm_up_s else ''}",
        alt,
        ("percentile", "ms (95% interval)"),
        rows,
    )


def _batches(series: Series, salt: str) -> Plot:
    def fill(axes: Axes) -> None:
        axes.bar(
            [low for low, _, _ in series.batches],
            [100 * share for _, _, share in series.batches],
            width=[high - low for low, high, _ in series.batches],
            align="edge",
            color=BLUE,
            edgecolor=INK,
            linewidth=0.5,
        )
        axes.set_xlabel("rows of the batch that a request was in")
        axes.set_ylabel("% of inferences")

    rows = [
        (f"{number(low)} to below {number(high)}", number(100 * share))
        for low, high, share in series.batches
    ]
    most = max(series.batches, key=lambda one: one[2])
    alt = (
        f"Batch sizes: most often {number(most[0])} to below {number(most[1])} rows, in "
        f"{number(100 * most[2])}% of inferences."
    )
    return Plot(
        "Batch sizes",
        draw(fill, salt, alt),
        "As the responses tell it; a large batch has many requests, so it weighs more than in the "
        "mean per batch.",
        alt,
        ("rows", "% of inferences"),
        rows,
    )


def _profiles(summary: Summary, salt: str) -> Plot:
    names = [one["profile"] for one in summary.by_profile]

    def fill(axes: Axes) -> None:
        for shift, key, colour, hatch in ((-0.2, "p50", BLUE, ""), (0.2, "p99", ORANGE, "////")):
            values = [1e3 * or_nan(one["latency_s"][key]) for one in summary.by_profile]
            places = [place + shift for place in range(len(names))]
            axes.barh(places, values, height=0.38, color=colour, hatch=hatch, edgecolor=INK,
                      linewidth=0.5, label=key)  # fmt: skip
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("latency in ms")
        above(axes)

    rows = [
        (
            str(one["profile"]),
            str(one["devices"]),
            str(one["inferences"]),
            str(one["ok"]),
            *(number(1e3 * or_nan(one["latency_s"][key])) for key in LABELS),
        )
        for one in summary.by_profile
    ]
    alt = "Latency by profile of the device, p50 and p99 in ms: " + ", ".join(
        f"{row[0]} {row[4]} and {row[6]}" for row in rows
    )
    return Plot(
        "Devices by profile",
        draw(fill, salt, alt, max(2.0, 0.8 + 0.45 * len(names))),
        "A percentile of which a profile has too few samples is not there.",
        alt,
        ("profile", "devices", "inferences", "right", *(f"{one}, ms" for one in LABELS.values())),
        rows,
    )


def _marks(axes: Axes, summary: Summary) -> None:
    """Shade the warm-up and draw the SLO."""
    if summary.warm_up_s:
        axes.axvspan(0, summary.warm_up_s, facecolor=SHADE, edgecolor=FAINT, hatch="//")
    if summary.slo_s is not None:
        axes.axhline(summary.slo_s * 1e3, color=INK, linestyle=":", linewidth=1, label="SLO")


def _warm_up_caption(summary: Summary) -> str:
    if not summary.warm_up_s:
        return ""
    return f" The hatched first {summary.warm_up_s:g} s are warm-up: in no other latency here."


def _ms(values: Sequence[float]) -> list[float]:
    return [value * 1e3 for value in values]
