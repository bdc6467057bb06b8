"""The plots of one run, and of several against their load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge.fleet.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    SHADE,
    Plot,
    above,
    draw,
    draw_figure,
    line_plot,
    number,
    tidy,
)
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
    if len(summary.profiles) > 1:
        plots.append(_profiles(summary, f"{salt} profiles"))
    return plots


def load_plots(runs: Sequence[tuple[str, Summary]]) -> list[Plot]:
    """Percentiles, goodput and use of several runs against what they offered."""
    runs = sorted(runs, key=lambda run: run[1].offered_inferences_per_s)
    offered = [summary.offered_inferences_per_s for _, summary in runs]
    joined = len({(one.workload, one.model, one.mode) for _, one in runs}) == 1
    x_label = "offered inferences per s"

    def values(name: str) -> list[float]:
        return [_or_nan(summary.latency_s[name]) * 1e3 for _, summary in runs]

    def spans(name: str) -> list[tuple[float, float]]:
        found = [summary.latency_interval_s[name] for _, summary in runs]
        return [(math.nan, math.nan) if s is None else (s[0] * 1e3, s[1] * 1e3) for s in found]

    known = [name for name in LABELS if any(map(math.isfinite, values(name)))]

    def fill(axes: Axes) -> None:
        for place, name in enumerate(known):
            middle, span = values(name), spans(name)
            low = [a - b for a, (b, _) in zip(middle, span, strict=True)]
            high = [b - a for a, (_, b) in zip(middle, span, strict=True)]
            axes.errorbar(
                offered,
                middle,
                yerr=[low, high],
                color=(BLUE, GREEN, ORANGE, INK)[place],
                linestyle=("-", "-.", "--", ":")[place] if joined else "",
                marker="os^D"[place],
                markersize=4,
                capsize=3,
                label=LABELS[name],
            )
        invalid = [place for place, (_, one) in enumerate(runs) if not one.valid]
        marked = [
            (offered[place], values(name)[place])
            for place in invalid
            for name in known
            if math.isfinite(values(name)[place])
        ]
        if marked:
            axes.plot(*zip(*marked, strict=True), "x", color=INK, markersize=9, label="not valid")
        axes.set_xlabel(x_label)
        axes.set_ylabel("latency in ms (logarithmic)")
        axes.set_xlim(0, 1.08 * max(offered) or 1)
        if known:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
            above(axes)

    rows = [
        (
            name,
            number(one.offered_inferences_per_s),
            *(_with_interval(one, key) for key in LABELS),
            "yes" if one.valid else "no",
        )
        for name, one in runs
    ]
    alt = "Percentiles of the latency in ms against the offered load; the table has the numbers."
    return [
        Plot(
            "Percentiles against load",
            draw(fill, "load", alt),
            "From the scheduled send to the answer, a mark per run and percentile, with its 95% "
            "interval. A percentile of which a run has too few samples is not there.",
            alt,
            ("run", x_label, *(f"{label}, ms" for label in LABELS.values()), "valid"),
            rows,
        ),
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
        ),
        line_plot(
            "Use against load",
            "Share of time in which the engines computed, and cores of the busiest generator "
            "process.",
            offered,
            [
                ("engine busy", [100 * _or_nan(one.engine_busy_ratio) for _, one in runs]),
                ("generator", [100 * one.generator_cpu_ratio for _, one in runs]),
            ],
            (x_label, "% of time"),
            salt="load use",
        ),
    ]


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
            _plain_ticks(axes.xaxis)
        if summary.slo_s is not None:
            axes.axvline(summary.slo_s * 1e3, color=INK, linestyle=":")
            axes.text(summary.slo_s * 1e3, 3, "SLO ", fontsize=9, ha="right")
        axes.set_ylim(0, 102)

    rows = [
        (LABELS[name], _with_interval(summary, name)) for name in LABELS
    ] + [("largest", number(1e3 * _or_nan(summary.latency_s["max"])))]  # fmt: skip
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
    names = [one["profile"] for one in summary.profiles]

    def fill(axes: Axes) -> None:
        for shift, key, colour, hatch in ((-0.2, "p50", BLUE, ""), (0.2, "p99", ORANGE, "////")):
            values = [1e3 * _or_nan(one["latency_s"][key]) for one in summary.profiles]
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
            *(number(1e3 * _or_nan(one["latency_s"][key])) for key in LABELS),
        )
        for one in summary.profiles
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


def _plain_ticks(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _with_interval(summary: Summary, name: str) -> str:
    value, span = summary.latency_s[name], summary.latency_interval_s[name]
    if value is None or span is None:
        return "not enough samples"
    return f"{number(1e3 * value)} ({number(1e3 * span[0])} to {number(1e3 * span[1])})"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ms(values: Sequence[float]) -> list[float]:
    return [value * 1e3 for value in values]
