"""The device's small files: private, whole after a kill, and hostile ones refused untouched."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError, Unavailable
from edge import database
from edge.cache import LAYOUT as CACHE
from edge.database import Database, Layout
from edge.ledger import LAYOUT as LEDGER

ROOT = Path(__file__).parents[1]
LAYOUT = Layout("notebook", 0x444D5431, 3, ("CREATE TABLE note (value INTEGER)",), durable=False)


def add(path: Path, value: int = 1) -> None:
    opened = Database(path, LAYOUT)
    with opened.transaction() as connection:
        connection.execute("INSERT INTO note VALUES (?)", (value,))
    opened.close()


def values(path: Path) -> list[int]:
    opened = Database(path, LAYOUT)
    with opened.transaction() as connection:
        found = connection.execute("SELECT value FROM note ORDER BY rowid").fetchall()
    opened.close()
    return [value for (value,) in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "what? 100% #1.db"  # a URI would end, or begin something, at each of these


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, '.');"
        "from edge.database import Database; from tests.test_database import *;"
        "path = Path(sys.argv[1])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_was_written_is_there_again(path: Path) -> None:
    add(path, 1)
    add(path, 2)
    assert values(path) == [1, 2]
    assert sorted(path.parent.iterdir()) == [path]  # nothing lies about


def test_nobody_else_reads_it(path: Path) -> None:
    before = os.umask(0)
    try:
        opened = Database(path, LAYOUT)
        with opened.transaction() as connection:
            connection.execute("INSERT INTO note VALUES (1)")
            files = list(path.parent.iterdir())
            assert len(files) == 3  # with the log and its index
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        opened.close()
    finally:
        os.umask(before)
    path.chmod(0o644)
    opened = Database(path, LAYOUT)
    files = list(path.parent.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    opened.close()


def test_an_error_inside_undoes_everything(path: Path) -> None:
    opened = Database(path, LAYOUT)
    with pytest.raises(ZeroDivisionError), opened.transaction() as connection:
        connection.execute("INSERT INTO note VALUES (1)")
        raise ZeroDivisionError
    opened.close()
    assert values(path) == []


def test_a_closed_file_says_so(path: Path) -> None:
    opened = Database(path, LAYOUT)
    opened.close()
    opened.close()
    with pytest.raises(ConfigError, match="this notebook is closed"), opened.transaction():
        pass


def test_a_file_that_was_replaced_is_not_written_into_the_void(path: Path) -> None:
    opened = Database(path, LAYOUT)
    path.unlink()
    with pytest.raises(ConfigError, match="was removed or replaced"), opened.transaction():
        pass
    add(path)
    with pytest.raises(ConfigError, match="was removed or replaced"), opened.transaction():
        pass
    opened.close()
    assert values(path) == [1]


def test_waiting_for_others_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    first, second = Database(path, LAYOUT), Database(path, LAYOUT)
    held = pytest.raises(Unavailable, match="another process has held notebook")
    with first.transaction(), held, second.transaction():
        pass
    with second.transaction():
        pass
    first.close()
    second.close()


def test_threads_take_turns(path: Path) -> None:
    opened = Database(path, LAYOUT)
    with opened.transaction() as connection:
        connection.execute("INSERT INTO note VALUES (0)")

    def count() -> None:
        for _ in range(50):
            with opened.transaction() as connection:
                (value,) = connection.execute("SELECT value FROM note").fetchone()
                connection.execute("UPDATE note SET value = ?", (value + 1,))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.close()
    assert values(path) == [200]


def test_processes_that_make_the_file_at_once_make_one(path: Path) -> None:
    code = "print('ready', flush=True); sys.stdin.readline(); add(path, int(sys.argv[2]))"
    running = [run(code, path, index) for index in range(4)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0] * 4
    assert sorted(values(path)) == [0, 1, 2, 3]


def test_a_kill_within_a_change_leaves_the_change_before(path: Path) -> None:
    add(path, 1)
    code = (
        "opened = Database(path, LAYOUT)\n"
        "with opened.transaction() as connection:\n"
        "    connection.execute('INSERT INTO note VALUES (2)')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = run(code, path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert values(path) == [1]


def test_a_forked_child_opens_its_own(path: Path) -> None:
    code = (
        "opened = Database(path, LAYOUT)\n"
        "def note(value):\n"
        "    with opened.transaction() as connection:\n"
        "        connection.execute('INSERT INTO note VALUES (?)', (value,))\n"
        "note(1); held = opened._held; child = os.fork()\n"
        "if not child:\n"
        "    note(2); own = opened._held is not held; opened.close(); os._exit(0 if own else 1)\n"
        "status = os.waitpid(child, 0)[1]; note(3); opened.close(); sys.exit(status != 0)"
    )
    process = run(code, path)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert values(path) == [1, 2, 3]


# --- files that are none --------------------------------------------------------------------------


def refused(path: Path, layout: Layout = LAYOUT) -> str:
    """The sentence; nothing of the file or beside it may have changed."""
    content, mode, files = path.read_bytes(), path.stat().st_mode, set(path.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        Database(path, layout)
    assert path.read_bytes() == content
    assert path.stat().st_mode == mode
    assert set(path.parent.iterdir()) == files
    return str(caught.value)


def test_an_empty_file_becomes_one(path: Path) -> None:
    path.touch(0o644)
    add(path)
    assert values(path) == [1]


@pytest.mark.parametrize(
    "content", [b"x", bytes(100), b"notes\n" * 1000, b"SQLite format 3\0", bytes(4096)]
)
def test_other_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "is damaged or no notebook at all" in refused(path)


def test_a_newer_schema(path: Path) -> None:
    old = replace(LAYOUT, version=2)
    add(path)
    assert refused(path, old) == (
        f"{path} is a notebook of schema version 3, expected 2; a newer release of DataMix made it"
    )


def test_files_of_another_kind(path: Path) -> None:
    Database(path, LEDGER).close()
    sentence = refused(path, CACHE)
    assert "is damaged or no answer cache at all: its application id is" in sentence


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER more AFTER INSERT ON note BEGIN DELETE FROM note; END",
        "CREATE VIEW other AS SELECT 1",
        "DROP TABLE note",
        "ALTER TABLE note ADD COLUMN more",
        "PRAGMA user_version = 1",
        "PRAGMA application_id = 7",
    ],
)
def test_tables_that_are_not_ours(path: Path, statement: str) -> None:
    add(path)
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    assert "is damaged or no notebook at all" in refused(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ConfigError, match="is no regular file"):
            Database(path, LAYOUT)
    with pytest.raises(ConfigError, match="cannot be opened: No such file"):
        Database(tmp_path / "nowhere" / "file", LAYOUT)


def test_a_database_without_tables_was_never_one(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE x (y)")
    connection.execute("DROP TABLE x")
    connection.close()
    assert "bytes and no tables" in refused(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any bytes of a valid file changed: a ConfigError, or what a file of this layout can say."""
    path = tmp_path_factory.mktemp("damaged") / "notes"
    add(path, 5)
    content = bytearray(path.read_bytes())
    content = content[: data.draw(st.integers(1, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = values(path)
    except ConfigError:
        return
    assert len(found) <= 1
