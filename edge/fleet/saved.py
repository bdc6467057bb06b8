"""A run read back from its folder, whole or cut off."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamix.errors import ConfigError
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.counters import Counters
from edge.fleet.offline import OfflineTraffic
from edge.fleet.profiles import from_dict
from edge.fleet.recorder import FORMAT
from edge.fleet.report import Run
from edge.fleet.stats import Sample
from edge.fleet.store import read_progress, read_rows
from edge.fleet.terms import Terms
from edge.promises import Promise

# What a summary reads of the settings. The others may name files of the machine that ran.
_SETTINGS = (
    "url", "bundle", "workload", "verify", "devices", "rate", "duration_s", "seed", "processes",
    "timeout_s", "warm_up_s", "slo_s", "pacer", "precompute",
)  # fmt: skip


def load_run(folder: str | Path) -> Run:
    """Read what ``datamix simulate --out`` wrote.

    A folder without ``summary.json`` was cut off: the run then holds what the shards had streamed,
    and its summary says that it is not valid.

    Raises:
        ConfigError: it is no folder of a run.
    """
    folder = Path(folder)
    about = _read(folder / "run.json")
    if about.get("format") != FORMAT:
        raise ConfigError(
            f"{folder.name}/run.json has format {about.get('format')!r}, expected {FORMAT}"
        )
    whole = (folder / "summary.json").exists()
    table = read_rows(folder)
    samples = _samples(folder)
    try:
        config = FleetConfig(
            **{name: about["config"][name] for name in _SETTINGS},
            profiles=tuple(map(from_dict, about["config"]["profiles"])),
        )
        known: dict[str, Any] = {
            "config": config,
            "model": str(about["model"]),
            "mode": str(about["mode"]),
            "rounds": int(about["rounds"]),
            "group_size": int(about["group_size"]),
            "start_s": float(about["start_s"]),
            "terms": _terms(about["terms"]),
            "table": table,
            "samples": samples,
        }
        return Run(**known, **(_end(folder) if whole else _cut_off(folder, config, known)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder.name} is no record of a run: {error!r}") from None


def about(folder: str | Path) -> list[tuple[str, str]]:
    """Name and text of how, when and where a run was made.

    Raises:
        ConfigError: it is no folder of a run.
    """
    body = _read(Path(folder) / "run.json")
    lines = [("started at", body.get("started_at")), ("command", body.get("command"))]
    for key in ("machine", "versions", "config"):
        found = body.get(key)
        lines += sorted(found.items()) if isinstance(found, dict) else []
    return [
        (str(name), shlex.join(map(str, value)) if name == "command" and value else str(value))
        for name, value in lines
        if value is not None
    ]


def _end(folder: Path) -> dict[str, Any]:
    body = _read(folder / "end.json")
    return {
        "answered": np.array(body["answered"], np.int64).reshape(-1, 2),
        "counters": {name: int(count) for name, count in body["counters"].items()},
        "cpu_s": [float(value) for value in body["cpu_s"]],
        "busy_ratios": [float(value) for value in body["busy_ratios"]],
        "window_s": float(body["window_s"]),
        "elapsed_s": float(body["elapsed_s"]),
        "interrupted": bool(body["interrupted"]),
        "start_error_s": float(body["start_error_s"]),
        "fault": None if body["fault"] is None else str(body["fault"]),
        "offline": None if body["offline"] is None else OfflineTraffic(**body["offline"]),
    }


def _cut_off(folder: Path, config: FleetConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """Piece together what the end would have said, from the shards' last lines."""
    table: result.Table = known["table"]
    lines = list(read_progress(folder).values())
    names = Counters.__slots__
    counters = {name: sum(line["counters"][name] for line in lines) for name in names}
    elapsed_s = max([0.0, *(float(line["elapsed_s"]) for line in lines)])
    window_s = min(config.duration_s, elapsed_s)
    cpu_s = [float(line["cpu_s"]) for line in lines]
    rounds = table["rounds"].astype(np.int64)
    answered = np.zeros((int(elapsed_s) + 1, 2), np.int64)
    seconds = np.clip(np.nan_to_num(table["done_s"]), 0, int(elapsed_s)).astype(np.int64)
    np.add.at(answered[:, 0], seconds, rounds)
    np.add.at(answered[:, 1], seconds, rounds * table["rows"])
    return {
        "answered": answered,
        "counters": counters,
        "cpu_s": cpu_s,
        "busy_ratios": [value / max(elapsed_s, 1e-9) for value in cpu_s],
        "window_s": window_s,
        "elapsed_s": elapsed_s,
        "interrupted": True,
        "lost": max(0, counters["begun"] - len(table)),
    }


def _terms(body: Mapping[str, Any] | None) -> Terms | None:
    if body is None:
        return None
    bits = body["promise"]["bits_per_input"]
    promise = Promise(**{**body["promise"], "bits_per_input": math.inf if bits is None else bits})
    return Terms(**{**body, "promise": promise})


def _samples(folder: Path) -> list[Sample]:
    found: list[Sample] = []
    path = folder / "samples.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Sample(**json.loads(line)))
        except (TypeError, ValueError):
            break  # torn
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path.parent} is no record of a run: {path.name}: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path.parent.name}/{path.name} is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(
            f"{path.parent.name}/{path.name} is {type(body).__name__}, expected an object"
        )
    return body
