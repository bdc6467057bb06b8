"""Measuring an engine: on a clock that the tests own, and once from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli import main
from deployments.config import Config
from deployments.emulated import Cost, EmulatedEngine
from deployments.engine import Pending, Rows
from deployments.profile import read_profile
from deployments.profiling import fit, measure, sizes
from tests.jobs import Clock

BUNDLE = Path(__file__).parents[1] / "bundles" / "fashion-mnist-mix"
SHAPES = [(2, 3, 3), (4, 1, 1)]


@given(a_s=st.floats(0, 1), b_s=st.floats(0, 0.1), most=st.integers(2, 1000))
def test_a_line_is_found_again(a_s: float, b_s: float, most: int) -> None:
    line = fit([(rows, a_s + b_s * rows) for rows in sizes(most)])
    assert line.a_s == pytest.approx(a_s, abs=1e-6)
    assert line.b_s == pytest.approx(b_s, abs=1e-6)
    assert line.error < 1e-3


samples = st.lists(
    st.tuples(st.integers(1, 4096), st.floats(0, 100)),
    min_size=1,
    max_size=12,
    unique_by=lambda sample: sample[0],
)


@given(samples)
def test_whatever_was_measured_gives_a_rising_line(history: list[tuple[int, float]]) -> None:
    line = fit(history)
    assert line.a_s >= 0
    assert line.b_s >= 0
    assert line.error >= 0


def test_lines_that_would_fall_or_begin_below_zero() -> None:
    falling = fit([(1, 2.0), (100, 1.0)])
    assert falling.b_s == 0
    assert 1.0 <= falling.a_s <= 2.0
    steep = fit([(1, 0.01), (10, 1.0), (100, 11.0)])
    assert steep.a_s == 0
    assert steep.b_s > 0


def test_one_row_counts_as_much_as_a_full_batch() -> None:
    """The absolute error of the largest batch would drown that of the smallest."""
    line = fit([(1, 0.0010), (2, 0.0011), (64, 0.0200), (256, 0.0500)])
    assert line.a_s + line.b_s == pytest.approx(0.0010, rel=0.35)
    assert line.error < 0.5


def test_sizes() -> None:
    assert sizes(1) == [1]
    assert sizes(2) == [1, 2]
    assert sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert sizes(128)[-2:] == [64, 128]


class Watched(EmulatedEngine):
    """Remembers how many rows its requests had."""

    def __init__(self, clock: Clock, depth: int) -> None:
        def sleep(seconds: float) -> None:
            clock.now += seconds

        costs = [Cost(0.5, 0.25, 0.125, 0.0625), Cost(2.0, 0.0)]
        super().__init__(SHAPES, costs, name="x", depth=depth, clock=clock, sleep=sleep)
        self.seen: list[list[int]] = []

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        self.seen.append([len(rows.features) for rows in requests])
        return super().start(block, requests)


def test_an_engine_is_measured() -> None:
    clock = Clock()
    engine = Watched(clock, 2)
    first, second = measure(engine, 12, request_rows=5, rounds=3, clock=clock)
    for got, wanted in zip(first.cost, Cost(0.5, 0.25, 0.125, 0.0625), strict=True):
        assert got == pytest.approx(wanted)
    for got, wanted in zip(second.cost, Cost(2.0, 0.0), strict=True):
        assert got == pytest.approx(wanted, abs=1e-9)
    assert first.fit_error == pytest.approx(0.0, abs=1e-9)
    assert [sample.rows for sample in first.measured] == [1, 2, 4, 8, 12]
    assert engine.seen[:5] == [[1], [2], [4], [5, 3], [5, 5, 2]]
    assert len(engine.seen) == 2 * 5 * 4


def test_where_nothing_overlaps_the_copy_is_part_of_the_computation() -> None:
    clock = Clock()
    first, _ = measure(Watched(clock, 1), 8, rounds=1, clock=clock)
    for got, wanted in zip(first.cost, Cost(0.625, 0.3125), strict=True):
        assert got == pytest.approx(wanted, abs=1e-9)


# --- the command --------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["profile-engine", *arguments])
    return int(done.value.code or 0)


def test_the_command_writes_a_profile_that_can_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    options = ["--bundle", str(BUNDLE), "--json", str(path), "--max-batch-rows", "8"]
    assert run(*options, "--rounds", "2", "--threads", "1", "--machine", "a test") == 0
    profile = read_profile(path)
    assert (profile.name, profile.machine) == ("fashion-mnist-mix-cpu", "a test")
    assert (profile.engine, profile.depth) == ("torch:cpu:float32", 1)
    assert [sample.rows for sample in profile.blocks[1].measured] == [1, 2, 4, 8]
    for block in profile.blocks:
        assert block.a_s + block.b_s > 0
        assert block.copy_a_s == block.copy_b_s == 0
    shown = capsys.readouterr().out
    assert shown.startswith("torch:cpu:float32 on a test, batches of up to 8 rows\nblock 0: ")
    assert shown.count(" rows: ") == 8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "gpu"], "engine device is 'gpu', expected cpu, cuda or cuda:N"),
        (["--name", "a b", "--rounds", "1"], "profile: name: String should match pattern"),
        (["--dtype", "float16"], "dtype is 'float16', expected another one on the processor"),
    ],
)
def test_what_the_command_refuses(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    base = ["--bundle", str(BUNDLE), "--json", str(path), "--max-batch-rows", "4"]
    assert run(*base, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not path.exists()


def test_a_profile_reaches_replicas_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in a folder of their own."""
    served: list[Config] = []
    monkeypatch.setattr("cluster.serve.serve", lambda config, **rest: served.append(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["serve", "--engine", "emulated:here.json", "--echo-shape", "2,3,3"])
    assert [config.engine for config in served] == [f"emulated:{tmp_path / 'here.json'}"]
