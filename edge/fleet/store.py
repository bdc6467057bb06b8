"""Rows on disk: a stream that outlives its writer, and the Parquet file that it becomes.

    results-<shard>.arrows   Arrow IPC stream, a batch of ended inferences four times a second
    progress-<shard>.jsonl   one line with each batch: counters and processor time
    results.parquet          the whole run in the order of its schedule, written at the end

A Parquet file can be read only once its footer is written, so a run that is killed would leave
none. An Arrow stream can be read up to its last whole batch: whatever ended more than a second
before a kill is there. Both have the columns of :data:`edge.fleet.result.COLUMNS`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamix.errors import ConfigError
from edge.fleet import result
from edge.fleet.result import Table

PERIOD_S = 0.25  # well within the second that may be lost, also on a busy machine
ROWS = "results.parquet"

Rows = Callable[[], Table]
Begun = Callable[[], int]
Tell = Callable[[], dict[str, Any]]


def stream_name(shard: int) -> str:
    """The file of one shard's rows while the run goes."""
    return f"results-{shard:05d}.arrows"


def progress_name(shard: int) -> str:
    """The file of one shard's counters."""
    return f"progress-{shard:05d}.jsonl"


def schema() -> pa.Schema:
    """The columns of a row, none of them null; times in seconds after the run's start."""
    return pa.schema(
        [
            pa.field(name, pa.from_numpy_dtype(result.COLUMNS[name]), nullable=False)
            for name in result.COLUMNS.names or ()
        ]
    )


def to_batch(rows: Table) -> pa.RecordBatch:
    """Copy rows into Arrow."""
    columns = [pa.array(np.ascontiguousarray(rows[name])) for name in result.COLUMNS.names or ()]
    return pa.RecordBatch.from_arrays(columns, schema=schema())


def to_table(found: pa.Table, where: str) -> Table:
    """Copy rows out of Arrow.

    Raises:
        ConfigError: it has not the columns of a run.
    """
    for wanted in schema():
        places = found.schema.get_all_field_indices(wanted.name)
        kinds = [str(found.schema.field(place).type) for place in places]
        if kinds != [str(wanted.type)]:
            raise ConfigError(
                f"{where}: the column {wanted.name} is {' and '.join(kinds) or 'missing'}, "
                f"expected one of {wanted.type}"
            )
    table = np.zeros(found.num_rows, result.COLUMNS)
    for name in result.COLUMNS.names or ():
        column = found.column(name)
        if column.null_count:
            raise ConfigError(f"{where}: the column {name} has empty places, expected none")
        table[name] = column.to_numpy()
    return table


def write_rows(folder: Path, table: Table) -> None:
    """Write the whole run's Parquet file; it appears whole or not at all."""
    part = folder / f"{ROWS}.part"
    pq.write_table(
        pa.Table.from_batches([to_batch(table)]), part, compression="zstd", row_group_size=1 << 18
    )
    os.replace(part, folder / ROWS)


def read_rows(folder: Path) -> Table:
    """Read a run's rows: the Parquet file, or else what the shards had streamed when they died.

    Raises:
        ConfigError: neither is there, or what is there holds no rows of a run.
    """
    if (folder / ROWS).exists():
        try:
            return to_table(pq.read_table(folder / ROWS), f"{folder.name}/{ROWS}")
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{folder.name}/{ROWS} is no Parquet file: {error}") from None
    streams = sorted(folder.glob("results-*.arrows"))
    if not streams:
        raise ConfigError(f"{folder.name} has no rows, expected {ROWS} or results-*.arrows")
    return result.merge([read_stream(path) for path in streams])


def read_stream(path: Path) -> Table:
    """Read the whole batches of a stream; a last one that is torn is left out.

    Raises:
        ConfigError: it is no stream of a run's rows.
    """
    where = f"{path.parent.name}/{path.name}"
    batches: list[pa.RecordBatch] = []
    with path.open("rb") as file:
        try:
            reader = pa.ipc.open_stream(file)
        except (OSError, pa.ArrowException) as error:
            if path.stat().st_size < _head_bytes():  # killed before the head was out
                return np.zeros(0, result.COLUMNS)
            raise ConfigError(f"{where} is no Arrow stream: {error}") from None
        while True:
            try:
                batch = reader.read_next_batch()
                batch.validate(full=True)
            except StopIteration:
                break
            except (OSError, pa.ArrowException):
                break  # torn: the writer died in the middle of it
            batches.append(batch)
        return to_table(pa.Table.from_batches(batches, reader.schema), where)


