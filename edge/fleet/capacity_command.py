"""What ``datamix capacity`` and ``datamix scenario`` do: run, show, write, and resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from datamix.errors import ConfigError
from edge.fleet.capacity import Capacity, Fleet, Probe, measure
from edge.fleet.capacity_view import probe_line, show_capacity, show_closed, step_line
from edge.fleet.config import FleetConfig
from edge.fleet.run import FleetProgress
from edge.fleet.scenario import Scenario, run_scenario
from edge.fleet.search import Plan
from edge.fleet.view import live_view

INTERRUPTED = 130
_VERSION = 1


def run_capacity(
    fleet: Fleet,
    plan: Plan,
    *,
    seed: int = 0,
    json_path: Path | None = None,
    resume: bool = False,
) -> int:
    """Search, show and write; return the exit code.

    0: found, or all that was asked for is carried. 1: not even the least rate. 3: not known, as
    the generator or the number of probes was the limit. 130: interrupted; what is known is shown.

    Args:
        fleet: the devices.
        plan: the objective, and how to search.
        seed: of the schedules.
        json_path: where the result goes, after each probe.
        resume: go on from the probes in that file.

    Raises:
        ConfigError: a setting, or a file of another search.
    """
    _check_folder(json_path)
    if resume and json_path is None:
        raise ConfigError("--resume came without --json, expected the file to go on from")
    setting = settings(fleet, plan, seed)
    before = load_probes(json_path, setting) if resume and json_path is not None else []
    console = Console(stderr=True)

    def on_probe(found: Capacity) -> None:
        console.print(probe_line(found.probes[-1]), markup=False, highlight=False, soft_wrap=True)
        if json_path is not None:
            write(json_path, found, setting)

    with live_view(console) as live:

        def on_progress(progress: FleetProgress) -> None:
            if console.is_terminal:  # elsewhere a line per probe is enough
                live(progress)

        found = measure(
            fleet,
            plan,
            seed=seed,
            before=before,
            on_probe=on_probe,
            on_step=lambda step, known: console.print(
                step_line(step, known), markup=False, highlight=False, soft_wrap=True
            ),
            on_progress=on_progress,
        )
    show_capacity(found, Console())
    if json_path is not None:
        write(json_path, found, setting)
    return found.exit_code


def settings(fleet: Fleet, plan: Plan, seed: int) -> dict[str, Any]:
    """What two searches must have in common for the probes of one to count in the other."""
    base = fleet.base
    return {
        "version": _VERSION,
        "url": base.base_url,
        "bundle": base.bundle,
        "workload": base.workload,
        "mode": base.mode,
        "second": base.second,
        "arrivals": base.pacer,
        "profiles": [str(profile) for profile in base.profiles],
        "rows": base.rows,
        "objective": str(plan.objective),
        "rate_per_device": fleet.rate_per_device,
        "most_streams": fleet.most_streams,
        "timeout_s": fleet.timeout_s,
        "seed": seed,
    }


def write(path: Path, found: Capacity, setting: dict[str, Any]) -> None:
    """Write a result whole or not at all: a search may be cut short at any time."""
    text = json.dumps({"settings": setting, **found.as_dict()}, indent=1, allow_nan=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text + "\n")
    beside.replace(path)


def load_probes(path: Path, setting: dict[str, Any]) -> list[Probe]:
    """Read the probes of a search that was cut short.

    Raises:
        ConfigError: there is no such file, it is no result, or of another search.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist, expected a result to go on from") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}), expected a result") from None
    if not isinstance(found, dict) or not isinstance(found.get("probes"), list):
        raise ConfigError(f"{path} holds no probes, expected a result of datamix capacity")
    before = found.get("settings")
    if not isinstance(before, dict) or before != setting:
        keys = setting if not isinstance(before, dict) else setting.keys() | before.keys()
        other = [
            key
            for key in sorted(keys)
            if not isinstance(before, dict) or before.get(key) != setting.get(key)
        ]
        raise ConfigError(f"{path} is of another search: {', '.join(other)} differ")
    return [Probe.from_dict(one) for one in found["probes"]]


def run_closed(
    scenario: Scenario, config: FleetConfig, duration_s: float, json_path: Path | None
) -> int:
    """Run a closed loop, show and write; return the exit code.

    0: valid, and all answered right. 1: the cloud failed some. 3: not valid. 130: interrupted.
    """
    _check_folder(json_path)
    found = run_scenario(scenario, config, duration_s)
    show_closed(found, Console())
    if json_path is not None:
        text = json.dumps(found.as_dict(), indent=1, allow_nan=False)
        json_path.write_text(text + "\n")
    return INTERRUPTED if found.interrupted else found.exit_code


def default_timeout_s(latency_s: float) -> float:
    """After how long an inference of a probe has failed: four times the objective, or a second."""
    return max(1.0, 4 * latency_s)


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder, expected one to write {path.name} to")
