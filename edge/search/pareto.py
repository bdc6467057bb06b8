"""Who is beaten by nobody. A point is a tuple of numbers, the less of each the better."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, ...]


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Places of the points that no point dominates, in order; equal points stay together."""
    return [
        place
        for place, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]


def layers(points: Sequence[Point]) -> list[list[int]]:
    """The front, then the front of what is left, and so on: every place once.

    Non-dominated sorting as in Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist
    multiobjective genetic algorithm: NSGA-II", 2002; the plain way, for some hundred points.
    """
    left = list(range(len(points)))
    found = []
    while left:
        first = [left[i] for i in front([points[place] for place in left])]
        found.append(first)
        left = [place for place in left if place not in set(first)]
    return found


def spread(points: Sequence[Point], keep: int, chosen: Sequence[int] = ()) -> list[int]:
    """``keep`` places not in ``chosen``: layer by layer, within one the farthest first.

    Far from everything that is chosen already, on axes that are scaled to 0..1. This keeps all of
    a front's ends in the race, as proposed by Schmucker, Donini, Zafar, Salinas and Archambeau,
    "Multi-objective Asynchronous Successive Halving", arXiv:2106.12639.
    """
    scaled = _scaled(points)
    taken = list(chosen)
    for layer in layers(points):
        left = [place for place in layer if place not in set(taken)]
        while left and len(taken) < len(chosen) + keep:
            # The earliest of equals, so that the outcome is a function of the points alone.
            farthest = max(left, key=lambda place: (_gap(scaled, place, taken), -place))
            taken.append(farthest)
            left.remove(farthest)
    return taken[len(chosen) :]


def _gap(points: Sequence[Point], place: int, others: Sequence[int]) -> float:
    return min((math.dist(points[place], points[other]) for other in others), default=0.0)


def _scaled(points: Sequence[Point]) -> list[Point]:
    columns = list(zip(*points, strict=True))
    lows = [min(column) for column in columns]
    spans = [max(column) - low or 1.0 for column, low in zip(columns, lows, strict=True)]
    return [
        tuple((x - low) / span for x, low, span in zip(point, lows, spans, strict=True))
        for point in points
    ]
