"""Measured rows and the file that keeps them: ``docs/results.json``, one object per row."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from datamix.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Row:
    """One network, measured at one group size. Accuracies and shares are 0 to 1.

    Attributes:
        dataset: whose test split.
        method: see :data:`edge.methods.METHODS`.
        rounds: trips to the cloud per inference.
        group_size: K; 1 where nothing is mixed.
        seed: of the training.
        accuracy: as deployed: mixed, if the method mixes, features in float16 on the wire.
        accuracy_unmixed: of the baseline ``unmixed``: the same sizes, seed and budget, with a
            non-linear cloud that sees everything; None until there is its row.
        accuracy_edge_only: of the same stem with a head of its own, same seed and budget; None
            until there is its row.
        edge_flops_share: the device's share of FLOPs, mixing included.
        bytes_per_inference: feature values on the wire in float16, both ways, without framing.
        command: what to run for this row.
        commit: of the code, with ``+`` where files were changed.
        seconds: of the training, by the clock on the wall.
        label: the arm of the experiment; tells rows apart that have the same method.
        preset: the experiment.
        accuracy_same_weights: this network, unmixed and unrounded.
        accuracy_float32: as deployed, but float32 on the wire.
        accuracy_int8: as deployed, but int8 on the wire.
        accuracy_validation: on the inputs held out of training, mixed; None if none were.
        edge_flops_share_collapsed: against blocks at their cheapest.
        edge_flops: of the device per inference, mixing included.
        cloud_flops: of the cloud per inference, layer by layer.
        round_trips: to the cloud per inference.
        law: of the mixing matrices.
        noise_sigma: on the mixtures.
        architecture: its name.
        options: its options.
        parameters: of the whole network.
        budget: what each training could spend.
        epochs: passes over the data.
        steps: of training.
        cpu_seconds: of training.
        threads: of training.
        inputs: how many were learnt from, and tested, each.
        machine: what it was trained on.
        versions: of Python and packages.
        settings: sha256 of all settings of the training, to know whether a row is still theirs.
        bits_per_input: most that the cloud learns of one input, all rounds together; None where
            there is no noise, and so no bound.
    """

    dataset: str
    method: str
    rounds: int
    group_size: int
    seed: int
    accuracy: float
    accuracy_unmixed: float | None
    accuracy_edge_only: float | None
    edge_flops_share: float
    bytes_per_inference: int
    command: str
    commit: str
    seconds: float
    label: str = ""
    preset: str = ""
    accuracy_same_weights: float | None = None
    accuracy_float32: float | None = None
    accuracy_int8: float | None = None
    accuracy_validation: float | None = None
    edge_flops_share_collapsed: float = 1.0
    edge_flops: int = 0
    cloud_flops: int = 0
    round_trips: int = 0
    law: str = "haar"
    noise_sigma: float = 0.0
    architecture: str = ""
    options: Mapping[str, int | str] = field(default_factory=dict)
    parameters: int = 0
    budget: str = ""
    epochs: float = 0.0
    steps: int = 0
    cpu_seconds: float = 0.0
    threads: int = 1
    inputs: tuple[int, int] = (0, 0)
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    bits_per_input: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What a row is about; a newer measurement of the same replaces it."""
        return (
            self.dataset,
            self.label or self.method,
            self.method,
            self.architecture,
            json.dumps(dict(self.options), sort_keys=True),
            self.group_size,
            self.law,
            self.noise_sigma,
            self.seed,
            self.budget,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """From one object of the file.

        Raises:
            ConfigError: a key too many or too few.
        """
        names = {field.name for field in fields(cls)}
        if unknown := set(values) - names:
            raise ConfigError(f"a row of results has the key {min(unknown)!r}, expected no such")
        try:
            row = cls(**values)
        except TypeError as error:
            raise ConfigError(f"a row of results is incomplete: {error}") from None
        return replace(row, inputs=(row.inputs[0], row.inputs[1]))


def digest(settings: str) -> str:
    """What :attr:`Row.settings` holds."""
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def with_baselines(rows: Sequence[Row]) -> list[Row]:
    """Each row of an experiment with the accuracies of its baselines, where these have rows.

    A baseline is of the same preset, data, seed and budget; rows without a preset keep theirs.
    """
    unmixed = {_place(row): row.accuracy for row in rows if row.method == "unmixed"}
    edge = {_place(row): row.accuracy for row in rows if row.method == "edge-only"}
    return [
        replace(
            row,
            accuracy_unmixed=unmixed.get(_place(row)),
            accuracy_edge_only=edge.get(_place(row)),
        )
        if row.preset
        else row
        for row in rows
    ]


def _place(row: Row) -> tuple[object, ...]:
    return row.dataset, row.preset, row.seed, row.budget


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; none if it isn't there.

    Raises:
        ConfigError: a file that holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ConfigError(f"{path} holds no list of objects")
    return [Row.from_json(value) for value in values]


def put_rows(path: Path, new: Iterable[Row]) -> list[Row]:
    """Add rows to a file, in place of those of the same key; two processes may do so at once.

    Returns:
        All rows that the file holds now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        rows = {row.key: row for row in read_rows(path)}
        rows.update({row.key: row for row in new})
        kept = with_baselines([rows[key] for key in sorted(rows, key=repr)])
        body = json.dumps([asdict(row) for row in kept], indent=1) + "\n"
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w") as stream:
            stream.write(body)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    return kept


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with ``path``, among processes of this machine.

    The lock is a file beside it that stays: were it removed, two could each hold a lock on a file
    of that name.
    """
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
