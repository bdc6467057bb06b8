"""Devices against a cloud that misbehaves: whatever it does, every inference is accounted for."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest
from picows import WSCloseCode, WSTransport

from datamix import wire
from datamix.errors import Unavailable
from edge.fleet import device, pacing, result
from edge.fleet.config import FleetConfig
from edge.fleet.shard import Shard, ShardResult
from edge.fleet.workload import EchoWorkload
from tests.fake_cloud import SHAPE, Behaviour, Connection, FakeCloud, echo, polite


def fly(behaviour: Behaviour, stop_after_s: float | None = None, **settings: Any) -> ShardResult:
    """Run one shard against a fake cloud in one event loop."""

    async def go() -> ShardResult:
        cloud = FakeCloud(behaviour)
        async with cloud.serve():
            shard = make_shard(cloud.url, **settings)
            await shard.connect()
            if stop_after_s is not None:
                asyncio.get_running_loop().call_later(stop_after_s, shard.stop)
            return await shard.run(shard.clock())

    return asyncio.run(go())


def make_shard(url: str, **settings: Any) -> Shard:
    options: dict[str, Any] = {
        "devices": 20,
        "rate": 500,
        "duration_s": 0.3,
        "pacer": "constant",
        "timeout_s": 2.0,
    }
    config = FleetConfig(url=url, workload="echo", **(options | settings))
    workload = EchoWorkload(SHAPE, config.rows, config.seed, config.verify)
    return Shard(config, "echo", config.schedule(), workload)


def statuses(flown: ShardResult) -> dict[int, int]:
    return dict(Counter(flown.table["status"].tolist()))


def test_a_good_cloud_answers_everything_right() -> None:
    flown = fly(polite)
    assert statuses(flown) == {result.OK: 150}
    table, counters = flown.table, flown.counters
    assert np.all(table["sent_s"] >= table["scheduled_s"])
    assert np.all(table["done_s"] >= table["sent_s"])
    assert np.all(table["rounds"] == 1) and np.all(table["rows"] == 4)
    assert np.allclose(table["queue_s"], 0.001) and np.allclose(table["compute_s"], 0.002)
    assert np.all(table["batch_rows"] == 8)
    assert np.all(table["bytes_up"] > 4 * 18 * 2) and np.all(table["bytes_down"] > 4 * 18 * 2)
    assert counters.ok == counters.begun == counters.requests_ok == counters.requests_sent == 150
    assert counters.retries == counters.unmatched == counters.duplicates == 0
    assert flown.answered.sum(axis=0).tolist() == [150, 600]


def test_swapped_answers_are_wrong_although_each_is_well_formed() -> None:
    held: list[tuple[Connection, wire.Request]] = []

    def swap(connection: Connection, request: wire.Request) -> None:
        held.append((connection, request))
        if len(held) == 2:
            (first, one), (second, two) = held
            first.send(echo(one, features=two.features))
            second.send(echo(two, features=one.features))
            held.clear()

    flown = fly(swap)
    assert statuses(flown) == {result.WRONG: 150}
    unverified = fly(swap, verify=False)
    assert statuses(unverified) == {result.OK: 150}


def test_one_wrong_value_in_one_row_is_seen() -> None:
    def nudge(connection: Connection, request: wire.Request) -> None:
        features = request.features.copy()
        features[-1, -1, -1, -1] += 1
        connection.send(echo(request, features=features))

    assert statuses(fly(nudge)) == {result.WRONG: 150}


def test_dropped_connections_cost_retries_and_lose_nothing() -> None:
    seen: set[str] = set()

    def drop_every_tenth_once(connection: Connection, request: wire.Request) -> None:
        cloud = connection.cloud
        if cloud.requests % 10 == 0 and request.request_id not in seen:
            seen.add(request.request_id)
            connection.drop()
        else:
            connection.send(echo(request))

    flown = fly(drop_every_tenth_once)
    assert statuses(flown) == {result.OK: 150}
    assert len(seen) > 5
    assert flown.counters.retries == flown.table["retries"].sum() >= len(seen)
    assert flown.counters.requests_sent == 150 + flown.counters.retries
    assert flown.counters.reconnects >= len(seen)


def test_a_stream_that_died_without_a_sign_is_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "SILENCE_S", 0.1)
    dead: dict[int, Connection] = {}

    def dies(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.requests <= 20:
            dead[id(connection)] = connection
        if id(connection) not in dead:
            connection.send(echo(request))

    flown = fly(dies, timeout_s=10.0, attempt_timeout_s=0.2)
    assert statuses(flown) == {result.OK: 150}
    assert flown.counters.reconnects >= len(dead) > 0
    assert flown.counters.retries >= 20


def test_a_moved_stream_costs_no_retry_and_loses_nothing() -> None:
    """Every fourth message is not read any more, nor what comes after it on the same stream."""

    messages: Counter[WSTransport] = Counter()

    def move(connection: Connection, request: wire.Request) -> None:
        transport = connection.transport
        messages[transport] += 1
        if messages[transport] < 4:
            connection.later(0.02, echo(request))
        elif messages[transport] == 4:
            even = connection.cloud.streams % 2 == 0
            code = WSCloseCode.SERVICE_RESTART if even else WSCloseCode.GOING_AWAY
            asyncio.get_running_loop().call_later(0.03, transport.send_close, code)

    flown = fly(move)
    assert statuses(flown) == {result.OK: 150}
    assert flown.counters.moved > 20
    assert flown.counters.reconnects > 20
    assert flown.counters.retries == 0
    assert flown.counters.requests_sent == 150 + flown.counters.moved
    assert flown.table["sent_s"].max() < 0.4  # when it was first sent


def test_a_cloud_that_sends_everybody_away_is_not_stormed() -> None:
    streams: list[int] = []

    def leave(connection: Connection, request: wire.Request) -> None:
        streams.append(connection.cloud.streams)
        connection.transport.send_close(WSCloseCode.SERVICE_RESTART)

    flown = fly(leave, devices=1, rate=10, duration_s=0.2, timeout_s=1.0)
    assert set(statuses(flown)) <= {result.CONNECTION, result.TIMEOUT}
    assert streams[-1] <= 2 + 1.2 / 0.025  # the shortest back-off


def test_a_stall_shows_in_the_latency_from_the_schedule() -> None:
    def stall(connection: Connection, request: wire.Request) -> None:
        notes, loop = connection.cloud.notes, asyncio.get_running_loop()
        open_s = notes.setdefault("open_s", loop.time() + 1.0)
        connection.later(max(0.0, open_s - loop.time()), echo(request))

    table = fly(stall).table
    latency_s = table["done_s"] - table["scheduled_s"]
    # All 150 fell due within 0.3 s of a 1 s stall. One device after another, each waiting for its
    # last answer, would have sent a handful and reported the rest as quick.
    assert latency_s.min() > 0.4
    assert np.quantile(latency_s, 0.99) > 0.9
    assert np.allclose(latency_s, 1.0 - table["scheduled_s"], atol=0.3)


def test_silence_is_a_timeout_and_a_late_answer_no_duplicate() -> None:
    def slow_third(connection: Connection, request: wire.Request) -> None:
        delay_s = 1.1 if connection.cloud.requests % 3 == 0 else 0.0
        connection.later(delay_s, echo(request))

    flown = fly(slow_third, timeout_s=1.0)
    assert statuses(flown) == {result.OK: 100, result.TIMEOUT: 50}
    late = flown.table[flown.table["status"] == result.TIMEOUT]
    assert np.allclose(late["done_s"] - late["scheduled_s"], 1.0, atol=0.3)
    assert flown.counters.late > 0 and flown.counters.duplicates == 0


def test_refusals_are_retried_and_then_counted_by_status() -> None:
    refused: set[str] = set()

    def refuse_once(connection: Connection, request: wire.Request) -> None:
        if request.request_id in refused:
            connection.send(echo(request))
            return
        refused.add(request.request_id)
        connection.send(
            wire.encode_error(request.request_id, 429, "queue full", retry_after_s=0.05)
        )

    flown = fly(refuse_once, rate=160)
    assert statuses(flown) == {result.OK: 48}
    assert flown.counters.retries == 48 and np.all(flown.table["retries"] == 1)
    assert np.all(flown.table["done_s"] - flown.table["scheduled_s"] >= 0.05)

    def always(connection: Connection, request: wire.Request) -> None:
        connection.send(wire.encode_error(request.request_id, 503, "draining"))

    assert statuses(fly(always, rate=50, max_retries=1)) == {503: 15}

    def never_again(connection: Connection, request: wire.Request) -> None:
        connection.send(wire.encode_error(request.request_id, 404, "unknown model"))

    flown = fly(never_again)
    assert statuses(flown) == {404: 150} and flown.counters.retries == 0


def test_the_retry_budget_bounds_the_whole_shard() -> None:
    def always(connection: Connection, request: wire.Request) -> None:
        connection.send(wire.encode_error(request.request_id, 503, "no replica"))

    flown = fly(always, rate=1000, retry_ratio=0.0, timeout_s=5.0)
    assert statuses(flown) == {503: 300}
    assert flown.counters.retries == 100  # the floor


def test_answers_that_nobody_asked_for_are_counted_by_kind() -> None:
    previous: list[Connection] = []

    def strange(connection: Connection, request: wire.Request) -> None:
        match connection.cloud.requests:
            case 10:
                connection.send(echo(request, request_id="nobody"))
            case 20:
                connection.send(b"not arrow")
            case 30:
                connection.send(echo(request))  # and once more below
            case 40:
                other = next(c for c in previous if c.transport is not connection.transport)
                other.send(echo(request))
        previous.append(connection)
        connection.send(echo(request))

    flown = fly(strange)
    counters = flown.counters
    assert statuses(flown) == {result.OK: 150}
    assert counters.unmatched == counters.unreadable == 1
    assert counters.duplicates == counters.misrouted == 1


@pytest.mark.parametrize("change", [{"features": np.zeros((4, 2, 3, 2), np.float16)}, {"block": 1}])
def test_an_answer_to_another_question_is_refused(change: dict[str, Any]) -> None:
    def other(connection: Connection, request: wire.Request) -> None:
        connection.send(echo(request, **change))

    assert statuses(fly(other)) == {result.ANSWER: 150}


def test_what_could_not_be_sent_is_unsent_and_what_was_lost_is_connection() -> None:
    def vanish(connection: Connection, request: wire.Request) -> None:
        connection.drop()

    async def go() -> ShardResult:
        cloud = FakeCloud(vanish)
        async with cloud.serve() as server:
            shard = make_shard(cloud.url, devices=1, rate=100, timeout_s=0.3)
            await shard.connect()
            server.close()  # nothing new is accepted: the first drop is for good
            return await shard.run(shard.clock())

    flown = asyncio.run(go())
    # The first is lost, and whatever else left before the device heard of that; all others stayed.
    counts, sent = statuses(flown), ~np.isnan(flown.table["sent_s"])
    assert set(counts) == {result.CONNECTION, result.UNSENT} and sum(counts.values()) == 30
    assert 1 <= counts[result.CONNECTION] < 15
    assert np.array_equal(sent, flown.table["status"] == result.CONNECTION)
    assert not np.isnan(flown.table["done_s"]).any()


def test_stop_reports_what_fell_due_and_nothing_else() -> None:
    def every_other(connection: Connection, request: wire.Request) -> None:
        if connection.cloud.requests % 2:
            connection.send(echo(request))

    flown = fly(every_other, stop_after_s=0.15)
    counts = statuses(flown)
    assert set(counts) == {result.OK, result.STOPPED}
    assert sum(counts.values()) == len(flown.table) == pytest.approx(75, abs=25)
    assert flown.window_s == pytest.approx(0.15, abs=0.1)


def test_a_cloud_that_is_not_there_is_said_so() -> None:
    async def go() -> None:
        await make_shard("http://127.0.0.1:9", connect_timeout_s=0.2).connect()

    with pytest.raises(Unavailable, match="20 of 20 devices got no stream"):
        asyncio.run(go())


def test_a_cloud_that_hangs_up_has_opened_no_stream() -> None:
    """What a load balancer does whose server is gone: it accepts, and closes."""

    async def run() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            with pytest.raises(Unavailable, match="the cloud hung up instead of opening a stream"):
                await make_shard(url, connect_timeout_s=0.2).connect()

    asyncio.run(run())


def test_a_defect_of_the_simulator_ends_the_run() -> None:
    class Broken(EchoWorkload):
        def start(self, index: int) -> Any:
            raise ZeroDivisionError("broken")

    async def go() -> None:
        cloud = FakeCloud()
        async with cloud.serve():
            shard = make_shard(cloud.url)
            shard.workload = Broken(SHAPE, 4, 0, True)
            await shard.connect()
            await shard.run(shard.clock())

    with pytest.raises(ZeroDivisionError):
        asyncio.run(go())


def test_shards_answer_the_same_schedule_as_one() -> None:
    """Two shards in one loop do together what one does alone."""

    async def go(shards: int) -> result.Table:
        cloud = FakeCloud()
        async with cloud.serve():
            config = FleetConfig(
                url=cloud.url, workload="echo", devices=20, rate=200, duration_s=0.3, seed=5
            )
            plan = pacing.schedule("poisson", 200, 0.3, 20, 5)
            work = EchoWorkload(SHAPE, 4, 5, True)
            fleet = [
                Shard(config, "echo", plan.shard(n, shards), work, n, shards) for n in range(shards)
            ]
            await asyncio.gather(*(shard.connect() for shard in fleet))
            start_s = fleet[0].clock() + 0.01
            flown = await asyncio.gather(*(shard.run(start_s) for shard in fleet))
            return result.merge([part.table for part in flown])

    one, two = asyncio.run(go(1)), asyncio.run(go(2))
    assert len(one) > 40
    for column in ("index", "device", "scheduled_s", "status", "rows", "rounds", "bytes_down"):
        assert np.array_equal(one[column], two[column]), column
