"""The folder of a run, from its first second: what it was, what came, what it said.

run.json                 settings, command, machine, versions; before the first inference
results-<shard>.arrows   rows as they end (:mod:`edge.fleet.store`); gone once the run is whole
progress-<shard>.jsonl   counters and processor time, four times a second
samples.jsonl            the cloud's statistics, a line per answer
results.parquet          all rows, at the end
end.json                 what the shards counted, at the end
summary.json             the figures, last of all: a folder without it was cut off
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from datamix.errors import ConfigError
from edge.fleet.config import FleetConfig
from edge.fleet.stats import Sample

if TYPE_CHECKING:
    from edge.fleet.report import Run, Summary
    from edge.fleet.shard import Shard
    from edge.fleet.terms import Terms

FORMAT = 1
_SECRET = ("token", "second_token")
_PACKAGES = ("datamix-cluster", "numpy", "pyarrow", "picows", "uvloop")


class Recorder:
    """Writes what the parent of the shards knows."""

    def __init__(self, config: FleetConfig) -> None:
        """Make the folder ``config.out``.

        Raises:
            ConfigError: it is there already and not empty, or cannot be made.
        """
        from edge.fleet import store as store  # pyarrow: asked for before anything is sent

        self.folder = Path(config.out or "")
        self._config = config
        self._error: OSError | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise ConfigError(f"{self.folder} is not empty, expected a new folder for the run")
            (self.folder / "samples.jsonl").touch()
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be made: {error.strerror}") from None

    def begin(
        self,
        *,
        model: str,
        mode: str,
        rounds: int,
        group_size: int,
        start_s: float,
        terms: Terms | None,
    ) -> None:
        """Write what is known before the first inference falls due."""
        body = {
            "format": FORMAT,
            "config": settings(self._config),
            "model": model,
            "mode": mode,
            "rounds": rounds,
            "group_size": group_size,
            "terms": None if terms is None else _terms(terms),
            "start_s": start_s,
            "started_at": _wall(start_s).isoformat(timespec="milliseconds"),
            "command": [Path(sys.argv[0]).name, *map(_bare_word, sys.argv[1:])],
            "machine": machine(),
            "versions": versions(),
        }
        write_json(self.folder / "run.json", body)

    def sample(self, sample: Sample) -> None:
        """Keep one answer of the cloud's statistics; what goes wrong is said at the end."""
        try:
            # Opened anew each second: a run that fails leaves nothing open.
            with (self.folder / "samples.jsonl").open("a") as lines:
                lines.write(json.dumps(dataclasses.asdict(sample)) + "\n")
        except OSError as error:
            self._error = error

    def end(self, run: Run, summary: Summary) -> None:
        """Write the whole run, then drop what it was pieced together from.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            if self._error is not None:
                raise self._error
            self._end(run, summary)
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written: {error.strerror}, expected room for the run"
            ) from None

    def _end(self, run: Run, summary: Summary) -> None:
        from edge.fleet import store

        store.write_rows(self.folder, run.table)
        write_json(
            self.folder / "end.json",
            {
                "answered": run.answered.tolist(),
                "counters": dict(run.counters),
                "cpu_s": list(run.cpu_s),
                "busy_ratios": list(run.busy_ratios),
                "window_s": run.window_s,
                "elapsed_s": run.elapsed_s,
                "interrupted": run.interrupted,
                "start_error_s": run.start_error_s,
                "fault": run.fault,
                "offline": None if run.offline is None else dataclasses.asdict(run.offline),
            },
        )
        write_json(self.folder / "summary.json", summary.as_dict())
        # Of a shard that was lost, its stream is all there is.
        for path in () if run.fault else self.folder.glob("results-*.arrows"):
            path.unlink()


def recording(shard: Shard) -> contextlib.AbstractContextManager[None]:
    """Stream a shard's rows to the run's folder while the block runs; nothing where there is none.

    Raises:
        ConfigError: the folder cannot be written, before or while the run goes.
    """
    out = shard.config.out
    if out is None:
        return contextlib.nullcontext()
    from edge.fleet.store import RowStream, Streaming

    if not Path(out).is_dir():
        raise ConfigError(
            f"{out} is no folder where shard {shard.number} runs, expected one that the machines of"
            " all shards share"
        )
    loop = asyncio.get_running_loop()
    began_cpu_s = time.process_time()

    def tell() -> dict[str, Any]:
        counters = dataclasses.asdict(shard.counters)
        return {
            "elapsed_s": shard.elapsed_s,
            "cpu_s": time.process_time() - began_cpu_s,
            "counters": counters,
        }

    def end(error: Exception) -> None:
        loop.call_soon_threadsafe(shard.on_crash, error)

    rows = RowStream(Path(out), shard.number, lambda: shard.table, lambda: shard.begun, tell)
    return Streaming(rows, end)


def settings(config: FleetConfig) -> dict[str, Any]:
    """A run's settings as JSON knows them: without the token, and without a password in the URL."""
    body = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if item.name not in _SECRET
    }
    for name in ("url", "second"):
        if body[name] is not None:
            body[name] = _bare(body[name])
    body["doors"] = [_bare(door) for door in config.doors]
    plain: dict[str, Any] = json.loads(json.dumps(body, default=_plain))
    return plain


def machine() -> dict[str, Any]:
    """What the generator ran on."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what a run's figures depend on here; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _terms(terms: Terms) -> dict[str, Any]:
    """Terms as JSON; a bound that is none is None."""
    body = dataclasses.asdict(terms)
    if not math.isfinite(terms.promise.bits_per_input):
        body["promise"]["bits_per_input"] = None
    return body


def _bare_word(word: str) -> str:
    """A word of the command line; where it holds a URL, that without user and password."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{_bare(value) if '://' in value else value}"


def _bare(url: str) -> str:
    """A URL without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _wall(monotonic_s: float) -> datetime:
    return datetime.fromtimestamp(time.time() + monotonic_s - time.monotonic(), UTC)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
