"""Devices that come and go, storms, slow readers, cancellations: by the seed, and accounted for."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picows import WSCloseCode, ws_connect

from datamix import wire
from datamix.errors import ConfigError
from edge.fleet import behaviour, pacing, result, streams
from edge.fleet.behaviour import Cancellations, Churn, SlowReaders, Storm
from edge.fleet.config import FleetConfig
from edge.fleet.profiles import read
from edge.fleet.shard import Shard
from edge.fleet.workload import EchoWorkload
from tests.fake_cloud import SHAPE, Connection, FakeCloud, echo, polite
from tests.test_fleet_shard import fly, statuses


def is_there(law: Churn, seed: int, device: int, at_s: float) -> bool:
    passed = sum(1 for _ in takewhile(lambda when: when <= at_s, law.toggles(seed, device)))
    return law.starts_on(seed, device) == (passed % 2 == 0)


def test_devices_stay_and_go_as_long_as_the_law_says() -> None:
    law, on_s, off_s = Churn(3.0, 1.0), list[float](), list[float]()
    for device in range(2000):
        there, last_s = law.starts_on(5, device), 0.0
        for when_s in takewhile(lambda when: when < 40, law.toggles(5, device)):
            (on_s if there else off_s).append(when_s - last_s)
            there, last_s = not there, when_s
    assert np.mean(on_s) == pytest.approx(3, rel=0.1)
    assert np.mean(off_s) == pytest.approx(1, rel=0.1)
    for at_s in (0.0, 7.0):  # three in four, at the start as later
        share = np.mean([is_there(law, 5, device, at_s) for device in range(2000)])
        assert share == pytest.approx(0.75, abs=0.05)


@given(st.integers(0, 2**32), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_an_arrival_falls_on_a_device_that_is_there(seed: int, devices: int) -> None:
    law = Churn(1.0, 2.0)
    due_s = np.sort(np.random.default_rng(seed).random(60)) * 6
    owners = behaviour.present_owners(law, due_s, devices, seed)
    for at_s, owner in zip(due_s.tolist(), owners.tolist(), strict=True):
        there = [device for device in range(devices) if is_there(law, seed, device, at_s)]
        assert owner in there if there else owner == -1


def test_present_devices_share_the_load_evenly_and_the_rate_is_kept() -> None:
    whole = pacing.schedule("constant", 2000, 10, 20, 3, Churn(5, 5))
    assert len(whole) == 20_000 and whole.index.tolist() == list(range(20_000))
    second = whole.device[(whole.due_s >= 4.0) & (whole.due_s < 4.2)]
    there = [device for device in range(20) if is_there(Churn(5, 5), 3, device, 4.1)]
    counts = np.bincount(second, minlength=20)[there]
    assert counts.min() > 0.4 * counts.mean()


def test_churn_cancels_what_a_device_leaves_behind_and_nothing_else() -> None:
    def slow(connection: Connection, request: wire.Request) -> None:
        connection.later(0.03, echo(request))

    flown = fly(slow, churn=Churn(0.3, 0.15), duration_s=0.6, rate=400)
    counts, counters = statuses(flown), flown.counters
    assert set(counts) == {result.OK, result.CANCELLED}
    assert counts[result.OK] > counts[result.CANCELLED] == counters.cancelled > 0
    assert counters.left > 5 and counters.came > 5 and counters.failed == 0
    assert counters.unmatched == counters.duplicates == counters.misrouted == 0


def test_churn_is_the_same_on_any_number_of_shards() -> None:
    async def go(shards: int) -> list[tuple[int, int]]:
        cloud = FakeCloud()
        async with cloud.serve():
            config = FleetConfig(
                url=cloud.url, workload="echo", devices=20, rate=200, duration_s=0.3,
                churn=Churn(0.2, 0.1),
            )  # fmt: skip
            work = EchoWorkload(SHAPE, 4, 0, True)
            fleet = [
                Shard(config, "echo", config.schedule().shard(n, shards), work, n, shards)
                for n in range(shards)
            ]
            await asyncio.gather(*(shard.connect() for shard in fleet))
            connected = sum(shard.progress().connected for shard in fleet)
            assert connected == sum(Churn(0.2, 0.1).starts_on(0, n) for n in range(20))
            flown = await asyncio.gather(*(shard.run(shard.clock()) for shard in fleet))
            table = result.merge([part.table for part in flown])
            return list(zip(table["index"].tolist(), table["device"].tolist(), strict=True))

    one, two = asyncio.run(go(1)), asyncio.run(go(2))
    assert one == two and len(one) > 20


def test_a_storm_drops_a_share_that_comes_back_at_once() -> None:
    storms = (Storm(0.1, 0.5), Storm(0.2, 1.0))
    flown = fly(polite, storms=storms, devices=40)
    first = sum(storms[0].hits(0, device, 0) for device in range(40))
    assert 10 < first < 30
    assert flown.counters.dropped == flown.counters.reconnects == first + 40
    assert statuses(flown) == {result.OK: 150}


def test_those_hit_by_a_storm_do_not_wait_for_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only one at a time is let in before the run, and all at once in a storm."""
    at_once, most = 0, list[int]()

    async def counting(*arguments: Any, **settings: Any) -> Any:
        nonlocal at_once
        at_once += 1
        most.append(at_once)
        try:
            return await ws_connect(*arguments, **settings)
        finally:
            at_once -= 1

    monkeypatch.setattr(streams, "ws_connect", counting)
    flown = fly(polite, storms=(Storm(0.1, 1.0),), devices=20, connect_at_once=1)
    assert flown.counters.reconnects == 20 and statuses(flown) == {result.OK: 150}
    assert max(most[:20]) == 1 and max(most[20:]) == 20


