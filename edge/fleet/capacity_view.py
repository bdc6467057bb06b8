"""A capacity and a closed loop, as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from edge.fleet.capacity import Capacity, Probe
from edge.fleet.scenario import ClosedReport
from edge.fleet.search import Estimate, Step
from edge.fleet.view import duration, share

_ENDED = {
    "found": "the interval is as narrow as asked for",
    "probes": "the number of probes is used up",
    "top": "all that was asked for is carried; the cloud may carry more",
    "bottom": "not even the least rate meets the objective",
    "elsewhere": "devices or links alone take longer than the objective, whatever the load",
    "generator": "the generator is the limit, so nothing is known beyond",
    "streams": "no more devices were connected",
    "interrupted": "it was interrupted",
}


def step_line(step: Step, known: Estimate | None) -> str:
    """What comes next, on one line."""
    text = f"trying {step.rate:.4g} inferences/s for up to {step.rules.duration_s:.0f} s"
    if known is not None and known.rate is not None:
        text += f"; believed {known.rate:.4g} ({known.low:.4g} to {known.high:.4g})"
    return text


def probe_line(probe: Probe) -> str:
    """What a probe said, on one line."""
    verdict = probe.tried.verdict
    return (
        f"{probe.tried.rate:10.4g}/s  {verdict.answer:4}  late {verdict.late} of "
        f"{verdict.inferences} (truly {share(verdict.low)} to {share(verdict.high)})  "
        f"p99 {duration(probe.latency_s.get('p99'))}  engine busy {share(probe.engine_busy)}"
        f"{'' if probe.valid else '  INVALID: the generator lagged'}"
    )


def rows(found: Capacity) -> list[tuple[str, str]]:
    """Name and figure of all that a search says."""
    if found.rate is None:
        devices = f"at least {found.devices_low:,}"
        rate = f"at least {found.rate_low:.4g} inferences/s"
        if found.devices_high is not None:
            devices = f"fewer than {found.devices_high:,}"
            rate = f"less than {found.rate_high:.4g} inferences/s"
    else:
        devices = f"{found.devices:,} ({found.devices_low:,} to {found.devices_high or 0:,})"
        rate = f"{found.rate:.4g} inferences/s ({found.rate_low:.4g} to {found.rate_high:.4g})"
    return [
        ("devices", f"{devices}, each {found.rate_per_device:g} inferences/s"),
        ("rate", rate),
        ("model", f"{found.model}, mode {found.mode}"),
        ("privacy", found.privacy),
        ("objective", f"{found.objective}, refusals and failures count as late"),
        ("passed by its own test", _rate(found.passed_rate)),
        ("failed by its own test", _rate(found.failed_rate)),
        ("what limits it", f"{found.limit.name}: {found.limit.sentence}"),
        ("ended", _ENDED[found.ended]),
    ]


def show_capacity(found: Capacity, console: Console) -> None:
    """Print the probes and the answer."""
    table = Table(title="Probes", title_justify="left", pad_edge=False)
    for column in ("rate/s", "devices", "late", "truly", "p99", "lag", "busy", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for probe in sorted(found.probes, key=lambda one: one.tried.rate):
        verdict = probe.tried.verdict
        table.add_row(
            f"{probe.tried.rate:.4g}",
            f"{probe.devices:,}",
            share(verdict.late / max(1, verdict.inferences)),
            f"{share(verdict.low)} to {share(verdict.high)}",
            duration(probe.latency_s.get("p99")),
            duration(probe.lag_s),
            "-" if probe.engine_busy is None else f"{probe.engine_busy:.0%}",
            "-" if probe.batch_rows is None else f"{probe.batch_rows:.0f}",
            verdict.answer if probe.valid else "INVALID",
        )
    console.print(table)
    _figures("Capacity", rows(found), console)


def show_closed(found: ClosedReport, console: Console) -> None:
    """Print a closed loop's report."""
    low, high = found.inferences_per_s_low, found.inferences_per_s_high
    interval = "" if low is None or high is None else f" ({low:.1f} to {high:.1f} with 95%)"
    percentiles = ", ".join(
        f"{name} {duration(value)}" for name, value in found.latency_s.items() if value is not None
    )
    figures = [
        ("valid", "yes" if found.valid else f"NO: {found.invalid_reason}"),
        ("loop", "closed: nothing is asked while the cloud is slow; no figure for an open load"),
        ("queries", f"{found.queries} of {found.per_query} inferences, {found.lanes} at once"),
        ("failed", ", ".join(f"{n} {why}" for why, n in sorted(found.failed.items())) or "0"),
        ("latency of a query", percentiles or "-"),
        ("throughput", f"{found.inferences_per_s:.1f} inferences/s{interval}"),
        ("rows", f"{found.rows_per_s:.0f} rows/s and round"),
        ("generator", f"{found.generator_cpu_ratio:.0%} of a core"),
        ("privacy", found.privacy),
    ]
    if found.quantile is not None:
        bound = "-, too few queries" if found.bound_s is None else duration(found.bound_s)
        text = f"{bound} (below it with 99%; {found.left_out or 0} slower queries left out)"
        figures.insert(1, (f"p{found.quantile * 100:g}, early stopping", text))
    _figures(found.scenario, figures, console)


def _figures(title: str, figures: list[tuple[str, str]], console: Console) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, figure in figures:
        table.add_row(name, figure)
    console.print(table)


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.4g} inferences/s"
