"""Checkpoints: written whole or not at all, and only taken up by the run that they belong to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from datamix.errors import ConfigError


def store(path: Path, fingerprint: str, values: dict[str, Any]) -> None:
    """Write a checkpoint beside ``path`` and rename it, so that there is always a whole one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as stream:
        torch.save({"fingerprint": fingerprint, **values}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def restore(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Read a checkpoint; None if there is none.

    Raises:
        ConfigError: a file that cannot be read, or of another run.
    """
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["fingerprint"]
    except Exception as error:  # torch raises many types on a broken file
        raise ConfigError(f"checkpoint {path} cannot be read: {type(error).__name__}") from None
    if theirs != fingerprint:
        raise ConfigError(
            f"checkpoint {path} is of a run with other settings or data;"
            " give the same ones, or remove its folder to start anew"
        )
    return saved
