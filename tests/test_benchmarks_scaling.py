"""The plan's arithmetic holds for any figures, and docs/scaling.md shows what it gives."""

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scaling
from benchmarks import scaling_cases as known
from benchmarks import scaling_plan as plans
from benchmarks.scaling_plan import Behaviour, Case, Fleetwide, Node, Stream, Workload
from deployments.profile import BlockProfile, Profile

TIERS = ((10.0, 0.09), (50.0, 0.08), (math.inf, 0.05))


def positive(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


Standard = tuple[dict[str, Any], list[Case]]


@pytest.fixture(scope="module")
def standard() -> Standard:
    return known.standard()


CASES = st.builds(
    Case,
    title=st.just("any"),
    workload=st.builds(
        Workload,
        name=st.just("any"),
        rows=st.integers(1, 64),
        rounds=st.integers(1, 4),
        up_bytes=positive(1e2, 1e7),
        down_bytes=positive(1e2, 1e7),
        flops_per_row=positive(1e3, 1e10),
    ),
    behaviour=st.builds(
        Behaviour,
        per_day=positive(0.1, 1e5),
        peak=positive(1, 2),
        idle_timeout_s=positive(1, 1e4),
    ),
    stream=st.builds(
        Stream,
        door_s=positive(1e-7, 1e-3),
        loop_s=positive(1e-7, 1e-3),
        door_open_s=positive(1e-6, 1e-2),
        loop_open_s=positive(1e-6, 1e-2),
        door_idle_s=positive(0, 1e-4),
        loop_idle_s=positive(0, 1e-4),
        memory_bytes=positive(1e3, 1e6),
    ),
    node=st.builds(
        Node,
        connections=positive(1e2, 1e6),
        door_cores=positive(0.1, 64),
        loop_cores=positive(0.1, 0.9),
        memory_bytes=positive(1e9, 1e12),
        rows_per_s=positive(1, 1e7),
        bytes_per_s=positive(1e6, 1e11),
        gpus=st.integers(0, 8),
        usd_per_hour=positive(0.01, 100),
    ),
    fleetwide=st.builds(
        Fleetwide,
        nodes_per_cluster=st.integers(2, 1000),
        ports=positive(1e3, 1e5),
        report_s=positive(1, 10),
        devices_per_region=st.integers(1, 10_000_000),
        head_usd_per_hour=positive(0.01, 10),
        egress=st.just(TIERS),
    ),
)
DEVICES = st.integers(1, 10_000_000)


# ------------------------------------------------------------------ streams


@given(rate=positive(1e-9, 100), timeout_s=positive(1, 1e5))
def test_a_share_of_devices_is_connected(rate: float, timeout_s: float) -> None:
    share = plans.connected_share(rate, timeout_s)
    assert 0 < share <= 1
    assert 0 <= plans.opening_rate(rate, timeout_s) <= rate
    assert plans.connected_share(2 * rate, timeout_s) >= share
    assert plans.opening_rate(rate, 2 * timeout_s) <= plans.opening_rate(rate, timeout_s)


@pytest.mark.parametrize("mean_s", [100.0, 600.0, 5000.0])
def test_streams_as_devices_played_through(mean_s: float) -> None:
    """One device that asks at random, for a long time: how long it holds a stream, how often."""
    draw, timeout_s, requests = random.Random(1), 600.0, 50_000
    gaps = [draw.expovariate(1 / mean_s) for _ in range(requests)]
    total_s = sum(gaps)
    held_s = sum(min(gap, timeout_s) for gap in gaps)
    opened = sum(gap > timeout_s for gap in gaps)
    assert held_s / total_s == pytest.approx(plans.connected_share(1 / mean_s, timeout_s), rel=0.02)
    expected = plans.opening_rate(1 / mean_s, timeout_s) * total_s
    assert abs(opened - expected) < 4 * math.sqrt(expected)  # four deviations of chance


# ------------------------------------------------------------------ plans


@given(case=CASES, devices=DEVICES)
def test_no_limit_of_a_node_is_exceeded(case: Case, devices: int) -> None:
    found = plans.plan(case, devices)
    working = found.nodes - found.clusters
    has = plans.gives(case.node)
    for limit, use in plans.takes(case, case.behaviour.peak).items():
        assert devices * use <= working * has[limit] * (1 + 1e-9), limit
    assert found.full <= 1 + 1e-9
    assert found.limit in has


@given(case=CASES, devices=DEVICES)
def test_one_node_less_would_be_too_few(case: Case, devices: int) -> None:
    found = plans.plan(case, devices)
    working = found.nodes - found.clusters
    if working > 2:  # two may be there for their ports
        use = plans.takes(case, case.behaviour.peak)[found.limit]
        assert devices * use > (working - 1) * plans.gives(case.node)[found.limit] * (1 - 1e-9)


@given(case=CASES, devices=DEVICES)
def test_a_single_machine_has_ports_for_its_streams(case: Case, devices: int) -> None:
    found = plans.plan(case, devices)
    assert found.nodes - found.clusters > 1 or found.streams <= case.fleetwide.ports


@given(case=CASES, devices=DEVICES)
def test_clusters_and_regions_hold_their_parts(case: Case, devices: int) -> None:
    found = plans.plan(case, devices)
    assert found.clusters % found.regions == 0
    assert devices <= found.regions * case.fleetwide.devices_per_region
    working = found.nodes - found.clusters
    # As evenly as whole clusters allow.
    assert working <= found.clusters * (case.fleetwide.nodes_per_cluster - 1)


@given(case=CASES, devices=st.integers(1, 5_000_000))
def test_more_devices_never_need_less(case: Case, devices: int) -> None:
    few, many = plans.plan(case, devices), plans.plan(case, 2 * devices)
    for name in ("streams", "nodes", "clusters", "regions", "usd_per_day", "peak_usd_per_day"):
        assert getattr(many, name) >= getattr(few, name) * (1 - 1e-9), name
    assert many.rows_per_s == pytest.approx(2 * few.rows_per_s)
    assert many.egress_usd_per_day >= few.egress_usd_per_day * (1 - 1e-9)


@given(case=CASES, devices=DEVICES)
def test_following_the_load_costs_no_more(case: Case, devices: int) -> None:
    found = plans.plan(case, devices)
    assert 0 < found.usd_per_day <= found.peak_usd_per_day * (1 + 1e-9)
    flat = dataclasses.replace(case, behaviour=dataclasses.replace(case.behaviour, peak=1.0))
    even = plans.plan(flat, devices)
    assert even.usd_per_day == pytest.approx(even.peak_usd_per_day)


@given(peak=positive(1, 2))
def test_a_day_has_its_mean_and_its_peak(peak: float) -> None:
    hours = plans.day(peak)
    assert len(hours) == 24
    assert sum(hours) / 24 == pytest.approx(1)
    assert max(hours) == pytest.approx(peak) and min(hours) >= 0


@given(gigabytes=positive(0, 1e6), more=positive(0, 1e6))
def test_egress_gets_cheaper_by_the_byte_and_dearer_in_all(gigabytes: float, more: float) -> None:
    price = plans.egress_usd(gigabytes, TIERS)
    assert 0.05 * gigabytes <= price * (1 + 1e-9) and price <= 0.09 * gigabytes * (1 + 1e-9)
    assert plans.egress_usd(gigabytes + more, TIERS) >= price * (1 - 1e-9)


def test_egress_by_hand() -> None:
    assert plans.egress_usd(60, TIERS) == pytest.approx(10 * 0.09 + 40 * 0.08 + 10 * 0.05)


# ------------------------------------------------------------------ measured figures


@given(x=positive(0, 1e4))
def test_interpolation(x: float) -> None:
    points = [(1.0, 2.0), (33.0, 10.0), (256.0, 40.0)]
    for at, value in points:
        assert known.interpolated(at, points) == pytest.approx(value)
    assert known.interpolated(x + 1, points) >= known.interpolated(x, points)


def test_a_message_costs_what_was_measured() -> None:
    rows = known.result("field")["rows"]
    (measured,) = (
        row["server CPU us"]
        for row in rows
        if row["path"] == "ours, stream" and row["connections"] == "4,096"
    )
    assert known.message_cpu(33) == pytest.approx(1e-6 * measured)
    assert known.message_cpu(512) > known.message_cpu(256)
    door, loop = known.shares()
    assert 0 < door < loop < 1 and door + loop < 1


def test_the_largest_run_costs_what_its_parts_do() -> None:
    found = scaling.replay()
    assert all(seconds > 0 for seconds in found.predicted_s.values())
    assert sum(found.predicted_s.values()) == pytest.approx(found.measured_s, rel=0.3)


def test_the_standard_cases_hold_together(standard: Standard) -> None:
    settings, cases = standard
    by_title = {case.title: case for case in cases}
    small = by_title["fashion-mnist-mix on c7i.2xlarge"].workload
    # What `modes` counted on the wire for the same bundle, per message.
    (uplink,) = (
        int(row["uplink"].removesuffix(" bytes").replace(",", ""))
        for row in known.result("modes")["rows"]
        if row["bundle"] == small.name and row["mode"] == "mix"
    )
    assert small.up_bytes * small.rounds == pytest.approx(uplink, rel=0.02)
    for case in cases:
        assert case.node.connections < known.maxconn()
        assert all(value > 0 for value in plans.gives(case.node).values())
    # A GPU that is assumed ten times as fast as all cores, and no more than its share of the peak.
    for entry, case in zip(settings["cases"], cases, strict=True):
        if entry["engine"] == "gpu":
            peak = 1e12 * settings["documented"]["gpu_peak_tflops"]["value"]
            share = settings["assumed"]["gpu_share_of_peak"]["value"]
            assert case.node.rows_per_s * case.workload.flops_per_row < peak * share


def test_every_figure_says_where_it_is_from() -> None:
    settings = known.read_settings()
    assert all(entry["source"] for entry in settings["documented"].values())
    assert all(entry["why"] for entry in settings["assumed"].values())
    assert settings["prices"]["source"] and settings["prices"]["date"]
    used = {entry["machine"] for entry in settings["cases"]} | {settings["head"]}
    assert used == set(settings["prices"]["hour"])


def test_a_profile_of_ones_own() -> None:
    settings = known.read_settings()
    slow = Profile(
        schema_version=1,
        name="slow",
        max_batch_rows=256,
        blocks=(BlockProfile(a_s=0.01, b_s=0.001),),
    )
    entry = settings["cases"][0]
    case = known.build_case(settings, entry, profile=slow, per_day=10, peak=1.5)
    assert case.node.rows_per_s < 1 / 0.001
    assert (case.behaviour.per_day, case.behaviour.peak) == (10, 1.5)


# ------------------------------------------------------------------ the page


def test_the_page_shows_what_the_command_gives(standard: Standard) -> None:
    page = scaling.PAGE.read_text()
    made = scaling.tables(*standard)
    assert page == scaling.filled(page, made), "run `python -m benchmarks.scaling --write`"


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has places for"):
        scaling.filled("nothing", {"a": "b"})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4e-8, "0"), (1234.5, "1,230"), (0.01234, "0.0123"), (12.0, "12.0")],
)
def test_figures(value: float, text: str) -> None:
    assert scaling.figure(value) == text


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments])
    try:
        scaling.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plans.json"
    assert run(monkeypatch, "--devices", "5000", "--per-day", "20", "--json", str(out)) == 0
    assert "| devices | 5,000 |" in capsys.readouterr().out
    plans: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    assert all([p["devices"] for p in found] == [5000] for found in plans.values())
    assert run(monkeypatch, "--write", "--per-day", "20") == 2
    assert "change that instead" in capsys.readouterr().err
    assert run(monkeypatch, "--peak", "3") == 2
    assert "peak is 3, expected 1 to 2" in capsys.readouterr().err
