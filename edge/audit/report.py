"""What an audit found: rows, pictures to show, and the JSON file they are kept in."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from datamix.errors import ConfigError

Array = npt.NDArray[Any]
_MAX_BYTES = 1 << 28
FAILED = "failed"
NOT_SCORED = "not scored"

_Text = Annotated[str, Field(max_length=2000)]
_Figure = FiniteFloat | None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one attack on one operator's view.

    Attributes:
        attack: its name.
        mode: of the device.
        operator: whose view, "A" or "B".
        dataset: of the victims.
        metric: see :mod:`edge.audit.scoring`; empty where there is no figure.
        value: the figure; None where it failed or there is no truth.
        low: of its 95% interval.
        high: of its 95% interval.
        floor: what an attacker without the observation reaches.
        floor_low: of the floor's 95% interval.
        floor_high: of the floor's 95% interval.
        floor_is: how the floor was found.
        verdict: "leaks", "bounded at X bits", "at the floor", "failed" or "not scored".
        k: inputs in a group.
        n: members, or pairs of groups, that the figure is of.
        seconds: that the attack took.
        bound_bits: most that this operator learns of one input, all rounds together; None where
            nothing bounds it.
        notes: the attack's own.
    """

    attack: _Text
    mode: _Text
    operator: _Text
    dataset: _Text
    metric: _Text
    value: _Figure
    low: _Figure
    high: _Figure
    floor: _Figure
    floor_low: _Figure
    floor_high: _Figure
    floor_is: _Text
    verdict: _Text
    k: int
    n: int
    seconds: FiniteFloat
    bound_bits: _Figure
    notes: _Text = ""


@dataclass(frozen=True, slots=True)
class Exhibit:
    """Pictures of one group: what was sent, what an attack made of it, what guessing gives.

    Attributes:
        attack: its name.
        operator: whose view.
        shape: (K, C, H, W).
        original: pixels 0..255 over the range of pictures, base64.
        recovered: the same.
        floor: the same.
    """

    attack: _Text
    operator: _Text
    shape: tuple[int, int, int, int]
    original: str
    recovered: str
    floor: str

    def pixels(self, which: str) -> npt.NDArray[np.uint8]:
        """(K, C, H, W) uint8 of "original", "recovered" or "floor".

        Raises:
            ConfigError: not as many as the shape says.
        """
        try:
            body = base64.b64decode(getattr(self, which), validate=True)
            return np.frombuffer(body, np.uint8).reshape(self.shape)
        except ValueError:
            raise ConfigError(f"exhibit of {self.attack!r} is not of shape {self.shape}") from None


def exhibit(
    attack: str,
    operator: str,
    original: Array,
    recovered: Array,
    floor: Array,
    value_range: tuple[float, float],
) -> Exhibit:
    """Pictures (K, C, H, W) of the given range to show."""
    low, high = value_range

    def packed(shown: Array) -> str:
        scaled = np.rint((np.clip(shown, low, high) - low) * (255 / (high - low)))
        return base64.b64encode(scaled.astype(np.uint8).tobytes()).decode()

    members, channels, height, width = original.shape
    return Exhibit(
        attack,
        operator,
        (members, channels, height, width),
        packed(original),
        packed(recovered),
        packed(floor),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """An audit, finished or not.

    Attributes:
        bundle: name and version.
        mode: of the device.
        promise: what the mode promises, in a line.
        known_break: what gets around it.
        dataset: of the victims.
        groups: inferences captured.
        k: inputs in a group.
        seed: of everything random but what protects the inputs.
        budget_s: seconds that were given.
        capture_sha256: of the capture.
        scored: whether the truth was at hand.
        preprocessing: of the bundle, as its manifest has it.
        rows: by attack, as they were run.
        exhibits: at most one for each attack and operator.
    """

    bundle: _Text
    mode: _Text
    promise: _Text
    known_break: _Text
    dataset: _Text
    groups: int
    k: int
    seed: int
    budget_s: FiniteFloat
    capture_sha256: _Text
    scored: bool
    preprocessing: dict[str, Any]
    rows: tuple[Row, ...] = ()
    exhibits: tuple[Exhibit, ...] = ()
    version: int = field(default=1)

    def done(self) -> frozenset[tuple[str, str]]:
        """Attacks and operators with a result; one that failed is tried again."""
        return frozenset((row.attack, row.operator) for row in self.rows if row.verdict != FAILED)

    def same_audit(self, other: Report) -> bool:
        """Whether the two are of one capture, so that their rows belong together."""
        mine, theirs = (
            (r.bundle, r.mode, r.dataset, r.groups, r.k, r.seed, r.capture_sha256, r.scored)
            for r in (self, other)
        )
        return mine == theirs


_REPORT = TypeAdapter(Report)


def write_report(path: Path, report: Report) -> None:
    """Write JSON; a file that is there is replaced in one step.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as stream:
            json.dump(asdict(report), stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be written: {error.strerror}") from None


def read_report(path: Path) -> Report:
    """Read what :func:`write_report` wrote.

    Raises:
        ConfigError: missing, too large, or not a report.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path.name} is too large for a report")
        return _REPORT.validate_json(path.read_bytes(), strict=False)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{path.name} is not a report: {first['msg'][:200]}") from None
