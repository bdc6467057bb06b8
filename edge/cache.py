"""Answers kept on the device, so that a repeated input is answered without being sent again.

Sending an input once more spends its bits once more (:mod:`edge.ledger`), and mixing or noising it
anew hands the cloud a second look. An answer from here spends nothing, since nothing leaves.

An entry's key is HMAC-SHA256 of everything that the answer depends on: the bundle's name, version
and hashes, the mode, the type, shape and bytes of one raw input. Its value is the output row. The
HMAC's own key is drawn once from the operating system's entropy and kept in the file, which only
its owner may read. Whoever has the file can test guesses of inputs and read outputs, so it is worth
as much as the device's memory; who has only a list of keys has nothing.

The file is apart from the ledger's: it may be deleted at any time, and a ledger must not be.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.closing import Closing
from edge.database import Database, Layout

if TYPE_CHECKING:
    from datamix.bundle import Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

KEY_BYTES = 32
_BLOB = "BLOB NOT NULL CHECK (typeof({0}) = 'blob' AND length({0}) {1})"

LAYOUT: Final = Layout(
    what="answer cache",
    application_id=0x444D4143,  # "DMAC"
    version=1,
    statements=(
        f"CREATE TABLE secret (key {_BLOB.format('key', f'= {KEY_BYTES}')})",
        f"CREATE TABLE answer (digest {_BLOB.format('digest', '= 32')} PRIMARY KEY, "
        "used INTEGER NOT NULL CHECK (typeof(used) = 'integer' AND used >= 0 AND "
        f"used < {1 << 62}), "
        f"outputs {_BLOB.format('outputs', '% 4 = 0')}) WITHOUT ROWID",
        "CREATE INDEX by_use ON answer (used)",
    ),
    durable=False,
)


class AnswerCache(Closing):
    """The answers of one bundle in one mode; the file may hold those of others beside them."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        *,
        mode: str | None = None,
        max_entries: int = 10_000,
    ) -> None:
        """Open the cache at ``path``, or make it.

        Args:
            path: the file; it is made for its owner only.
            manifest: of the bundle whose answers are kept.
            mode: what leaves the device; None for the bundle's own.
            max_entries: answers in the file, of all bundles; beyond that the one that was not used
                for the longest time goes.

        Raises:
            ConfigError: ``max_entries`` is below 1; or the file is no cache, damaged, of a newer
                schema, or cannot be read and written.
            Unavailable: another process has held the file for too long.
        """
        if max_entries < 1:
            raise ConfigError(f"max_entries is {max_entries}, expected at least 1")
        self.max_entries = max_entries
        self._classes = len(manifest.class_names)
        self._context = [
            manifest.name,
            manifest.version,
            sorted(manifest.hashes.items()),
            mode or manifest.mode,
            [spec and spec.model_dump() for spec in (manifest.split, manifest.bounded)],
        ]
        self._database = Database(path, LAYOUT)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._database.close()

    def lookup(self, inputs: Array) -> tuple[Mask, Floats]:
        """The answers that are there; they count as used now.

        Args:
            inputs: (n, *raw_shape), raw, as they would be given to the client.

        Returns:
            Which inputs have an answer (n,), bool; and the outputs (n, classes) float32, zero where
            there is none.

        Raises:
            ConfigError: the inputs are no rows of numbers, or the file is damaged or cannot be
                used.
            Unavailable: another process has held the file for too long.
        """
        _check_rows(inputs)
        hits = np.zeros(len(inputs), np.bool_)
        outputs = np.zeros((len(inputs), self._classes), np.float32)
        with self._database.transaction() as connection:
            digests = self._digests(connection, inputs)
            for row, digest in enumerate(digests):
                found = connection.execute(
                    "SELECT outputs FROM answer WHERE digest = ?", (digest,)
                ).fetchone()
                if found is not None:
                    outputs[row], hits[row] = self._values(found[0]), True
            used = [digest for digest, hit in zip(digests, hits, strict=True) if hit]
            if used:  # a transaction that changes nothing does not touch the disk
                now = _next_use(connection)
                connection.executemany(
                    "UPDATE answer SET used = ? WHERE digest = ?",
                    [(now + index, digest) for index, digest in enumerate(used)],
                )
        return hits, outputs

    def store(self, inputs: Array, outputs: Array) -> None:
        """Keep answers. An input that has one keeps it: noise is not shown from a second side.

        Args:
            inputs: (n, *raw_shape), raw, as they were given to the client.
            outputs: (n, classes), finite; kept as float32.

        Raises:
            ConfigError: shapes or values are not those; or the file is damaged or cannot be used.
            Unavailable: another process has held the file for too long.
        """
        _check_rows(inputs)
        rows = np.ascontiguousarray(outputs, "<f4")
        if rows.shape != (len(inputs), self._classes):
            raise ConfigError(
                f"outputs have shape {rows.shape}, expected {(len(inputs), self._classes)}"
            )
        if not np.isfinite(rows).all():
            raise ConfigError("outputs hold NaN or Inf, expected finite values")
        with self._database.transaction() as connection:
            now = _next_use(connection)
            digests = self._digests(connection, inputs)
            connection.executemany(
                "INSERT INTO answer (digest, used, outputs) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET used = excluded.used",
                [
                    (digest, now + index, row.tobytes())
                    for index, (digest, row) in enumerate(zip(digests, rows, strict=True))
                ],
            )
            (count,) = connection.execute("SELECT count(*) FROM answer").fetchone()
            connection.execute(
                "DELETE FROM answer WHERE digest IN "
                "(SELECT digest FROM answer ORDER BY used LIMIT ?)",
                (max(0, count - self.max_entries),),
            )

    def __len__(self) -> int:
        """How many answers the file holds, of all bundles."""
        with self._database.transaction() as connection:
            (count,) = connection.execute("SELECT count(*) FROM answer").fetchone()
        return int(count)

    def _digests(self, connection: sqlite3.Connection, inputs: Array) -> list[bytes]:
        """The keys of the rows of ``inputs``.

        They are looked up in a tree, whose comparisons end at the first byte that differs. That
        time says at most how far a digest agrees with some stored digest. Without the HMAC's key
        nobody can make an input whose digest begins as they please, nor draw from a digest's first
        bytes anything about an input, so it tells them nothing.
        """
        context = json.dumps([*self._context, inputs.dtype.str, inputs.shape[1:]]).encode()
        keyed = hmac.new(self._key(connection), None, hashlib.sha256)
        keyed.update(len(context).to_bytes(8, "little") + context)
        digests = []
        for row in inputs:
            one = keyed.copy()
            one.update(np.ascontiguousarray(row).tobytes())
            digests.append(one.digest())
        return digests

    def _key(self, connection: sqlite3.Connection) -> bytes:
        """The HMAC's key, drawn where there is none yet. It is held no longer than a call."""
        found = connection.execute("SELECT key FROM secret").fetchall()
        if not found:
            found = [(os.urandom(KEY_BYTES),)]
            connection.execute("INSERT INTO secret VALUES (?)", found[0])
        if len(found) != 1:
            raise self._database.damaged(f"it has {len(found)} keys, expected one")
        key: bytes = found[0][0]
        return key

    def _values(self, blob: bytes) -> Floats:
        if len(blob) != 4 * self._classes:
            raise self._database.damaged(
                f"an answer has {len(blob)} bytes, expected {4 * self._classes}"
            )
        values = np.frombuffer(blob, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise self._database.damaged("an answer holds NaN or Inf")
        return values


def _check_rows(inputs: Array) -> None:
    if inputs.ndim < 1 or inputs.dtype.kind not in "biuf":
        raise ConfigError(
            f"inputs have shape {inputs.shape} and dtype {inputs.dtype}, expected rows of numbers"
        )


def _next_use(connection: sqlite3.Connection) -> int:
    (last,) = connection.execute("SELECT max(used) FROM answer").fetchone()
    return 0 if last is None else int(last) + 1
