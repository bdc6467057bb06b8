import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import ConfigError
from edge.search.halving import Halving, promote
from edge.search.pareto import Point, dominates, front, layers, spread
from edge.search.plot import staircase

# Few values, so that ties and equal points are common.
POINTS = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 4), max_size=40)
SOME = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 4), min_size=1, max_size=40)


@given(points=POINTS)
def test_the_front_is_what_nobody_beats(points: list[Point]) -> None:
    on_front = front(points)
    for place, point in enumerate(points):
        # By the definition, written out anew: nowhere worse, somewhere better.
        beaten = any(
            all(x <= y for x, y in zip(other, point, strict=True))
            and any(x < y for x, y in zip(other, point, strict=True))
            for other in points
        )
        assert (place in on_front) != beaten
    assert on_front == sorted(set(on_front))
    assert bool(on_front) == bool(points)


@given(points=SOME)
def test_every_point_off_the_front_is_beaten_by_one_on_it(points: list[Point]) -> None:
    on_front = front(points)
    for place in set(range(len(points))) - set(on_front):
        assert any(dominates(points[other], points[place]) for other in on_front)


def test_domination_on_a_known_case() -> None:
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))
    assert front([(1, 3), (2, 2), (3, 1), (3, 3), (2, 2)]) == [0, 1, 2, 4]


@given(points=POINTS)
def test_layers_hold_every_point_once_and_each_is_beaten_from_the_one_before(
    points: list[Point],
) -> None:
    found = layers(points)
    assert sorted(place for layer in found for place in layer) == list(range(len(points)))
    for above, below in pairwise(found):
        for place in below:
            assert any(dominates(points[other], points[place]) for other in above)


@given(points=SOME, data=st.data())
def test_the_spread_comes_from_the_first_layers(points: list[Point], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(points)))
    kept = spread(points, keep)
    assert len(set(kept)) == len(kept) == keep
    rank = {place: number for number, layer in enumerate(layers(points)) for place in layer}
    worst = max((rank[place] for place in kept), default=0)
    assert all(rank[place] >= worst for place in rank if place not in kept)


def test_the_spread_takes_the_ends_before_the_middle() -> None:
    line: list[Point] = [(float(x), float(10 - x)) for x in range(11)]
    assert set(spread(line, 1, [0])) == {10}
    assert set(spread(line, 2, [0])) == {10, 5}


@given(points=SOME, data=st.data())
def test_promotion_keeps_the_best_and_as_many_as_asked(
    points: list[Point], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, len(points)))
    kept = promote(points, keep)
    assert len(set(kept)) == len(kept) == keep
    assert min(points) in [points[place] for place in kept]
    accuracies = sorted(point[0] for point in points)
    assert (
        sorted(points[place][0] for place in kept)[: -(-keep // 2)] == (accuracies[: -(-keep // 2)])
    )


def test_promotion_keeps_the_cheap_end_which_accuracy_alone_would_drop() -> None:
    points: list[Point] = [(-0.1 * x, 1.0 * x) for x in range(1, 9)]  # dearer is better
    assert 0 in promote(points, 4)
    assert {6, 7} <= set(promote(points, 4))


@given(st.integers(1, 500), st.floats(0.5, 100), st.integers(1, 6), st.integers(2, 4))
def test_a_plan_trains_fewer_for_longer(n: int, seconds: float, rungs: int, factor: int) -> None:
    plan = Halving(seconds, rungs, factor).plan(n)
    assert plan[0].trainings == n
    assert plan[0].seconds == seconds
    for first, second in pairwise(plan):
        assert math.isclose(second.seconds, factor * first.seconds)
        assert first.trainings / factor <= second.trainings < first.trainings / factor + 1
    assert plan[-1].trainings >= 1


def test_a_known_plan() -> None:
    assert [(r.trainings, r.seconds) for r in Halving(20, 3, 2).plan(24)] == [
        (24, 20),
        (12, 40),
        (6, 80),
    ]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"rungs": 0}, "rungs is 0"),
        ({"factor": 1}, "factor is 1"),
    ],
)
def test_a_plan_that_is_none_is_refused(wrong: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Halving(**wrong)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_staircase_rises_and_lies_above_every_point(pairs: list[tuple[int, int]]) -> None:
    steps = staircase([(float(a), float(b)) for a, b in pairs])
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(steps))
    for cost, accuracy in pairs:
        assert max(height for at, height in steps if at <= cost) >= accuracy
