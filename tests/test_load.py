"""What a replica says of its load: real batchers behind it, and requests by way of admission."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest

from deployments.batcher import BatchCost
from deployments.capacity import Report, sustainable
from deployments.config import Config
from deployments.load import Load
from deployments.model import ServedModel
from tests.asynchronous import asynchronous
from tests.jobs import Clock
from tests.real_cloud import SHAPE, ask, assert_echoes, message_of, serving


@dataclass
class Batches:
    """A batcher, as far as the load looks at it."""

    costs: list[BatchCost | None]
    wait_s: float = 0.0

    def cost(self, block: int) -> BatchCost | None:
        return self.costs[block]

    def predicted_wait_s(self) -> float:
        return self.wait_s


@dataclass
class Model:
    """A served model likewise."""

    batcher: Batches
    name: str = "m"
    version: str = "1"
    offered_rows: list[int] = field(default_factory=lambda: [0, 0])
    offered_requests: int = 0


def told(load: Load, *models: Model) -> dict[str, float]:
    return load.report([cast(ServedModel, model) for model in models])


KNOWN = [BatchCost(0.01, 0.001, 100), BatchCost(0.03, 0.002, 50)]


def test_rates_are_those_of_the_last_seconds() -> None:
    clock, model = Clock(), Model(Batches([*KNOWN]))
    load = Load(clock)
    for _ in range(5):
        clock.now += 1
        model.offered_rows[0] += 400
        model.offered_requests += 100
        figures = told(load, model)
        assert figures["offered_rows_per_s"] == pytest.approx(400)
        assert figures["offered_requests_per_s"] == pytest.approx(100)
    for _ in range(3):
        clock.now += 1
        figures = told(load, model)
    assert figures["offered_rows_per_s"] == figures["offered_requests_per_s"] == 0


def test_a_round_is_a_batch_of_each_block_in_use() -> None:
    clock, model = Clock(), Model(Batches([*KNOWN]))
    load = Load(clock)
    clock.now += 1
    model.offered_rows = [100, 0]
    one = told(load, model)
    assert (one["round_s"], one["row_s"], one["round_rows"]) == pytest.approx((0.01, 0.001, 100))
    clock.now += 5
    model.offered_rows = [400, 100]
    both = told(load, model)
    assert both["round_s"] == pytest.approx(0.04)
    assert both["row_s"] == pytest.approx(0.75 * 0.001 + 0.25 * 0.002)
    assert both["round_rows"] == pytest.approx(100 / 0.75)  # then the first block's batch is full


def test_models_add_up_and_one_that_leaves_takes_nothing_away() -> None:
    clock = Clock()
    first, second = Model(Batches([*KNOWN], 0.2)), Model(Batches([*KNOWN], 0.7), "other")
    load = Load(clock)
    clock.now += 1
    first.offered_rows, second.offered_rows = [10, 0], [30, 0]
    first.offered_requests, second.offered_requests = 1, 3
    figures = told(load, first, second)
    assert figures["offered_rows_per_s"] == pytest.approx(40)
    assert figures["predicted_wait_s"] == 0.7
    assert figures["round_s"] == pytest.approx(0.02)
    clock.now += 5
    figures = told(load, first)
    assert figures["offered_rows_per_s"] == figures["offered_requests_per_s"] == 0


def test_costs_that_are_not_known_yet_are_not_made_up() -> None:
    clock, model = Clock(), Model(Batches([None, KNOWN[1]]))
    load = Load(clock)
    clock.now += 1
    model.offered_rows = [100, 0]
    assert told(load, model)["round_rows"] == 0
    assert all(isinstance(value, float) for value in told(load).values())


@asynchronous
async def test_a_replica_counts_what_it_refuses_too_and_learns_what_its_batches_cost() -> None:
    config = Config(
        engine="emulated:0.002,0.0001", echo_shape=SHAPE, max_batch_rows=16, max_request_rows=8
    )
    async with serving(config) as cloud, cloud.stream() as stream:
        clock = Clock()
        cloud.backbone._load = Load(clock)
        clock.now += 1
        assert (await cloud.backbone.record_autoscaling_stats())["round_rows"] == 0
        clock.now += 3
        for seed in range(10):
            assert_echoes(await ask(stream, message_of(seed)), seed)
        assert (await ask(stream, message_of(11, deadline_s=0))).status == 408
        assert (await ask(stream, message_of(12, rows=9))).status == 413  # not ours
        figures = await cloud.backbone.record_autoscaling_stats()
    assert figures["offered_requests_per_s"] == pytest.approx(11 / 3)
    assert figures["offered_rows_per_s"] == pytest.approx(22 / 3)
    assert figures["round_rows"] == 16
    assert 0.002 < figures["round_s"] + 2 * figures["row_s"] < 0.2
    assert figures["predicted_wait_s"] < 1
    assert sustainable(Report(0, **figures), 1.0) > 0
