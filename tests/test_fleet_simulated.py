"""Devices with processors and links of their own, and closed loops, against a fake cloud."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from datamix import wire
from datamix.models import Architecture
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.inputs import bundle_workload
from edge.fleet.links import Link
from edge.fleet.profiles import Profile, Times
from edge.fleet.shard import Shard
from edge.fleet.workload import EchoWorkload
from tests.fake_cloud import SHAPE, Connection, FakeCloud, echo, polite
from tests.test_fleet_shard import fly, statuses
from tests.test_fleet_workload import Bench

SLOW = Times(stem_s=0.03, mix_s=0.01, encode_s=0.005, demix_s=0.02, head_s=0.015)
LINK = Link(up_bytes_per_s=1e6, down_bytes_per_s=1e6, round_trip_s=0.06)
PARTS = ("stem_s", "mix_s", "encode_s", "uplink_s", "downlink_s", "demix_s", "head_s")


def test_a_profile_is_charged_to_the_latency_and_not_to_the_generator() -> None:
    flown = fly(polite, profiles=(Profile("slow", 1.0, SLOW, LINK),), rate=100, timeout_s=5.0)
    table = flown.table
    assert statuses(flown) == {result.OK: 30}
    for stage in ("stem", "mix", "encode", "demix", "head"):
        assert np.allclose(table[f"{stage}_s"], getattr(SLOW, f"{stage}_s"))
    # Half a round trip and the bytes, each way; more where a message waits for the one before.
    assert np.all(table["uplink_s"] >= 0.03 + table["bytes_up"] / 1e6 - 1e-6)
    assert np.all(table["downlink_s"] >= 0.03 + table["bytes_down"] / 1e6 - 1e-6)
    charged_s = np.sum([table[part].astype(np.float64) for part in PARTS], axis=0)
    latency_s = table["done_s"] - table["scheduled_s"]
    # The rest is lag and the cloud's answer.
    rest_s = latency_s - charged_s - table["lag_s"]
    assert np.all(rest_s > -1e-3) and np.median(rest_s) < 0.1
    before_s = np.sum([table[part].astype(np.float64) for part in PARTS[:4]], axis=0)
    sent_s = table["sent_s"] - table["scheduled_s"]
    assert np.allclose(sent_s, before_s + table["lag_s"], atol=2e-3)
    assert np.median(table["lag_s"]) < 0.02 < before_s.min()


def test_a_device_without_a_profile_says_what_really_ran() -> None:
    table = fly(polite).table
    assert np.all(table["encode_s"] > 0) and np.all(table["encode_s"] <= table["lag_s"] + 1e-6)
    for part in ("stem_s", "uplink_s", "downlink_s", "demix_s", "head_s", "profile"):
        assert not table[part].any()


def test_messages_of_one_device_queue_on_its_link() -> None:
    thin = replace(LINK, up_bytes_per_s=20_000.0)
    flown = fly(
        polite, devices=1, rate=100, duration_s=0.1, timeout_s=9.0,
        profiles=(Profile("thin", 1.0, Times(), thin),),
    )  # fmt: skip
    table = flown.table
    assert statuses(flown) == {result.OK: 10}
    seconds = table["bytes_up"] / 20_000
    expected = np.cumsum(seconds) + 0.03
    # Ten messages due within 0.1 s, each of which takes longer than that to send.
    assert np.all(seconds > 0.01)
    assert np.allclose(table["scheduled_s"] + table["uplink_s"], expected, atol=0.05)


def test_kinds_go_by_device_and_are_the_same_in_any_number_of_shards() -> None:
    kinds = (Profile("fast", 0.5, Times(stem_s=0.01)), Profile("slow", 0.5, Times(stem_s=0.04)))

    async def go(shards: int) -> result.Table:
        cloud = FakeCloud()
        async with cloud.serve():
            config = FleetConfig(
                url=cloud.url, workload="echo", devices=20, rate=200, duration_s=0.3, profiles=kinds
            )
            work = EchoWorkload(SHAPE, 4, 0, True)
            fleet = [
                Shard(config, "echo", config.schedule().shard(n, shards), work, n, shards)
                for n in range(shards)
            ]
            await asyncio.gather(*(shard.connect() for shard in fleet))
            flown = await asyncio.gather(*(shard.run(shard.clock()) for shard in fleet))
            return result.merge([part.table for part in flown])

    one, two = asyncio.run(go(1)), asyncio.run(go(2))
    assert set(one["profile"]) == {0, 1}
    assert np.allclose(one["stem_s"], np.where(one["profile"] == 1, 0.04, 0.01))
    for column in ("index", "device", "profile", "stem_s"):
        assert np.array_equal(one[column], two[column]), column
    for device in range(20):
        assert len(set(one["profile"][one["device"] == device])) <= 1


def test_a_deadline_that_passes_on_the_link_is_a_timeout() -> None:
    far = Profile("far", 1.0, Times(), replace(LINK, round_trip_s=3.0))
    flown = fly(polite, profiles=(far,), rate=100, timeout_s=0.5)
    assert statuses(flown) == {result.TIMEOUT: 30}
    assert flown.counters.requests_sent == 0
    # Half way back, and after the answer, it is the same.
    back = Profile("back", 1.0, Times(), replace(LINK, down_bytes_per_s=100.0))
    flown = fly(polite, profiles=(back,), rate=100, timeout_s=0.5)
    assert statuses(flown) == {result.TIMEOUT: 30} and flown.counters.requests_sent == 30
    late = Profile("late", 1.0, Times(head_s=3.0))
    flown = fly(polite, profiles=(late,), rate=100, timeout_s=0.5)
    assert statuses(flown) == {result.TIMEOUT: 30} and flown.counters.requests_ok == 30


def test_the_deadline_in_a_message_is_what_the_device_has_left() -> None:
    left: list[float] = []

    def note(connection: Connection, request: wire.Request) -> None:
        left.append(request.deadline_s or 0.0)
        connection.send(echo(request))

    fly(note, profiles=(Profile("slow", 1.0, Times(stem_s=0.1, mix_s=0.1)),), timeout_s=2.0)
    assert np.allclose(left, 1.8, atol=0.002)


def test_lost_streams_cost_a_simulated_device_no_inference() -> None:
    seen: set[str] = set()

    def drop_once(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.requests % 10 == 0 and request.request_id not in seen:
            seen.add(request.request_id)
            connection.drop()
        else:
            connection.send(echo(request))

    flown = fly(drop_once, profiles=(Profile("slow", 1.0, SLOW, LINK),), timeout_s=5.0)
    assert statuses(flown) == {result.OK: 150}
    assert flown.counters.retries == flown.table["retries"].sum() >= len(seen) > 5
    assert flown.counters.requests_sent == 150 + flown.counters.retries
    retried = flown.table["retries"] > 0
    assert np.all(flown.table["uplink_s"][retried] >= 0.06)  # it went up twice


def test_refusals_and_wrong_answers_come_by_the_link_too() -> None:
    def refuse(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.requests % 2:
            connection.send(wire.encode_error(request.request_id, 404, "unknown model"))
        else:
            connection.send(echo(request, features=-request.features))

    flown = fly(refuse, profiles=(Profile("slow", 1.0, SLOW, LINK),), timeout_s=5.0)
    assert statuses(flown) == {404: 75, result.WRONG: 75}
    assert np.all(flown.table["downlink_s"] > 0.03)


def test_stopping_gives_up_what_is_on_a_link() -> None:
    far = Profile("far", 1.0, SLOW, replace(LINK, round_trip_s=1.0))
    flown = fly(polite, profiles=(far,), stop_after_s=0.2, duration_s=60.0, timeout_s=30.0)
    assert set(statuses(flown)) == {result.STOPPED} and flown.elapsed_s < 5


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    options = {"n_blocks": 2, "stem_width": 4, "width": 8}
    return Bench(tmp_path_factory.mktemp("two"), Architecture("convnet", options), 0.02)


@pytest.mark.parametrize("times", [None, SLOW, Times(mix_s=0.02)])
def test_every_round_of_a_real_inference_is_charged_or_measured(
    bench: Bench, times: Times | None
) -> None:
    def compute(connection: Connection, request: wire.Request) -> None:
        answer = bench.cloud(request.block, request.features.astype(np.float32))
        connection.send(echo(request, features=answer.astype(np.float16)))

    async def go() -> result.Table:
        cloud = FakeCloud(compute)
        async with cloud.serve():
            config = replace(
                bench.config, url=cloud.url, devices=4, rate=40, duration_s=0.3,
                profiles=() if times is None else (Profile("slow", 1.0, times, LINK),),
            )  # fmt: skip
            workload = bundle_workload(config, 50)
            shard = Shard(config, "echo", config.schedule(), workload)
            await shard.connect()
            return (await shard.run(shard.clock())).table

    table = asyncio.run(go())
    assert len(table) > 5 and np.all(table["status"] == result.OK)
    assert np.all(table["rounds"] == 2)
    charged = times or Times()
    for stage, rounds in [("stem", 1), ("mix", 2), ("encode", 2), ("demix", 2), ("head", 1)]:
        expected_s = getattr(charged, f"{stage}_s")
        if expected_s is not None:
            assert np.allclose(table[f"{stage}_s"], rounds * expected_s), stage
        else:  # it ran, except for the stem, which was computed before
            assert np.all((table[f"{stage}_s"] > 0) == (stage != "stem")), stage
    parts_s = np.sum([table[part].astype(np.float64) for part in PARTS], axis=0)
    assert np.all(table["done_s"] - table["scheduled_s"] > parts_s - 1e-3)
    if times is not None:
        assert np.all(table["uplink_s"] >= 0.06) and np.all(table["downlink_s"] >= 0.06)


# --- closed loops ---------------------------------------------------------------------------------


def test_a_closed_loop_waits_for_the_end_and_thinks() -> None:
    flown = fly(polite, pacer="closed:think_s=0.05", devices=10, duration_s=0.8)
    table = flown.table
    assert set(statuses(flown)) == {result.OK}
    assert len(set(table["index"].tolist())) == len(table) > 60
    assert flown.counters.begun == len(table)
    for device in range(10):
        mine = np.sort(table[table["device"] == device], order="scheduled_s")
        assert np.array_equal(mine["index"], np.arange(len(mine)) * 10 + device)
        # Each falls due when the one before has ended and the device has thought.
        law = FleetConfig("http://x", workload="echo", pacer="closed:think_s=0.05").schedule()
        thoughts = [law.closed.thought_s(0, device, turn) for turn in range(len(mine))]  # type: ignore[union-attr]
        ends = np.concatenate([[0.0], mine["done_s"][:-1]])
        assert np.allclose(mine["scheduled_s"] - ends, thoughts, atol=1e-6)
    assert np.all(table["scheduled_s"] < 0.8)


def test_a_stall_hides_from_a_closed_loop() -> None:
    """Why a run of one is labelled: an open loop would have had hundreds wait."""

    def stall(connection: Connection, request: wire.Request) -> None:
        notes, loop = connection.cloud.notes, asyncio.get_running_loop()
        open_s = notes.setdefault("open_s", loop.time() + 0.4)
        connection.later(max(0.0, open_s - loop.time()), echo(request))

    table = fly(stall, pacer="closed:think_s=0.01", devices=4, duration_s=1.0).table
    latency_s = table["done_s"] - table["scheduled_s"]
    assert np.sum(latency_s > 0.2) == 4 and len(table) > 40
    assert np.median(latency_s) < 0.2


def test_without_a_thought_a_device_asks_again_at_once() -> None:
    flown = fly(polite, pacer="closed:think_s=0", devices=1, duration_s=0.4)
    table = np.sort(flown.table, order="scheduled_s")
    assert set(statuses(flown)) == {result.OK} and len(table) > 20
    assert np.allclose(table["scheduled_s"][1:], table["done_s"][:-1])


def test_a_closed_loop_stops_and_counts_what_was_due() -> None:
    def silent(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.requests % 5:
            connection.send(echo(request))

    flown = fly(silent, pacer="closed:think_s=0.02", stop_after_s=0.3, duration_s=60.0)
    counts = statuses(flown)
    assert set(counts) == {result.OK, result.STOPPED} and flown.elapsed_s < 5
    assert counts[result.STOPPED] <= 20 and np.all(flown.table["scheduled_s"] < flown.window_s)


@pytest.mark.parametrize("settings", [{}, {"profiles": (Profile("slow", 1.0, SLOW, LINK),)}])
def test_a_closed_loop_of_devices_that_come_and_go(settings: dict[str, Any]) -> None:
    from edge.fleet.behaviour import Churn

    flown = fly(
        polite, pacer="closed:think_s=0.02", churn=Churn(0.2, 0.1), duration_s=0.8, **settings
    )
    assert set(statuses(flown)) <= {result.OK, result.CANCELLED}
    assert flown.counters.ok > 20 and flown.counters.left > 5
    assert np.isfinite(flown.table["scheduled_s"]).all()
