"""Finished trials in a file, one JSON object a line, so that a killed search loses none of them.

The first line says what the trials belong to. A line is written in one call and synced before the
search goes on; what a crash left half written at the end is cut off on opening.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datamix.errors import ConfigError
from edge.closing import Closing
from edge.search.space import Candidate
from edge.search.trial import Measured, Outcome, Trial

_MAX_BYTES = 64 << 20
"""Of a file that is read back; ten thousand trials are about 5 MB."""


class Journal(Closing):
    """The trials of one search; a context manager that holds the file for itself.

    Attributes:
        done: what is finished, by trial.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open ``path``, or make it.

        Args:
            path: the file.
            settings: what accuracies depend on besides the trial: data, group size and so on.

        Raises:
            ConfigError: another search holds the file, it is of other settings, or it is broken.
        """
        self.done: dict[Trial, Outcome] = {}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock(path)
            self._read(path, json.loads(json.dumps(settings)))
        except BaseException:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Close the file, which lets go of it; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def add(self, outcome: Outcome) -> None:
        """Keep a finished trial; one that failed is not kept, so the next run tries it again."""
        if outcome.measured is None:
            return
        self._append(asdict(outcome))
        self.done[outcome.trial] = outcome

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path} is held by another search, expected one at a time") from None

    def _read(self, path: Path, settings: Any) -> None:
        size = os.fstat(self._descriptor).st_size
        if size > _MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes, expected at most {_MAX_BYTES}")
        body = os.pread(self._descriptor, size, 0)
        whole = body.rfind(b"\n") + 1
        if not whole and _line({"settings": settings}).startswith(body):  # new, or cut while new
            os.ftruncate(self._descriptor, 0)
            self._append({"settings": settings})
            return
        lines = body[:whole].splitlines() or [body]
        try:
            found = dict(json.loads(lines[0])["settings"])
            outcomes = [_from_json(json.loads(line)) for line in lines[1:]]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is no journal of a search: {error!r}") from None
        os.ftruncate(self._descriptor, whole)  # only now that the file is known to be ours
        if found != settings:
            keys = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
            raise ConfigError(
                f"{path} is of a search with other settings ({', '.join(keys)});"
                " give the same ones, or another folder"
            )
        self.done = {outcome.trial: outcome for outcome in outcomes}

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = _line(entry)
        written = os.write(self._descriptor, line)
        if written < len(line):
            raise OSError(f"{written} of {len(line)} bytes written to the journal of trials")
        os.fsync(self._descriptor)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _from_json(entry: Mapping[str, Any]) -> Outcome:
    trial, measured = entry["trial"], entry["measured"]
    candidate = trial["candidate"]
    options = tuple((str(name), value) for name, value in candidate["options"])
    if not all(isinstance(value, int | str) for _, value in options):
        raise ValueError("an option is neither a number nor text")
    accuracy, n = float(measured["accuracy"]), int(measured["n"])
    if not (0 <= accuracy <= 1 and n > 0):
        raise ValueError(f"accuracy is {accuracy} of {n}")
    return Outcome(
        Trial(
            Candidate(str(candidate["architecture"]), options),
            float(trial["seconds"]),
            int(trial["seed"]),
        ),
        Measured(accuracy, n),
        None,
        float(entry["cpu_s"]),
        float(entry["wall_s"]),
    )
