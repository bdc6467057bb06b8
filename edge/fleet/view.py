"""The live view of a run: a table that redraws itself in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from edge.fleet.profiles import STAGES
from edge.fleet.quantiles import LABELS, Intervals, Percentiles, missing
from edge.fleet.report import Summary
from edge.fleet.run import FleetProgress


@contextmanager
def live_view(console: Console | None = None) -> Iterator[Callable[[FleetProgress], None]]:
    """Show progress on stderr while the block runs; yields what ``simulate`` calls."""
    console = console or Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda progress: console.print(line(progress), markup=False, soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda progress: live.update(table(progress), refresh=True)


def line(progress: FleetProgress) -> str:
    """One line of progress."""
    counters = progress.counters
    if progress.phase == "connecting":
        return f"connecting: {progress.connected} of {progress.devices} devices"
    return (
        f"{progress.phase} {progress.elapsed_s:5.1f}/{progress.duration_s:g} s  "
        f"begun {counters['begun']}  ok {counters['ok']}  failed {counters['failed']}  "
        f"{progress.requests_per_s:.0f} requests/s  in flight {progress.in_flight}  "
        f"p50 {duration(progress.p50_s)}  p99 {duration(progress.p99_s)}"
    )


def table(progress: FleetProgress) -> Table:
    """Everything that moves, as a table."""
    counters = progress.counters
    view = Table(title=f"{progress.devices} devices, {progress.phase}", show_header=False)
    view.add_column(style="bold")
    view.add_column(justify="right", min_width=14)
    view.add_row("time", f"{progress.elapsed_s:.0f} of {progress.duration_s:g} s")
    view.add_row("connected", f"{progress.connected} of {progress.devices}")
    view.add_row("inferences begun / s", f"{progress.offered_per_s:.0f}")
    view.add_row("requests answered / s", f"{progress.requests_per_s:.0f}")
    view.add_row("in flight", str(progress.in_flight))
    view.add_row("ok / failed", f"{counters['ok']} / {counters['failed']}")
    view.add_row("retries", str(counters["retries"]))
    view.add_row("latency p50", duration(progress.p50_s))
    view.add_row("latency p99", duration(progress.p99_s))
    view.add_row("batch rows", number(progress.batch_rows_mean))
    view.add_row("engine busy", share(progress.engine_busy_ratio))
    view.add_row("generator cores", f"{progress.generator_cpu_ratio:.2f}")
    return view


def rows(summary: Summary) -> list[tuple[str, str]]:
    """Name and figure of everything a summary says, in reading order."""
    failed = ", ".join(f"{count} {status}" for status, count in sorted(summary.failed.items()))
    cpu_s = summary.generator_cpu_s_per_request
    figures = [
        ("valid", "yes" if summary.valid else f"NO: {summary.invalid_reason}"),
        ("privacy", summary.privacy),
        ("devices", f"{summary.clients} in {summary.processes} processes"),
        ("workload", f"{summary.workload}, mode {summary.mode}, model {summary.model}"),
        ("an inference", f"{summary.group_size} rows, {summary.rounds} rounds"),
        ("ran for", f"{summary.duration_s:.1f} s, the last answer after {summary.elapsed_s:.1f} s"),
        ("arrivals", f"{summary.arrivals}, {summary.loop} loop"),
        (
            "offered" if summary.loop == "open" else "asked (CLOSED LOOP: a slow cloud less)",
            f"{summary.offered_rate:.1f} requests/s",
        ),
        ("retried", f"{summary.retried_rate:.1f} requests/s, beside the offered"),
        ("throughput", f"{summary.throughput:.1f} requests/s, {summary.rows_per_s:.0f} rows/s"),
        ("inferences answered right", f"{summary.ok} of {summary.inferences}"),
        ("goodput", goodput(summary)),
        ("failed", failed or "0"),
        ("wrong", str(summary.wrong) if summary.verified else "not verified"),
        ("unsent", str(summary.unsent)),
        ("retries, moved, reconnects", f"{summary.retries}, {summary.moved}, {summary.reconnects}"),
        (
            "duplicate, misrouted, unmatched, unreadable, late",
            f"{summary.duplicates}, {summary.misrouted}, {summary.unmatched}, "
            f"{summary.unreadable}, {summary.late}",
        ),
        ("latency from schedule", percentile_text(summary.latency_s, summary.latency_interval_s)),
        (
            "latency from send",
            percentile_text(summary.latency_from_send_s, summary.latency_from_send_interval_s),
        ),
        ("generator lag", percentile_text(summary.generator_lag_s)),
        (
            "in the cloud, mean",
            f"queue {duration(summary.queue_s)}, compute {duration(summary.compute_s)}",
        ),
        ("batch rows, mean", number(summary.batch_rows_mean)),
        ("engine busy", share(summary.engine_busy_ratio)),
        ("generator CPU per request", "-" if cpu_s is None else f"{cpu_s * 1e6:.0f} us"),
        (
            "bytes per input",
            f"{_kb(summary.bytes_up_per_input)} up, {_kb(summary.bytes_down_per_input)} down",
        ),
    ]
    if summary.warm_up_s:
        figures.insert(
            5,
            (
                "warm-up",
                f"{summary.warm_up_inferences} inferences due in the first "
                f"{summary.warm_up_s:g} s are in no latency; they count everywhere else",
            ),
        )
    if summary.profiles:
        kinds = ", ".join(f"{kind['share']:.0%} {kind['name']}" for kind in summary.profiles)
        figures.append(("profiles", kinds))
        steps = {step: getattr(summary, step) for step in STAGES}
        figures.append(("on the device", ", ".join(f"{k}: {v}" for k, v in steps.items())))
    if summary.cancelled:
        figures.append(("cancelled by the device", str(summary.cancelled)))
    if summary.left or summary.dropped:
        figures.append(
            ("devices left, came, dropped", f"{summary.left}, {summary.came}, {summary.dropped}")
        )
    if summary.stopped:
        figures.insert(1, ("interrupted", f"{summary.stopped} inferences under way were given up"))
    if summary.accuracy_cloud is not None:
        local = share(summary.accuracy_local)
        figures.append(("accuracy", f"{share(summary.accuracy_cloud)} (computed locally: {local})"))
        if summary.accuracy_edge_only is not None:
            figures.append(("accuracy without any cloud", share(summary.accuracy_edge_only)))
    return figures + offline_rows(summary)


def offline_rows(summary: Summary) -> list[tuple[str, str]]:
    """What was asked of operator B, ahead of the inferences; nothing but in the mode split."""
    if summary.masks_fetched is None:
        return []
    up, down = summary.offline_bytes_up_per_input, summary.offline_bytes_down_per_input
    return [
        (
            "masks from operator B",
            f"{summary.masks_fetched} groups fetched, {summary.masks_used} used, "
            f"{summary.masks_waited} inferences waited",
        ),
        (
            "requests to operator B, retries",
            f"{summary.offline_requests}, {summary.offline_retries}",
        ),
        ("bytes per input, ahead", f"{_kb(up)} up, {_kb(down)} down"),
    ]


def show(summary: Summary, console: Console | None = None, title: str = "Fleet") -> None:
    """Print the report of a run."""
    console = console or Console()
    view = Table(title=title, show_header=False, title_justify="left")
    view.add_column(style="bold")
    view.add_column()
    for name, figure in rows(summary):
        view.add_row(name, figure)
    console.print(view)


def overview(runs: Sequence[tuple[str, Summary]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table with a line per run."""
    head = ["run", "valid", "offered/s", "goodput/s", "right", "p50", "p99", "batch rows", "engine"]
    lines = []
    for name, one in runs:
        tails = [percentile_cell(one, key) for key in ("p50", "p99")]
        lines.append(
            [
                name,
                "yes" if one.valid else "NO",
                number(one.offered_inferences_per_s),
                number(one.goodput_inferences_per_s),
                f"{one.ok} of {one.inferences}",
                *tails,
                number(one.batch_rows_mean),
                share(one.engine_busy_ratio),
            ]
        )
    return head, lines


