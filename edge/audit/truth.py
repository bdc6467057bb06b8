"""What was really sent; for scoring, in a file of its own, and never for an attack."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

SUFFIX = ".truth.npz"
_MAX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Which items of the gallery were members of which group.

    Attributes:
        victims: (groups, K) int64 rows of the gallery, in the order of the inferences.
        gallery_sha256: of the gallery that is meant.
        seed: what gallery and victims were drawn with.
    """

    victims: npt.NDArray[np.int64]
    gallery_sha256: str
    seed: int


def truth_path(capture: Path) -> Path:
    """Where the truth of a capture's file is kept."""
    return capture.with_name(capture.name + SUFFIX)


def write_truth(path: Path, truth: Truth) -> None:
    """Write it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with open(path, "wb") as stream:
            np.savez(
                stream,
                victims=truth.victims,
                gallery_sha256=np.asarray(truth.gallery_sha256),
                seed=np.asarray(truth.seed),
            )
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be written: {error.strerror}") from None


def read_truth(path: Path) -> Truth:
    """Read it; nothing is unpickled.

    Raises:
        ConfigError: missing, or not what :func:`write_truth` wrote.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            victims, digest, seed = arrays["victims"], arrays["gallery_sha256"], arrays["seed"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path.name} is no truth of a capture: {str(error)[:100]}") from None
    if victims.ndim != 2 or victims.dtype != np.int64 or not victims.size or victims.min() < 0:
        raise ConfigError(f"{path.name}: victims have shape {victims.shape} of {victims.dtype}")
    if digest.dtype.kind != "U" or digest.ndim or seed.dtype.kind != "i" or seed.ndim:
        raise ConfigError(f"{path.name}: digest or seed is of another type")
    return Truth(victims, str(digest), int(seed))
