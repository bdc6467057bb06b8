"""The record of a run: whole, torn, killed, and read back."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix import wire
from datamix.errors import ConfigError
from edge.fleet import result, store
from edge.fleet.config import FleetConfig
from edge.fleet.links import Link
from edge.fleet.offline import OfflineTraffic
from edge.fleet.profiles import Profile, Times
from edge.fleet.recorder import Recorder, recording
from edge.fleet.report import Run, summarise
from edge.fleet.run import simulate
from edge.fleet.saved import load_run
from edge.fleet.store import RowStream, Streaming, read_rows, read_stream, to_batch, to_table
from edge.fleet.terms import Terms
from edge.promises import Promise
from tests.fake_cloud import Connection, FakeCloud, echo, polite, running
from tests.test_fleet_report import make_run

ROOT = Path(__file__).parent.parent


def random_table(count: int, seed: int = 0) -> result.Table:
    """Rows of every bit that a column can have, floats finite or not."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, count * result.COLUMNS.itemsize, np.uint8)
    table = raw.view(result.COLUMNS).copy()
    table["index"] = np.arange(count)
    return table


def same(one: result.Table, two: result.Table) -> bool:
    return one.tobytes() == two.tobytes()


def stream_of(folder: Path, table: result.Table, batches: int) -> Path:
    """A shard's stream that looked ``batches`` times."""
    table["status"], done = result.OK, 0

    def begun() -> int:
        return done

    rows = RowStream(folder, 3, lambda: table, begun, dict)
    for number in range(1, batches + 1):
        done = len(table) * number // batches
        rows.look()
    rows.close()
    return folder / store.stream_name(3)


def begin(recorder: Recorder, run: Run) -> None:
    recorder.begin(
        model=run.model,
        mode=run.mode,
        rounds=run.rounds,
        group_size=run.group_size,
        start_s=run.start_s,
        terms=run.terms,
    )


def test_rows_come_back_bit_by_bit(tmp_path: Path) -> None:
    table = random_table(500)
    assert same(to_table(pa.Table.from_batches([to_batch(table)]), "x"), table)
    store.write_rows(tmp_path, table)
    assert same(read_rows(tmp_path), table)
    assert not list(tmp_path.glob("*.part"))
    assert pq.read_table(tmp_path / store.ROWS).column_names == list(result.COLUMNS.names or ())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, result.Table]:
    table = random_table(120)
    path = stream_of(tmp_path_factory.mktemp("whole"), table, batches=4)
    return path.read_bytes(), table


@given(data=st.data())
@settings(max_examples=60)
def test_a_torn_stream_gives_its_whole_batches(
    data: st.DataObject, whole: tuple[bytes, result.Table], tmp_path_factory: Any
) -> None:
    body, table = whole
    cut = data.draw(st.integers(0, len(body)))
    path = tmp_path_factory.mktemp("torn") / store.stream_name(0)
    path.write_bytes(body[:cut])
    found = read_stream(path)
    assert len(found) in (0, 30, 60, 90, 120)
    assert same(found, table[: len(found)])
    if cut == len(body):
        assert len(found) == 120


