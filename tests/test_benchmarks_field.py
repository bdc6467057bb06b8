"""The side-by-side run measures the points it says, and its figures are ratios within rounds."""

import contextlib
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import accounting, field, load
from benchmarks.bare import bare_server
from benchmarks.field import Arm, Point
from benchmarks.peers import process
from datamix import wire


def run(rate: float, **parts_us: float) -> load.Load:
    messages = int(rate)
    return load.Load(
        messages=messages,
        seconds=1.0,
        client_cpu_s=0.1,
        client_busiest=0.1,
        server_parts_s={name: us * messages / 1e6 for name, us in parts_us.items()},
        bytes_each=33_000,
        p50_s=0.001,
        p99_s=0.002,
    )


OURS = Arm(field.STREAM, "stream", "ws://h", "ours")
MOSEC = Arm("mosec:workers=2", "post", "http://h", "mosec:workers=2", peer=True)
DEFAULT = Arm("default Serve, @serve.batch", "post", "http://h", "default")


def test_one_axis_at_a_time() -> None:
    assert field.points([33, 1], [64, 16]) == [Point(33, 64), Point(1, 64), Point(33, 16)]


@pytest.mark.parametrize("kilobytes", field.SHAPES)
def test_messages_have_about_the_size_they_are_called_by(kilobytes: int) -> None:
    message = field.encode(kilobytes)
    assert kilobytes * 1000 <= len(message) <= kilobytes * 1024 + 1000
    assert wire.decode_request(message).rows == field.ROWS


def test_figures_are_medians_of_each_rounds_ratio() -> None:
    found = {
        # The machine is twice as slow in the second round, for everybody.
        OURS: [run(1000, replica=50.0), run(500, replica=100.0), run(1000, replica=50.0)],
        MOSEC: [run(500, worker=100.0), run(250, worker=200.0), run(2000, worker=25.0)],
        DEFAULT: [run(100, proxy=1000.0)] * 3,
    }
    figures = field.figures(found)
    assert figures == {
        "stream_server_cpu_us": pytest.approx(50),
        "stream_cpu_over_mosec_workers_2": pytest.approx(0.5),
        "stream_cpu_over_default": pytest.approx(0.05),
        "stream_rate_over_best_peer": pytest.approx(2),
    }


def test_a_row_is_told_by_process() -> None:
    runs = [run(1000, replica=50.0, haproxy=20.0), run(1000, replica=70.0, idle=0.01)]
    row = field.summary(OURS, Point(33, 64), runs, processes=True)
    assert row["server CPU us"] == pytest.approx(70.0, abs=0.1)
    assert row["CPU us by process"] == "replica 60, haproxy 10"
    assert "CPU us by process" not in field.summary(OURS, Point(33, 64), runs, processes=False)


def test_a_failed_path_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_for_peers(arm: Arm, *_: Any) -> load.Load:
        if arm.peer:
            raise RuntimeError("no answer")
        return run(1000, replica=50.0)

    monkeypatch.setattr(field, "turn", fail_for_peers)
    faults: list[str] = []
    found = field.measure([OURS, MOSEC], Point(33, 64), 2, 1.0, faults)
    assert {arm.path: len(runs) for arm, runs in found.items()} == {field.STREAM: 2}
    assert faults == ["mosec:workers=2, 33 kB, 64 connections: no answer"]


@pytest.mark.parametrize("kind", ["stream", "post"])
def test_clients_count_what_a_server_echoes(kind: str) -> None:
    message = field.encode(33)
    with bare_server(kind, mark="bare") as url:
        found = load.run(kind, url, message, connections=4, warm_s=0.1, run_s=0.3, mark="bare")
    assert found.messages > 10
    assert 0 < found.p50_s <= found.p99_s < 1
    assert found.client_us > 0
    assert list(found.server_parts_s) == ["python child"]
    assert multiprocessing.active_children() == []


def test_a_server_that_answers_less_is_a_fault() -> None:
    with (
        bare_server("post") as url,
        pytest.raises(RuntimeError, match="an answer has 33440 bytes, expected 66880"),
    ):
        load.run("post", url, field.encode(33), connections=2, run_s=0.1, least_share=2.0)


def test_peers_need_their_environment() -> None:
    with pytest.raises(FileNotFoundError, match=r"requirements\.txt"):
        process.python(Path("nowhere"))


def test_every_peer_has_its_program_and_its_pin() -> None:
    folder = process.ROOT / "benchmarks" / "peers"
    pins = (folder / "requirements.txt").read_text()
    for peer in process.PATHS:
        assert (folder / f"{peer}_app.py").exists()
        assert f"{process.DISTRIBUTIONS.get(peer, peer)}==" in pins


def test_triton_is_told_that_the_body_is_the_tensor() -> None:
    assert "inference-header-content-length" in process.headers("triton:threads=2")
    assert process.headers("mosec") == {"content-type": wire.MEDIA_TYPE}


def test_only_a_polling_peer_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    still = Arm("litserve:fronts=1", "post", "http://h", "litserve:fronts=1", peer=True)

    def frozen(mark: str) -> contextlib.AbstractContextManager[None]:
        stopped.append(mark)
        return contextlib.nullcontext()

    monkeypatch.setattr(process, "frozen", frozen)
    monkeypatch.setattr(load, "run", lambda *_, **__: run(1000, replica=50.0))
    monkeypatch.setattr(field, "settle", lambda arm: None)
    for arm in (OURS, MOSEC, still):
        field.turn(arm, [OURS, MOSEC, DEFAULT, still], b"", 1, 1.0)
    assert stopped == [still.mark] * 2


def test_too_few_answers_are_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "run", lambda *_, **__: run(29, replica=50.0))
    monkeypatch.setattr(field, "settle", lambda arm: None)
    with pytest.raises(RuntimeError, match="29 messages were answered in 1 s, expected 30"):
        field.turn(OURS, [OURS], b"", 1, 1.0)


def test_frozen_processes_stand_still_and_go_on() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()"],
        env=accounting.environment("freeze"),
        stdin=subprocess.PIPE,
    ) as child:
        with process.frozen("freeze"):
            status = psutil.Process(child.pid).status()
            while status != psutil.STATUS_STOPPED:  # the signal takes a moment
                status = psutil.Process(child.pid).status()
        child.communicate(b"\n", timeout=30)
    assert child.returncode == 0
