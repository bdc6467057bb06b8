"""Where a data set's files are, and what is said when they are not there."""

from __future__ import annotations

import os
from pathlib import Path

from datamix.errors import ConfigError

VARIABLE = "DATAMIX_DATA"


def find_folder(name: str, directory: str | Path | None, layout: str) -> Path:
    """``directory/name`` where that is a folder, else ``directory``.

    Args:
        name: of the data set.
        directory: None for what the environment variable ``DATAMIX_DATA`` says.
        layout: the files that are expected there, for the error.

    Raises:
        ConfigError: no directory was named, or it is not there.
    """
    chosen = directory or os.environ.get(VARIABLE)
    if not chosen:
        raise ConfigError(
            f"no data directory: pass --data DIR or set {VARIABLE}; it needs {layout}"
        )
    outer = Path(chosen)
    inner = outer / name
    if inner.is_dir():
        return inner
    if not outer.is_dir():
        raise ConfigError(
            f"no folder {outer}; pass --data DIR or set {VARIABLE} to one with {layout}"
        )
    return outer


def missing(file: str, folder: Path, layout: str) -> ConfigError:
    """The one sentence for a file that is not there."""
    return ConfigError(
        f"no {file} in {folder}; expected {layout} (--data DIR or {VARIABLE} says where)"
    )


def read_lines(path: Path, layout: str, max_bytes: int = 1 << 28) -> list[str]:
    """The lines of a text file that belongs to a data set, without empty ones.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, or too large to be such a list.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise ConfigError(f"{path} has more than {max_bytes} bytes, expected a list of names")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise missing(path.name, path.parent, layout) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
