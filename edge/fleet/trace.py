"""A trace of send times from a file that somebody else wrote, so nothing in it is believed.

CSV with a head line, or Parquet (pyarrow): a column ``send_s``, seconds after the start, and maybe
a column ``device``, whole numbers from 0. Other columns are not read, and rows may stand in any
order.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamix.errors import ConfigError

TIME, DEVICE = "send_s", "device"
MOST_ROWS = 10_000_000
_LARGEST_DEVICE = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file says.

    Attributes:
        due_s: (n,) float64, seconds after the start, never falling.
        device: (n,) uint32, or None where the file names none.
    """

    due_s: NDArray[np.float64]
    device: NDArray[np.uint32] | None


def read(path: str) -> Trace:
    """Read a trace; by its suffix, ``.parquet`` or else CSV.

    Raises:
        ConfigError: no such file, too many rows, no such column, or a value that can't be a send
            time or a device.
    """
    if not Path(path).is_file():
        raise ConfigError(f"trace {path!r} is no file, expected a CSV or Parquet file")
    read_columns = _parquet if path.endswith(".parquet") else _csv
    times, devices = read_columns(path)
    if not len(times):
        raise ConfigError(f"{path} has no rows, expected at least one send time")
    bad = ~np.isfinite(times) | (times < 0)
    if bad.any():
        row = int(bad.argmax())
        raise ConfigError(
            f"{path} has {TIME} {times[row]} in row {row + 1}, expected a finite number, 0 or more"
        )
    order = np.argsort(times, kind="stable")
    if devices is None:
        return Trace(times[order], None)
    wrong = (devices < 0) | (devices > _LARGEST_DEVICE) | (devices != np.floor(devices))
    if wrong.any():
        row = int(wrong.argmax())
        raise ConfigError(
            f"{path} has {DEVICE} {devices[row]:g} in row {row + 1}, expected a whole number from 0"
        )
    return Trace(times[order], devices[order].astype(np.uint32))


Columns = tuple[NDArray[np.float64], NDArray[np.float64] | None]


def _csv(path: str) -> Columns:
    times: list[float] = []
    devices: list[float] = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.reader(file, strict=True)
            head = [name.strip() for name in next(rows, [])]
            if TIME not in head:
                raise ConfigError(
                    f"{path} has the columns {head[:8]}, expected {TIME!r} among them"
                )
            at, owner = head.index(TIME), head.index(DEVICE) if DEVICE in head else None
            for row in rows:
                if not row:
                    continue
                if len(times) == MOST_ROWS:
                    raise ConfigError(f"{path} has more than {MOST_ROWS:,} rows, expected fewer")
                times.append(_float(path, TIME, row, at, rows.line_num))
                if owner is not None:
                    devices.append(_float(path, DEVICE, row, owner, rows.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no CSV file: {error}") from None
    return np.array(times, np.float64), None if owner is None else np.array(devices, np.float64)


def _float(path: str, name: str, row: list[str], place: int, line: int) -> float:
    text = row[place] if place < len(row) else ""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"{path} has {name} {text[:40]!r} in line {line}, expected a number"
        ) from None


def _parquet(path: str) -> Columns:
    # pyarrow is no part of the extra that brings the fleet, and only this needs it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if TIME not in names:
                raise ConfigError(
                    f"{path} has the columns {names[:8]}, expected {TIME!r} among them"
                )
            if file.metadata.num_rows > MOST_ROWS:
                raise ConfigError(
                    f"{path} has {file.metadata.num_rows:,} rows, expected at most {MOST_ROWS:,}"
                )
            wanted = [name for name in (TIME, DEVICE) if name in names]
            table = file.read(columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} is no Parquet file: {error}") from None
    columns = [_numbers(path, name, table.column(name)) for name in wanted]
    return columns[0], columns[1] if len(columns) > 1 else None


def _numbers(path: str, name: str, column: Any) -> NDArray[np.float64]:
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or column.null_count:
        raise ConfigError(
            f"{path} has {name} as {kind} with {column.null_count} nulls, expected numbers"
        )
    return np.asarray(column.to_numpy(), np.float64)
