"""What has ended, in the order it was due, however the shards come forward."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge.fleet import pacing, result
from edge.fleet.config import FleetConfig
from edge.fleet.run import record
from edge.fleet.settled import Merge, Settled, settled
from tests.fake_cloud import FakeCloud, running


@given(
    st.lists(st.floats(0, 10, allow_nan=False), max_size=60),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 12)), max_size=30),
)
def test_everything_is_told_once_and_in_order(
    due: list[float], shards: int, words: list[tuple[int, float]]
) -> None:
    due_s = np.sort(np.array(due, np.float64))
    merge, told_s = Merge(shards), [0.0] * shards
    heard: list[float] = []
    until_s = 0.0
    for shard, reach_s in [*words, *((shard, 20.0) for shard in range(shards))]:
        shard %= shards
        reach_s = max(reach_s, told_s[shard])
        mine = due_s[shard::shards]
        part = mine[(mine >= told_s[shard]) & (mine < reach_s)]
        told_s[shard] = reach_s
        news = merge.add(shard, Settled(reach_s, part, part + 0.1))
        if news is not None:
            assert news.until_s == min(told_s) > until_s
            assert ((news.due_s >= until_s) & (news.due_s < news.until_s)).all()
            np.testing.assert_array_equal(news.latency_s, news.due_s + 0.1)
            heard += news.due_s.tolist()
            until_s = news.until_s
    assert heard == due_s.tolist()


def test_only_right_answers_have_a_latency() -> None:
    table = result.allocate(pacing.schedule("constant", 5, 1, 1, 0), rows=1)
    table["status"] = [result.OK, result.TIMEOUT, 429, result.WRONG, result.UNSENT]
    table["done_s"] = table["scheduled_s"] + [0.1, 0.2, 0.1, 0.1, np.nan]
    found = settled(table, 1.0)
    np.testing.assert_allclose(found.latency_s, [0.1, np.inf, np.inf, np.inf, np.inf])
    np.testing.assert_allclose(found.due_s, [0.0, 0.2, 0.4, 0.6, 0.8])


def test_a_watched_run_of_two_processes_ends_when_that_is_enough() -> None:
    seen: list[Settled] = []

    def watch(news: Settled) -> bool:
        seen.append(news)
        return news.until_s > 0.7

    with running(FakeCloud()) as cloud:
        run, _ = record(
            FleetConfig(
                url=cloud.url,
                workload="echo",
                devices=6,
                rate=200,
                duration_s=30,
                processes=2,
                pacer="constant",
            ),
            watch=watch,
        )
    assert 0.7 < run.window_s < 20 and not run.interrupted
    due_s = np.concatenate([news.due_s for news in seen])
    np.testing.assert_allclose(due_s, np.arange(len(due_s)) / 200)  # nothing twice, nothing missed
    latency_s = np.concatenate([news.latency_s for news in seen])
    table = run.table[: len(due_s)]
    np.testing.assert_allclose(latency_s, table["done_s"] - table["scheduled_s"])