class RowStream:
    """Writes the rows of one shard as its inferences end.

    A thread looks four times a second; the event loop does nothing for it. A row whose status is
    set has ended and never changes again. One that was given up unsent keeps the status UNSENT, and
    is told by its ``done_s`` on two looks in a row, since the status is set just after it.
    """

    def __init__(self, folder: Path, shard: int, table: Rows, begun: Begun, tell: Tell) -> None:
        """Open the files of a shard.

        Args:
            folder: of the run.
            shard: which shard.
            table: its rows; a closed loop puts a longer table in the place of one that is full.
            begun: the place from which on none has begun.
            tell: what stands in a line of progress.

        Raises:
            ConfigError: they cannot be written.
        """
        self.written_rows = 0
        self._table, self._begun, self._tell = table, begun, tell
        self._written = np.zeros(len(table()), bool)
        self._given_up = np.zeros(len(table()), bool)
        self._low = 0  # every row below is written
        # The first conversion imports for up to a second what Arrow knows of other packages.
        to_batch(np.zeros(1, result.COLUMNS))
        try:
            self._file = (folder / stream_name(shard)).open("wb", buffering=0)
            self._lines = (folder / progress_name(shard)).open("w")
            self._writer = pa.ipc.new_stream(self._file, schema())
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None

    def look(self, last: bool = False) -> int:
        """Write what has ended since the last look; returns how many rows that was.

        ``last``: nothing changes any more, so one look is enough for what was given up.
        """
        table = self._table()
        if (more := len(table) - len(self._written)) > 0:
            self._written = np.pad(self._written, (0, more))
            self._given_up = np.pad(self._given_up, (0, more))
        low, high = self._low, max(self._low, min(self._begun(), len(table)))
        status = table["status"][low:high]
        given_up = (status == result.UNSENT) & ~np.isnan(table["done_s"][low:high])
        ended = (status != result.UNSENT) | (given_up & (self._given_up[low:high] | last))
        self._given_up[low:high] = given_up
        places = low + np.flatnonzero(ended & ~self._written[low:high])
        if len(places):
            self._writer.write_batch(to_batch(table[places]))
            self._written[places] = True
            self.written_rows += len(places)
            open_places = np.flatnonzero(~self._written[low:high])
            self._low = low + int(open_places[0]) if len(open_places) else high
        line = {"rows": self.written_rows, **self._tell()}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        return len(places)

    def close(self) -> None:
        """Write what has ended, and the stream's end."""
        self.look(last=True)
        self._writer.close()
        self._file.close()
        self._lines.close()


class Streaming:
    """Looks at a :class:`RowStream` from a thread until it is left."""

    def __init__(self, stream: RowStream, on_error: Callable[[Exception], None]) -> None:
        """Make the thread.

        Args:
            stream: what to look at.
            on_error: called from the thread when rows cannot be written; the run shall end then.
        """
        self._stream, self._on_error = stream, on_error
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)

    def __enter__(self) -> None:
        """Begin."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Write the rest.

        Raises:
            ConfigError: it cannot be written.
        """
        self._stop.set()
        self._thread.join()
        if self._failed:
            return
        try:
            self._stream.close()
        except OSError as error:
            raise _unwritten(error) from None

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self._stream.look()
            except Exception as error:
                self._failed = True
                self._on_error(_unwritten(error) if isinstance(error, OSError) else error)
                return


def read_progress(folder: Path) -> dict[int, dict[str, Any]]:
    """Read the last whole line of each shard's progress, by the shard's number."""
    found = {}
    for path in sorted(folder.glob("progress-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                found[int(path.stem.partition("-")[2])] = json.loads(line)
            except ValueError:
                break  # torn
    return found


def _unwritten(error: OSError) -> ConfigError:
    return ConfigError(
        f"the run's rows cannot be written: {error.strerror}, expected room for them"
    )


def _head_bytes() -> int:
    return len(schema().serialize())
