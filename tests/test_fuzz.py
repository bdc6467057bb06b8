"""The fuzz run of `benchmarks/fuzz.py`, short and without Ray; and that it would find something."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from benchmarks import fuzz
from benchmarks.fuzzing import frames, messages, mutants, posts, structures
from benchmarks.fuzzing.attack import Plan, attack
from benchmarks.fuzzing.good import Good, befriend
from benchmarks.fuzzing.oracle import Oracle
from benchmarks.fuzzing.tally import Finding, Tally
from datamix import wire
from deployments.admission import Admission
from deployments.config import Config
from tests.asynchronous import asynchronous
from tests.real_cloud import serving

CONFIG = Config(**fuzz.SETTINGS)
PLAN = Plan(
    messages=1600, structures=100, posts=200, structured_posts=50, roughs=60, scripts=100, streams=8
)


async def run(plan: Plan) -> tuple[Tally, Good]:
    """Attack a replica, good clients beside."""
    tally, over = Tally(limit_s=10), asyncio.Event()
    async with serving(CONFIG) as cloud, asyncio.TaskGroup() as group:
        oracle = Oracle(CONFIG)
        friends = group.create_task(befriend(cloud.url, oracle, over.is_set, streams=2))
        try:
            await attack(cloud.url, plan, oracle, tally)
        finally:
            over.set()
        good = await friends
        async with asyncio.timeout(10):
            while cloud.backbone.traffic.open_streams:
                await asyncio.sleep(0.01)
        assert not cloud.queued
    return tally, good


@asynchronous
async def test_thousands_of_mutants_hurt_nobody() -> None:
    tally, good = await run(PLAN)
    assert tally.findings == []
    assert good.wrong == []
    assert len(good.latencies_s) > 20
    assert tally.sent.total() == 2110
    statuses = {status for _, status in tally.statuses}
    assert {200, 400, 404, 408, 413, 415, 422} <= statuses
    assert max(statuses) < 500


@asynchronous
async def test_a_replica_that_answers_wrongly_is_found_out() -> None:
    """The values of one answer in 30 are others."""
    right, count = wire.response_parts, 0

    def wrong(features: Any, **fields: Any) -> list[Any]:
        nonlocal count
        count += 1
        return right(features + (count % 30 == 0), **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "response_parts", wrong)
        tally, good = await run(Plan(400, 0, 100, 0, 0, 0, streams=2))
    assert {finding.what for finding in tally.findings} == {
        "the answer's values are not those of the request"
    }
    assert set(good.wrong) <= {"the answer's values are not those of the request"}


@asynchronous
async def test_a_replica_that_fails_is_found_out() -> None:
    def broken(*args: Any) -> Any:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "find", broken)
        tally, good = await run(Plan(200, 0, 0, 0, 0, 20, streams=2))
    assert any("status 503" in finding.what for finding in tally.findings)
    assert good.wrong
    assert not good.latencies_s


@pytest.mark.parametrize(
    "endless", [mutants.endless, posts.endless, structures.streams, posts.structured]
)
def test_a_seed_gives_the_same_again(endless: Callable[[str], Any]) -> None:
    first = list(islice(endless("a"), 20))
    assert first == list(islice(endless("a"), 20))
    assert first != list(islice(endless("b"), 20))


@pytest.mark.parametrize("mutator", mutants.MUTATORS, ids=lambda mutator: mutator.__name__)
def test_each_mutator_takes_any_message(mutator: Callable[..., bytes]) -> None:
    chance = random.Random(3)
    makers = (messages.request, messages.compressed, messages.response)
    whole = [make(chance) for make in makers]
    changed = [mutator(message, chance) for message in whole for _ in range(20)]
    if mutator is not mutants.nothing:
        assert len(set(changed)) > 3
        assert set(changed) - set(whole)


def test_the_oracle_has_no_memory_and_leaves_the_one_there_is() -> None:
    wire.requests.forget()
    body = messages.request(random.Random(1))
    wire.decode_request(body)
    before = dict(wire.requests._known)
    assert Oracle(CONFIG).stream(body).statuses == {200}
    Oracle(CONFIG).stream(messages.request(random.Random(2), "int8"))
    assert wire.requests._known == before


def test_a_frame_is_read_as_it_was_written() -> None:
    chance = random.Random(4)
    for size in (0, 1, 125, 126, 65535, 65536):
        payload = chance.randbytes(size)
        sent = frames.frame(frames.BINARY, payload, chance)
        header = 2 + (0 if size < 126 else 2 if size < 65536 else 8)
        mask = sent[header : header + 4]
        masked = sent[header + 4 :]
        assert bytes(b ^ mask[i % 4] for i, b in enumerate(masked)) == payload
        assert sent[0] == 0x82
        assert sent[1] & 0x80


def test_memory_counts_what_stays() -> None:
    mib = 2**20
    peaks = [(sent, (100 + (sent % 30 == 0) * 50) * mib) for sent in range(0, 1001, 10)]
    watch = fuzz.Watch("", {}, {}, samples=peaks)
    assert watch.floor_mib(0.1) == watch.floor_mib(0.9) == 100
    leaking = [(sent, size + sent * mib // 10) for sent, size in peaks]
    watch = fuzz.Watch("", {}, {}, samples=leaking)
    assert 38 < watch.floor_mib(0.9) - watch.floor_mib(0.5) < 42


def test_findings_are_written_where_they_can_be_tried_again(tmp_path: Any) -> None:
    fuzz.write_findings(tmp_path / "new", [Finding("flip", "status 503", b"bytes")])
    assert (tmp_path / "new/000.bin").read_bytes() == b"bytes"
    assert "status 503" in (tmp_path / "new/000.json").read_text()