@given(
    ends=st.lists(st.tuples(st.integers(0, 39), st.sampled_from([200, 1, 0, 503])), max_size=80),
    every=st.integers(1, 5),
)
@settings(max_examples=40)
def test_every_row_is_written_once_after_it_ended(
    ends: list[tuple[int, int]], every: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    table = np.zeros(50, result.COLUMNS)
    table["index"] = np.arange(50)
    table["done_s"] = np.nan
    rows = RowStream(folder, 0, lambda: table, lambda: 40, dict)
    ended: dict[int, int] = {}
    for number, (place, status) in enumerate(ends):
        if place not in ended:
            ended[place] = status
            table["done_s"][place] = number
            table["status"][place] = status
        if number % every == 0:
            rows.look()
    rows.close()
    found = read_stream(folder / store.stream_name(0))
    assert dict(zip(found["index"].tolist(), found["status"].tolist(), strict=True)) == ended
    assert len(found) == rows.written_rows == len(ended)


def test_a_row_that_is_just_ending_is_not_taken_for_one_that_was_given_up(tmp_path: Path) -> None:
    table = np.zeros(2, result.COLUMNS)
    table["done_s"] = [1.0, np.nan]  # the loop has written the time, and not yet the status
    rows = RowStream(tmp_path, 0, lambda: table, lambda: 2, dict)
    assert rows.look() == 0
    table["status"][0] = result.OK
    assert rows.look() == 1
    table["done_s"][1] = 2.0
    assert rows.look() == 0 and rows.look() == 1  # still UNSENT at the next look: given up
    rows.close()
    found = read_stream(tmp_path / store.stream_name(0))
    assert found["status"].tolist() == [result.OK, result.UNSENT]


def test_a_run_read_back_says_what_it_said(tmp_path: Path) -> None:
    run = make_run()
    run.table["status"][::9] = 503
    config = replace(
        run.config,
        out=str(tmp_path / "run"),
        warm_up_s=1.0,
        slo_s=0.015,
        profiles=(
            Profile("phone/4g", 0.25, Times(stem_s=0.01), Link(1e6, 5e6, 0.05), "measured"),
            Profile("laptop", 0.75),
        ),
        token="secretsecretsecret",
        second_token="secretsecretsecret2",
        url="http://user:secret@cloud",
    )
    terms = Terms(Promise("mix", math.inf, "separation"), "one operator", 0.5)
    traffic = OfflineTraffic(fetched=9, used=8, bytes_up=400)
    run = replace(run, config=config, mode="mix", terms=terms, offline=traffic)
    summary = summarise(run)
    recorder = Recorder(config)
    begin(recorder, run)
    for sample in run.samples:
        recorder.sample(sample)
    stream_of(recorder.folder, run.table.copy(), 2)
    recorder.end(run, summary)
    found = load_run(recorder.folder)
    assert same(found.table, run.table)
    assert summarise(found).as_dict() == summary.as_dict()
    assert summarise(found).series.as_dict() == summary.series.as_dict()
    assert json.loads((recorder.folder / "summary.json").read_text()) == json.loads(
        json.dumps(summary.as_dict())
    )
    about = json.loads((recorder.folder / "run.json").read_text())
    assert about["config"]["warm_up_s"] == 1 and about["machine"]["cores"] >= 1
    assert {path.suffix for path in recorder.folder.iterdir()} == {".json", ".jsonl", ".parquet"}
    assert all(b"secret" not in path.read_bytes() for path in recorder.folder.iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        Recorder(config)


def test_a_password_in_a_url_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/x/datamix", "simulate", "--url", "https://me:secret@a.b:8/c", "--rate", "5"]
    monkeypatch.setattr(sys, "argv", [*words, "--second=http://me:secret@d"])
    run = make_run()
    recorder = Recorder(replace(run.config, out=str(tmp_path / "run")))
    begin(recorder, run)
    told = json.loads((recorder.folder / "run.json").read_text())["command"]
    assert told[:4] == ["datamix", "simulate", "--url", "https://a.b:8/c"]
    assert told[-1] == "--second=http://d"


def test_a_shard_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    elsewhere: Any = SimpleNamespace(config=SimpleNamespace(out=str(tmp_path / "no")), number=3)
    with pytest.raises(ConfigError, match="where shard 3 runs"):
        recording(elsewhere)


@pytest.mark.parametrize("pacer", ["poisson", "closed:think_s=0.05"])
def test_shards_record_while_they_run(pacer: str, tmp_path: Path) -> None:
    """Also in a closed loop, whose table grows as it goes."""
    with running(FakeCloud(polite)) as cloud:
        config = FleetConfig(
            url=cloud.url,
            workload="echo",
            devices=20,
            rate=200,
            duration_s=1.2,
            processes=2,
            pacer=pacer,
            out=str(tmp_path / "run"),
        )
        summary = simulate(config)
    found = load_run(tmp_path / "run")
    assert summarise(found).as_dict() == summary.as_dict()
    assert len(list((tmp_path / "run").glob("progress-*.jsonl"))) == 2
    last = store.read_progress(tmp_path / "run")
    assert sum(line["rows"] for line in last.values()) == summary.inferences == cloud.requests
    assert len(found.samples) >= 2


def test_a_killed_run_has_everything_older_than_a_second(tmp_path: Path) -> None:
    """SIGKILL to the whole run, in the middle of it; the cloud knows what it answered, and when."""
    answered_s: list[float] = []
    lock = threading.Lock()

    def note(connection: Connection, request: wire.Request) -> None:
        with lock:
            answered_s.append(time.monotonic())
        connection.send(echo(request))

    folder = tmp_path / "run"
    with running(FakeCloud(note)) as cloud:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "simulate", "--url", cloud.url]
            + ["--workload", "echo", "--devices", "20", "--rate", "150", "--processes", "2"]
            + ["--duration", "600", "--out", str(folder)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline_s = time.monotonic() + 30
            while not answered_s or time.monotonic() < answered_s[0] + 2.2:
                assert time.monotonic() < deadline_s and process.poll() is None
                time.sleep(0.02)
        finally:
            shards = psutil.Process(process.pid).children(True)
            killed_s = time.monotonic()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            psutil.wait_procs(shards, 10)
    old = sum(at_s < killed_s - 1.0 for at_s in answered_s)
    assert old > 100
    run = load_run(folder)
    assert len(run.table) >= old
    # Not only as many: these very ones, and nothing that the cloud did not answer.
    done_s = np.sort(run.table["done_s"] + run.start_s)
    assert len(run.table) <= len(answered_s)
    assert np.all(done_s[:old] >= np.array(answered_s[:old]) - 1e-6)
    assert np.all(run.table["status"] == result.OK)
    assert len(np.unique(run.table["index"])) == len(run.table)
    summary = summarise(run)
    assert summary.exit_code == 3 and "cut off" in str(summary.invalid_reason)
    assert summary.ok == len(run.table) and summary.duration_s < 30


class _Full:
    """A stream on a disk that is full."""

    def look(self) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_run_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PERIOD_S", 0.001)
    heard: list[Exception] = []
    said = threading.Event()

    def hear(error: Exception) -> None:
        heard.append(error)
        said.set()

    full: Any = _Full()
    with Streaming(full, hear):
        assert said.wait(10)
    assert isinstance(heard[0], ConfigError) and "No space left" in str(heard[0])


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: (f / "run.json").unlink(), "run.json"),
        (lambda f: (f / "run.json").write_text("{"), "no JSON"),
        (lambda f: (f / "run.json").write_text("[]"), "expected an object"),
        (lambda f: (f / "run.json").write_text('{"format": 9}'), "format 9"),
        (lambda f: (f / "end.json").write_text("{}"), "no record of a run"),
        (lambda f: (f / store.ROWS).write_bytes(b"PAR1"), "no Parquet"),
        (lambda f: (f / store.ROWS).unlink(), "has no rows"),
        (lambda f: pq.write_table(pa.table({"index": [1]}), f / store.ROWS), "uint32"),
    ],
)
def test_what_is_no_record_is_refused_in_a_sentence(tmp_path: Path, spoil: Any, word: str) -> None:
    run = make_run()
    config = replace(run.config, out=str(tmp_path / "run"))
    recorder = Recorder(config)
    begin(recorder, run)
    recorder.end(run, summarise(run))
    spoil(recorder.folder)
    with pytest.raises(ConfigError, match=word):
        load_run(recorder.folder)


def test_garbage_is_no_stream(tmp_path: Path) -> None:
    path = tmp_path / store.stream_name(0)
    path.write_bytes(b"not arrow " * 1000)
    with pytest.raises(ConfigError, match="no Arrow stream"):
        read_stream(path)
