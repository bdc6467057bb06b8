"""What an engine's batches cost, measured once and written down: the emulated engine's calibration.

    {"schema_version": 1, "name": "...", "machine": "...", "engine": "torch:cpu:float32",
     "max_batch_rows": 256, "depth": 1,
     "blocks": [{"a_s": 0.0011, "b_s": 4.1e-05, "copy_a_s": 0, "copy_b_s": 0, "fit_error": 0.06,
                 "measured": [{"rows": 1, "compute_s": 0.0011, "copy_s": 0}, ...]}, ...]}

A profile is foreign input: it may come from another machine, and somebody may have edited it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from datamix.errors import ConfigError
from deployments.emulated import Cost, EmulatedEngine
from deployments.engine import Shape

_MAX_BYTES = 1 << 20

_Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]
_Rows = Annotated[int, Field(ge=1, le=1 << 20)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Strict):
    """The median batch of one size, in seconds."""

    rows: _Rows
    compute_s: _Seconds
    copy_s: _Seconds = 0.0


class BlockProfile(_Strict):
    """What a batch of one block costs: ``a_s + b_s * rows`` after ``copy_a_s + copy_b_s * rows``.

    ``fit_error`` is the largest distance of a measured batch from that, relative to its time.
    """

    a_s: _Seconds
    b_s: _Seconds
    copy_a_s: _Seconds = 0.0
    copy_b_s: _Seconds = 0.0
    fit_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    measured: Annotated[tuple[Measured, ...], Field(max_length=256)] = ()

    @property
    def cost(self) -> Cost:
        """For the emulated engine."""
        return Cost(self.a_s, self.b_s, self.copy_a_s, self.copy_b_s)


class Profile(_Strict):
    """One engine on one machine.

    Attributes:
        schema_version: of this file's layout.
        name: of the profile, ``[A-Za-z0-9._-]{1,64}``.
        machine: what it was measured on, in words.
        engine: which engine was measured, by its name.
        max_batch_rows: the largest batch that was measured.
        depth: batches under way at once; with 2, copies hide behind computations.
        blocks: one per block of the model.
    """

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    machine: Annotated[str, Field(max_length=256)] = ""
    engine: Annotated[str, Field(max_length=64)] = ""
    max_batch_rows: _Rows
    depth: Literal[1, 2] = 1
    blocks: Annotated[tuple[BlockProfile, ...], Field(min_length=1, max_length=64)]


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises:
        ConfigError: missing, unreadable, too large, or not a valid profile.
    """
    try:
        with open(path, "rb") as file:
            body = file.read(_MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"profile {str(path)!r} cannot be read: {reason}") from None
    if len(body) > _MAX_BYTES:
        raise ConfigError(f"profile {str(path)!r} has more than {_MAX_BYTES} bytes")
    try:
        return Profile.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"]) or "the file"
        message = " ".join(first["msg"].split())[:200]
        raise ConfigError(f"profile {str(path)!r}: {where}: {message}") from None


def emulate(profile: Profile, shapes: Sequence[Shape], max_batch_rows: int) -> EmulatedEngine:
    """The engine that takes as long as the profile says, for blocks of the given row shapes.

    Raises:
        ConfigError: the profile is of another number of blocks, or of smaller batches only.
    """
    if len(profile.blocks) != len(shapes):
        raise ConfigError(
            f"profile {profile.name!r} has {len(profile.blocks)} blocks, expected {len(shapes)}"
        )
    if max_batch_rows > profile.max_batch_rows:
        raise ConfigError(
            f"max_batch_rows is {max_batch_rows}, expected at most {profile.max_batch_rows}, the "
            f"largest batch that profile {profile.name!r} knows"
        )
    costs = [block.cost for block in profile.blocks]
    return EmulatedEngine(shapes, costs, name=profile.name, depth=profile.depth)
