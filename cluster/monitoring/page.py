"""docs/metrics.md, made from the one table: ``python -m cluster.monitoring.page``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deployments.metrics import SOURCES, Metric, rows

_HEAD = """\
# Metrics

<!-- Made by `python -m cluster.monitoring.page` from deployments/metrics.py; do not edit. -->

On a cluster all of them go through Ray's metrics agent, which adds the prefix `ray_` to the names
below; rules and dashboards have it. `datamix gpu-exporter` serves those of the GPUs without; the
configurations in [cluster/monitoring](../cluster/monitoring) add it. What to do with all of them
stands in [monitoring.md](monitoring.md).

Ray adds labels: `application`, `deployment` and `replica` to those of a replica, and
`NodeAddress`, `SessionName`, `WorkerId` and its own `Version` to all.

Histograms are added up in the replica and published once a second as gauges named `_bucket`, `_sum`
and `_count`: all three are exact, and `rate` and `histogram_quantile` take them as any others.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _HEAD
    for source, text in SOURCES.items():
        yield f"## {source.capitalize()}\n\n{text}\n"
        yield "| metric | kind | labels | meaning |\n|---|---|---|---|"
        yield from map(_row, rows(source))
        yield ""
    yield "## Buckets\n"
    buckets: dict[tuple[float, ...], list[str]] = {}
    for metric in rows(*SOURCES):
        if metric.buckets:
            buckets.setdefault(metric.buckets, []).append(f"`{metric.name}`")
    for bounds, names in buckets.items():
        yield f"- {', '.join(names)}: {', '.join(f'{bound:g}' for bound in bounds)}"
    yield ""


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "metrics.md"
    path.write_text(page())
    print(f"wrote {path}")
