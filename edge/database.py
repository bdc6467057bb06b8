"""A small SQLite file of the device: for its owner only, shared by processes, safe under ``kill``.

The ledger and the answer cache keep one each. What both need is here:

- Mode 0600 from the first byte, and made so again where somebody has opened it up.
- Each change is one immediate transaction in a write-ahead log, so that processes take turns and a
  process that is killed at any point has either made its whole change or none of it.
- A file that is no such file, is damaged or was made by a newer version is refused with one
  sentence and left as it is.
- A connection belongs to one process: a forked child opens one of its own.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datamix.errors import ConfigError, Unavailable

BUSY_TIMEOUT_S = 10.0
"""How long a transaction waits for those of other processes."""

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNUSABLE = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}

# Closing any descriptor of a file drops all locks that this process holds on it (POSIX), so a new
# file is made by one thread at a time, before SQLite has opened it anywhere in this process.
_creating = threading.Lock()


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kind of file looks like.

    Attributes:
        what: its name in sentences.
        application_id: SQLite's mark of what wrote the file, 32 bits.
        version: of the tables; a file with a larger one is refused.
        statements: what creates the tables and indices, word for word as SQLite remembers it.
        durable: whether a change shall survive a loss of power the moment it is made; else it
            survives the process's death, and a loss of power may undo the last changes.
    """

    what: str
    application_id: int
    version: int
    statements: tuple[str, ...]
    durable: bool


@dataclass(frozen=True, slots=True)
class _Held:
    """One process's connection; ``inode`` tells whether the path still leads to its file."""

    pid: int
    lock: threading.Lock
    connection: sqlite3.Connection
    inode: tuple[int, int]


# A connection that came along in a fork must neither be used nor closed: that would work on the
# parent's locks and log.
_inherited: list[_Held] = []


class Database:
    """One open file; any thread may use it, and a process forked from this one too."""

    def __init__(self, path: str | os.PathLike[str], layout: Layout) -> None:
        """Open ``path``, or make it.

        Raises:
            ConfigError: it is not of this layout, is damaged, or cannot be read and written.
            Unavailable: another process has held it for too long.
        """
        self.path = Path(path)
        self.layout = layout
        self._held: _Held | None = self._open()

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        held, self._held = self._held, None
        if held is None:
            return
        if held.pid != os.getpid():
            _inherited.append(held)
            return
        with held.lock:
            held.connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside happens, or none of it; nobody else writes meanwhile.

        Raises:
            ConfigError: the file is closed, damaged, gone, or cannot be written.
            Unavailable: another process has held it for too long.
        """
        held = self._here()
        with held.lock, self._said_plainly():
            if self._held is None:  # by another thread, meanwhile
                raise self._closed()
            if held.inode != _inode(self.path):
                raise ConfigError(
                    f"{self.path} was removed or replaced while in use, expected the same "
                    f"{self.layout.what} throughout"
                )
            with _immediate(held.connection) as connection:
                yield connection

    def damaged(self, problem: str) -> ConfigError:
        """The error for a file whose content makes no sense."""
        return ConfigError(
            f"{self.path} is damaged or no {self.layout.what} at all: {problem}; it was left as "
            "it is"
        )

    def _closed(self) -> ConfigError:
        return ConfigError(f"this {self.layout.what} is closed")

    def _here(self) -> _Held:
        held = self._held
        if held is None:
            raise self._closed()
        if held.pid != os.getpid():
            _inherited.append(held)
            held = self._held = self._open()
        return held

    def _open(self) -> _Held:
        with self._said_plainly():
            try:
                _create(self.path)
                found = self.path.stat()
            except OSError as error:
                raise ConfigError(
                    f"{self.layout.what} {self.path} cannot be opened: {error.strerror}"
                ) from None
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        inode = (found.st_dev, found.st_ino)
        return _Held(os.getpid(), threading.Lock(), connection, inode)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables of a new file, check those of an old one, and only then change modes."""
        layout = self.layout
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        if _marks(connection) == (0, 0, []):
            with _immediate(connection):
                if _marks(connection) == (0, 0, []):  # nobody was faster
                    # SQLite takes what is shorter than its header for a new file; a ledger that was
                    # cut short must not begin anew.
                    if size := self.path.stat().st_size:
                        raise self.damaged(f"it has {size} bytes and no tables")
                    for statement in layout.statements:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id = {layout.application_id}")
                    connection.execute(f"PRAGMA user_version = {layout.version}")
        application_id, version, statements = _marks(connection)
        if application_id != layout.application_id:
            raise self.damaged(
                f"its application id is {application_id}, expected {layout.application_id}"
            )
        if version > layout.version:
            raise ConfigError(
                f"{self.path} is a {layout.what} of schema version {version}, expected "
                f"{layout.version}; a newer release of DataMix made it"
            )
        if version != layout.version or statements != sorted(layout.statements):
            raise self.damaged(f"its tables are not those of schema version {layout.version}")
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise self.damaged("its pages or rows do not fit together")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if layout.durable else 'NORMAL'}")
        connection.execute("PRAGMA secure_delete = ON")  # what is deleted is not left in free pages
        _make_private(self.path)

    @contextlib.contextmanager
    def _said_plainly(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
            if code in _BUSY:
                raise Unavailable(
                    f"another process has held {self.layout.what} {self.path} for "
                    f"{BUSY_TIMEOUT_S:g} s"
                ) from None
            if code in _UNUSABLE:
                raise ConfigError(
                    f"{self.layout.what} {self.path} cannot be read and written: {name}"
                ) from None
            raise self.damaged(name) from None
        except UnicodeDecodeError:  # not all that SQLite calls text is
            raise self.damaged("a text in it is none") from None


@contextlib.contextmanager
def _immediate(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _marks(connection: sqlite3.Connection) -> tuple[int, int, list[str]]:
    """Application id, version and statements of the file; all of the same moment."""
    ours = not connection.in_transaction
    if ours:
        connection.execute("BEGIN")
    try:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    finally:
        if ours:
            connection.execute("ROLLBACK")
    return application_id, version, sorted(str(sql) for (sql,) in rows)


def _create(path: Path) -> None:
    with _creating:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
                raise ConfigError(f"{path} is no regular file") from None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_private(path: Path) -> None:
    """Mode 0600 for the file, and for its log and index, which SQLite gives the mode it had."""
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        try:
            if file.stat().st_mode & 0o077:
                file.chmod(0o600)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(
                f"others may read {file}, expected mode 0600: {error.strerror}"
            ) from None
