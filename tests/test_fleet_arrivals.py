"""Laws of arrivals are pure, so these tests are tables and properties; none sleeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.fleet import arrivals, pacing, trace
from edge.fleet.arrivals import Arrivals, Closed, parse

OPEN = ["poisson", "constant", "gamma:shape=0.25", "ramp:to=400", "steps:1=20,2=0.5"]
OPEN += ["diurnal:depth=0.9", "diurnal:depth=1,period_s=0.7"]


def law(text: str) -> Arrivals:
    found = parse(text)
    assert not isinstance(found, Closed)
    return found


@given(st.sampled_from(OPEN), st.floats(0.1, 300), st.floats(2.1, 9), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_times_never_fall_lie_within_the_run_and_come_again(
    text: str, rate: float, duration_s: float, seed: int
) -> None:
    times = law(text).times(rate, duration_s, seed)
    assert times.dtype == np.float64
    assert np.all(np.diff(times) >= 0)
    assert np.all((times >= 0) & (times < duration_s))
    assert np.array_equal(times, law(text).times(rate, duration_s, seed))


def ramp(t: Any) -> Any:
    return 100 * t + 300 * t**2 / 40


def steps(t: Any) -> Any:
    return 100 * np.minimum(t, 5) + 1000 * np.clip(t - 5, 0, 5) + 10 * np.maximum(t - 10, 0)


def diurnal(t: Any) -> Any:
    return 100 * (t - 0.8 * 5 / (2 * np.pi) * np.sin(2 * np.pi * t / 5))


@pytest.mark.parametrize(
    ("text", "mass"),
    [
        ("poisson", lambda t: 100 * t),
        ("ramp:to=400", ramp),
        ("ramp:to=0", lambda t: 100 * t - 100 * t**2 / 40),
        ("steps:5=1000,10=10", steps),
        ("diurnal:depth=0.8,period_s=5", diurnal),
        ("gamma:shape=4", lambda t: 100 * t),
    ],
)
def test_counts_follow_the_integral_of_the_rate(text: str, mass: Callable[[Any], Any]) -> None:
    """Fifty runs of 20 s in bins of a second, each within five deviations of its expectation."""
    edges = np.arange(21.0)
    runs = [np.histogram(law(text).times(100, 20, seed), edges)[0] for seed in range(50)]
    expected = np.diff(mass(edges)) * len(runs)
    found = np.sum(runs, axis=0)
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected) + 1), found / expected


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_deviation_of_their_shape(shape: float) -> None:
    times = law(f"gamma:shape={shape}").times(1000, 100, 1)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(shape**-0.5, rel=0.05)


def test_a_bursty_run_begins_anywhere_in_a_gap() -> None:
    """Begun at an arrival, short runs would have (1/shape - 1) / 2 = 1.5 arrivals too many."""
    counts = [len(law("gamma:shape=0.25").times(20, 0.5, seed)) for seed in range(4000)]
    assert np.mean(counts) == pytest.approx(10, abs=5 * np.std(counts) / np.sqrt(len(counts)))


@given(
    st.sampled_from([*OPEN, "closed:think_s=0.1"]), st.integers(1, 40), st.integers(1, 7),
    st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_shards_share_one_schedule(text: str, devices: int, shards: int, seed: int) -> None:
    whole = pacing.schedule(text, 60, 3, devices, seed)
    parts = [whole.shard(number, shards) for number in range(shards)]
    joined = np.concatenate([part.index for part in parts])
    assert np.array_equal(np.sort(joined), np.sort(whole.index))
    for part in parts:
        assert np.all(np.diff(part.due_s) >= 0) and part.closed == whole.closed
        found = np.isin(whole.index, part.index)
        assert np.array_equal(whole.due_s[found], part.due_s)
        assert np.array_equal(whole.device[found], part.device)


def test_a_closed_loop_begins_with_a_thought_per_device() -> None:
    schedule = pacing.schedule("closed:think_s=2", 1, 1000, 3000, 7)
    assert len(schedule) == 3000 and schedule.closed == Closed(2.0)
    assert np.array_equal(schedule.index, schedule.device)
    assert schedule.due_s.mean() == pytest.approx(2, rel=0.1)
    assert schedule.distinct > len(schedule)
    thoughts = [Closed(2.0).thought_s(7, device, 3) for device in range(3000)]
    assert np.mean(thoughts) == pytest.approx(2, rel=0.1)
    assert abs(np.corrcoef(thoughts, schedule.due_s)[0, 1]) < 0.1
    # Who only thinks until after the end asks nothing.
    assert len(pacing.schedule("closed:think_s=2", 1, 1, 3000, 7)) == np.sum(schedule.due_s < 1)


@pytest.mark.parametrize(
    "text",
    ["", "bursts", "poisson:rate=3", "gamma", "gamma:shape=0", "gamma:shape=nan", "gamma:shape=1e9",
     "gamma:shape=1,shape=2", "ramp", "ramp:to=-1", "ramp:to=inf", "ramp:to", "steps:", "steps:5",
     "steps:5=10,2=3", "steps:-1=3", "steps:1=-3", "steps:1=1,1=2", "diurnal:depth=1.1",
     "diurnal:period_s=-1", "diurnal:phase=3", "trace:", "closed", "closed:think_s=-1",
     "closed:think_s=one"],
)  # fmt: skip
def test_arrivals_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse(text)


@pytest.mark.parametrize("text", ["poisson", "constant", "gamma:shape=1", "ramp:to=1e30"])
def test_more_than_memory_holds_is_refused_before_it_is_drawn(text: str) -> None:
    with pytest.raises(ConfigError, match="at most"):
        law(text).times(1e12, 1e12, 0)


def test_steps_that_never_come_are_refused() -> None:
    with pytest.raises(ConfigError, match="before the end"):
        law("steps:30=5").times(10, 20, 0)
    with pytest.raises(ConfigError, match="rate 0"):
        law("steps:0=0").times(10, 20, 0)


# --- traces ---------------------------------------------------------------------------------------


def test_a_trace_is_read_from_csv_and_parquet_alike(tmp_path: Path) -> None:
    times, devices = [3.0, 0.5, 1.5, 0.25], [2, 0, 1, 3]
    text = "device,note,send_s\n" + "".join(
        f"{d},x,{t}\n" for t, d in zip(times, devices, strict=True)
    )
    (tmp_path / "a.csv").write_text(text)
    pq.write_table(pa.table({"send_s": times, "device": devices}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        schedule = pacing.schedule(f"trace:{tmp_path / name}", 1, 2.0, 4, 0)
        assert schedule.due_s.tolist() == [0.25, 0.5, 1.5]  # in order, and the last is too late
        assert schedule.device.tolist() == [3, 0, 1]
    with pytest.raises(ConfigError, match="names device 3, expected 0 to 2"):
        pacing.schedule(f"trace:{tmp_path / 'a.csv'}", 1, 2.0, 3, 0)
    with pytest.raises(ConfigError, match="first send at 0.25 s"):
        pacing.schedule(f"trace:{tmp_path / 'a.csv'}", 1, 0.2, 4, 0)


def test_a_trace_without_devices_gets_them_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("send_s\n" + "\n".join(map(str, range(1000))))
    one, two = (pacing.schedule(f"trace:{path}", 1, 2000, 10, seed) for seed in (1, 2))
    assert np.array_equal(one.due_s, two.due_s) and not np.array_equal(one.device, two.device)
    assert set(one.device) == set(range(10))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "columns"),
        (b"time\n1\n", "'send_s' among them"),
        (b"send_s\n", "no rows"),
        (b"send_s\n1\nnan\n", "nan in row 2"),
        (b"send_s\n-1\n", "0 or more"),
        (b"send_s\n1e999\n", "inf in row 1"),
        (b"send_s\nsoon\n", "'soon' in line 2"),
        (b"send_s,device\n1\n", "device ''"),
        (b"send_s,device\n1,1.5\n", "whole number"),
        (b"send_s,device\n1,-1\n", "whole number"),
        (b"send_s,device\n1,nan\n", "whole number"),
        (b"send_s,device\n1,1e20\n", "whole number"),
        (b"\xff\xfe\x00send_s\n", "no CSV file"),
        (b'send_s\n"1', "no CSV file"),
        (b"send_s\n" + b"1" * 200_000, "no CSV file"),
    ],
)
def test_a_csv_file_that_is_no_trace_is_refused(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        trace.read(str(path))


def test_a_parquet_file_that_is_no_trace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    for columns, sentence in [
        ({"time": [1.0]}, "'send_s' among them"),
        ({"send_s": ["1"]}, "expected numbers"),
        ({"send_s": [1.0, None]}, "1 nulls"),
        ({"send_s": [1.0], "device": [[1]]}, "expected numbers"),
        ({"send_s": pa.array([], pa.float64())}, "no rows"),
    ]:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ConfigError, match=sentence):
            trace.read(str(path))
    pq.write_table(pa.table({"send_s": [1.0, 2.0, 3.0]}), path)
    monkeypatch.setattr(trace, "MOST_ROWS", 2)
    with pytest.raises(ConfigError, match="at most 2"):
        trace.read(str(path))
    with pytest.raises(ConfigError, match="more than 2 rows"):
        (tmp_path / "a.csv").write_text("send_s\n1\n2\n3\n")
        trace.read(str(tmp_path / "a.csv"))
    for damaged in (b"PAR1", path.read_bytes()[:-9], b"send_s\n1\n"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="no Parquet file"):
            trace.read(str(path))
    with pytest.raises(ConfigError, match="is no file"):
        trace.read(str(tmp_path))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, rest: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(b"send_s,device\n" + rest)
    try:
        found = trace.read(str(path))
    except ConfigError:
        return
    assert len(found.due_s) and np.isfinite(found.due_s).all()


def test_a_run_of_the_smallest_and_largest_rates_has_its_times() -> None:
    assert len(arrivals.Constant().times(1e-9, 1, 0)) == 1
    assert len(arrivals.Poisson().times(1e-9, 1, 0)) == 0
    assert len(law("gamma:shape=0.001").times(10, 1, 3)) < 10_000
