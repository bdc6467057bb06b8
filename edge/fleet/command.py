"""What ``datamix simulate`` does: run, show, write, and tell the truth in the exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from datamix.errors import ConfigError
from edge.fleet.config import FleetConfig
from edge.fleet.crew import Launch
from edge.fleet.processes import processes
from edge.fleet.run import FleetProgress, OnProgress, simulate
from edge.fleet.threshold import Threshold, exit_code
from edge.fleet.view import live_view, show

INTERRUPTED = 130


def run(
    config: FleetConfig,
    json_path: Path | None,
    html_path: Path | None,
    gates: Sequence[Threshold] = (),
    launch: Launch = processes,
    also: Sequence[OnProgress] = (),
) -> int:
    """Simulate and report; return the exit code. ``also`` are told of progress, too.

    0: valid, and every inference answered right. 1: the cloud failed some. 3: the figures are not
    the cloud's. 4: a gate was not passed. 130: interrupted (the report covers what was done).

    Raises:
        ConfigError: a setting that can't be met, known before anything is sent.
    """
    if html_path is not None and find_spec("matplotlib") is None:
        raise ConfigError("--html needs matplotlib, expected it installed (the extra 'report')")
    for path in (json_path, html_path):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is no folder, expected one to write {path.name} to")
    config.schedule()  # what makes none, such as a trace that can't be read, is said at once
    with live_view() as view:

        def on_progress(progress: FleetProgress) -> None:
            for tell in (view, *also):
                tell(progress)

        summary = simulate(config, on_progress, launch)
    show(summary)
    outcomes = [gate.judge(summary) for gate in gates]
    for outcome in outcomes:
        print(outcome)
    if json_path is not None:
        figures = summary.as_dict()
        if outcomes:
            figures["thresholds"] = [outcome.as_dict() for outcome in outcomes]
        json_path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    if html_path is not None:
        from edge.fleet.page import write_page

        write_page(html_path, summary, summary.series)
    return INTERRUPTED if summary.interrupted else exit_code(summary, outcomes)