def show_overview(runs: Sequence[tuple[str, Summary]], console: Console | None = None) -> None:
    """Print a line per run."""
    head, lines = overview(runs)
    view = Table(*head, title="Runs (per second: inferences)", title_justify="left")
    for line_of_cells in lines:
        view.add_row(*line_of_cells)
    (console or Console()).print(view)


def percentile_cell(summary: Summary, key: str) -> str:
    """One percentile from the schedule with its interval."""
    value, span = summary.latency_s[key], summary.latency_interval_s[key]
    if value is None or span is None:
        return "not enough samples"
    return f"{duration(value)} ({interval(*span)})"


def goodput(summary: Summary) -> str:
    """What was of use: answered right, and within the SLO where there is one."""
    rate = f"{summary.goodput_inferences_per_s:.1f} inferences/s answered right"
    if summary.slo_s is None or summary.within_slo is None:
        return f"{rate} (no SLO)"
    met = share(summary.within_slo / summary.inferences if summary.inferences else None)
    return f"{rate} within {duration(summary.slo_s)}; {met} of all that fell due"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def number(value: float | None) -> str:
    """A figure with one decimal, or a dash."""
    return "-" if value is None else f"{value:.1f}"


def share(value: float | None) -> str:
    """A ratio as percent, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def percentile_text(figures: Percentiles, spans: Intervals | None = None) -> str:
    """Percentiles in one line; what too few samples can't say is said so.

    ``spans`` are their 95% intervals, shown in brackets.
    """
    known = []
    for key, label in LABELS.items():
        if figures[key] is not None:
            text = f"{label} {duration(figures[key])}"
            if spans is not None and (span := spans[key]) is not None:
                text += f" ({interval(*span)})"
            known.append(text)
    unknown = missing(figures)
    if unknown:
        known.append(f"{' '.join(unknown)}: not enough samples")
    return ", ".join(known)


def interval(low_s: float, high_s: float) -> str:
    """Two durations as ``low to high``, the unit said once."""
    if low_s < 1 <= high_s:
        return f"{low_s:.2f} to {high_s:.2f} s"
    unit = duration(high_s).rpartition(" ")[2]
    return f"{duration(low_s).removesuffix(unit).strip()} to {duration(high_s)}"


def _kb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.1f} kB"