def test_slow_readers_wait_for_their_answers_and_others_do_not() -> None:
    law = SlowReaders(share=0.5, pause_s=0.15)
    table = fly(polite, slow_readers=law, rate=400, timeout_s=5.0).table
    assert set(table["status"]) == {result.OK}
    slow = np.array([law.has(0, device) for device in table["device"].tolist()])
    latency_s = table["done_s"] - table["scheduled_s"]
    assert 0.2 < slow.mean() < 0.8
    # The first answer comes at once; most of the others find the device not reading.
    assert np.quantile(latency_s[slow], 0.8) > 0.1 > np.quantile(latency_s[~slow], 0.8)


def test_cancelled_inferences_are_the_devices_own_doing() -> None:
    def slow(connection: Connection, request: wire.Request) -> None:
        connection.later(0.3, echo(request))

    law = Cancellations(share=0.3, after_s=0.1)
    flown = fly(slow, cancel=law)
    chosen = np.array([law.has(0, index) for index in flown.table["index"].tolist()])
    expected = np.where(chosen, result.CANCELLED, result.OK)
    assert flown.table["status"].tolist() == expected.tolist()
    waited_s = (flown.table["done_s"] - flown.table["scheduled_s"])[chosen]
    assert waited_s.min() >= 0.1
    counters = flown.counters
    assert counters.cancelled == chosen.sum() > 20 and counters.failed == 0
    # The cloud did not know, and answered all the same.
    assert 0 < counters.late <= counters.cancelled and counters.duplicates == 0
    # Who is answered in time gives nothing up.
    assert statuses(fly(polite, cancel=Cancellations(1.0, 1.5))) == {result.OK: 150}


def test_stopping_covers_devices_that_are_away_and_readers_that_pause() -> None:
    flown = fly(
        polite,
        stop_after_s=0.2,
        duration_s=60.0,
        churn=Churn(0.3, 0.3),
        slow_readers=SlowReaders(0.5, 30.0),
        storms=(Storm(0.1, 0.5),),
        cancel=Cancellations(0.5, 0.05),
    )
    counts = Counter(flown.table["status"].tolist())
    assert set(counts) <= {result.OK, result.CANCELLED, result.STOPPED}
    assert sum(counts.values()) == pytest.approx(100, abs=60) and flown.window_s < 5


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (behaviour.churn, "on_s=1"),
        (behaviour.churn, "on_s=1,off_s=0"),
        (behaviour.churn, "on_s=1,off_s=2,up_s=3"),
        (behaviour.storm, "share=0.5"),
        (behaviour.storm, "at_s=1,share=0"),
        (behaviour.storm, "at_s=0"),
        (behaviour.slow_readers, "share=1.5,pause_s=1"),
        (behaviour.slow_readers, "share=0.5,pause_s=never"),
        (behaviour.cancellations, "share=0.5"),
        (behaviour.cancellations, "share=0.5,after_s=-1"),
    ],
)
def test_behaviour_that_means_nothing_is_refused(reader: object, text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        reader(text)  # type: ignore[operator]


def test_what_is_written_is_what_is_meant() -> None:
    assert behaviour.churn("on_s=60,off_s=20") == Churn(60, 20)
    assert behaviour.storm("at_s=10") == Storm(10, 1.0)
    assert behaviour.slow_readers("share=0.1,pause_s=0.5") == SlowReaders(0.1, 0.5)
    assert behaviour.cancellations("share=0.05,after_s=0.2") == Cancellations(0.05, 0.2)
    with pytest.raises(ConfigError, match="before the end"):
        FleetConfig(url="http://x", workload="echo", duration_s=5, storms=(Storm(5, 1.0),))


@pytest.mark.parametrize("arrivals", ["gamma:shape=0.25", "closed:think_s=0.02"])
def test_everything_at_once_loses_nothing(arrivals: str) -> None:
    """Devices of all kinds that come, go and give up, and a cloud that has bad days."""

    def moody(connection: Connection, request: wire.Request) -> None:
        match connection.cloud.requests % 29:
            case 3:
                connection.drop()
            case 7:
                connection.transport.send_close(WSCloseCode.SERVICE_RESTART)
            case 11:
                refusal = wire.encode_error(request.request_id, 429, "full", retry_after_s=0.02)
                connection.send(refusal)
            case 13:
                connection.send(wire.encode_error(request.request_id, 404, "unknown model"))
            case 17:
                pass
            case 19:
                connection.later(0.7, echo(request))
            case _:
                connection.send(echo(request))

    flown = fly(
        moody,
        pacer=arrivals,
        rate=400,
        duration_s=0.8,
        timeout_s=0.6,
        profiles=read("phone/wifi:1,here/4g:1,laptop:1,here:1"),
        churn=Churn(0.5, 0.2),
        storms=(Storm(0.3, 0.5),),
        slow_readers=SlowReaders(0.3, 0.05),
        cancel=Cancellations(0.2, 0.1),
    )
    table, counters = flown.table, flown.counters
    ended = statuses(flown)
    assert set(ended) <= {result.OK, result.TIMEOUT, result.CONNECTION, result.CANCELLED, 404, 429}
    assert ended[result.OK] > 50 and not np.isnan(table["done_s"]).any()
    assert counters.begun == len(table) == sum(ended.values())
    assert counters.ok == ended[result.OK] and counters.cancelled == ended[result.CANCELLED]
    assert counters.failed == len(table) - counters.ok - counters.cancelled
    assert counters.requests_sent >= np.sum(~np.isnan(table["sent_s"]))
    assert np.all(table["done_s"] >= table["scheduled_s"])
    assert counters.duplicates == counters.unmatched == counters.misrouted == 0
    assert len(set(table["index"].tolist())) == len(table)
