"""Many clusters of emulated replicas side by side, in steps of 40 ms, each under its own policy.

A replica is the emulated engine behind the batcher, as numbers: rows that wait, and seconds until
the batch under way is done. When the engine is free it takes what waits, up to a full batch, for
``a + b * rows`` seconds. What could not be answered by its deadline is refused on arrival, as the
batcher does. A replica that is asked for costs from then on, and takes requests once it has
started. Arrivals scatter as a Poisson process would (normal approximation); rows need not be whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

STEP_S = 0.04
STEPS = 25  # a second
_NOISE = 1 << 22  # numbers drawn once, read again and again from elsewhere


@dataclass(frozen=True, slots=True)
class Plan:
    """What is emulated.

    Attributes:
        a_s: seconds per batch.
        b_s: seconds per row.
        max_batch_rows: rows in a batch at most.
        request_rows: rows of a request.
        deadline_s: a request's deadline, from its arrival.
        start_s: seconds from the decision for a replica to its first request.
        spread_s: seconds in which a started replica gets its share of long-lived streams; 0: at
            once.
        max_replicas: the most there may be.
    """

    a_s: float = 0.03
    b_s: float = 0.001
    max_batch_rows: int = 256
    request_rows: int = 4
    deadline_s: float = 1.0
    start_s: float = 20.0
    spread_s: float = 0.0
    max_replicas: int = 64

    @property
    def full_s(self) -> float:
        """How long a full batch takes."""
        return self.a_s + self.b_s * self.max_batch_rows

    @property
    def capacity(self) -> float:
        """Requests per second of one replica whose batches are all full."""
        return self.max_batch_rows / self.full_s / self.request_rows


@dataclass(slots=True)
class View:
    """One cluster as its policy may see it, at the end of a second; arrays are (replicas,).

    Attributes:
        now_s: the time.
        target: how many replicas were asked for.
        ids: of the replicas that have started; an id is never used again.
        offered_rows: rows offered in this second.
        wait_s: seconds until all that waits or runs is done.
        ongoing: requests that wait or run.
        busy: share of this second in which a batch ran.
        active: share of it in which rows were computed, rather than batches begun.
    """

    now_s: float
    target: int
    ids: list[int]
    offered_rows: list[float]
    wait_s: list[float]
    ongoing: list[float]
    busy: list[float]
    active: list[float]


class Policy(Protocol):
    """Decides once a second for one cluster."""

    def __call__(self, view: View) -> int:
        """How many replicas there should be."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy made of one trace.

    Attributes:
        miss_share: requests refused as they could not be in time, of all.
        replica_hours: replicas asked for, summed over time.
        changes: how often the number changed.
        most: the most replicas at once.
    """

    miss_share: float
    replica_hours: float
    changes: int
    most: int


class _Clusters:
    """All clusters as arrays (clusters, replicas)."""

    def __init__(self, plan: Plan, count: int, first: Sequence[int]) -> None:
        shape = (count, plan.max_replicas)
        self.plan = plan
        self.queue = np.zeros(shape, np.float32)  # rows that wait
        self.left_s = np.zeros(shape, np.float32)  # until the batch is done
        self.running = np.zeros(shape, np.float32)  # its rows
        self.ready_s = np.full(shape, np.inf)  # when each has started; infinity: there is none
        self.ids = np.zeros(shape, np.int64)
        self.next_id = 0
        self.target = np.zeros(count, np.int64)
        for cluster, replicas in enumerate(first):
            self.scale(cluster, replicas, -plan.start_s - plan.spread_s)

    def scale(self, cluster: int, replicas: int, now_s: float) -> None:
        """Start replicas, or stop the newest: those still starting first."""
        ready = self.ready_s[cluster]
        while (have := int(self.target[cluster])) < replicas:
            place = int(np.argmax(np.isinf(ready)))
            ready[place] = now_s + self.plan.start_s
            self.ids[cluster, place] = self.next_id
            self.next_id += 1
            self.target[cluster] = have + 1
        while (have := int(self.target[cluster])) > replicas:
            ready[int(np.argmax(np.where(np.isinf(ready), -np.inf, ready)))] = np.inf
            self.target[cluster] = have - 1

    def shares(self, now_s: float) -> Floats:
        """Which part of its cluster's requests each replica gets."""
        age_s = now_s - self.ready_s
        started = age_s >= 0
        if self.plan.spread_s > 0:
            weights = np.where(started, np.clip(age_s / self.plan.spread_s, 0.02, 1.0), 0.0)
        else:
            weights = started.astype(float)
        total = weights.sum(axis=1, keepdims=True)
        shares: Floats = (weights / np.maximum(total, 1e-9)).astype(np.float32)
        return shares


def simulate(
    plan: Plan,
    rates: Sequence[npt.NDArray[np.float64]],
    policies: Sequence[Policy],
    seed: int,
    first: Sequence[int],
    *,
    skip_s: int = 0,
) -> list[Outcome]:
    """Run one policy per trace, all of them side by side.

    Args:
        plan: the emulated replica.
        rates: per cluster, offered requests per second, one number a second; all as long.
        policies: per cluster, who decides.
        seed: of the noise.
        first: per cluster, replicas that run at the start.
        skip_s: so many seconds pass before anything is counted.
    """
    if plan.deadline_s < 2 * plan.full_s:
        raise ValueError(
            f"deadline_s is {plan.deadline_s}, expected at least two full batches "
            f"({2 * plan.full_s:g})"
        )
    count = len(policies)
    world = _Clusters(plan, count, first)
    noise = np.random.default_rng(seed).standard_normal(_NOISE, np.float32)
    places = np.random.default_rng(seed + 1)
    size = count * plan.max_replicas
    shape = (count, plan.max_replicas)
    rows_per_s = plan.max_batch_rows / plan.full_s
    offered, missed = np.zeros(count), np.zeros(count)
    replica_s, changes, most = np.zeros(count), np.zeros(count, np.int64), world.target.copy()
    step, a_s, b_s = np.float32(STEP_S), np.float32(plan.a_s), np.float32(plan.b_s)
    full = np.float32(plan.max_batch_rows)
    queue, left_s, running = world.queue, world.left_s, world.running
    for second in range(len(rates[0])):
        now_s = float(second)
        shares = world.shares(now_s)
        requests = np.array([rate[second] for rate in rates], np.float32)[:, None] * shares * step
        mean, deviation = requests * plan.request_rows, np.sqrt(requests) * plan.request_rows
        came, refused = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        busy_s, computed = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for _ in range(STEPS):
            place = int(places.integers(_NOISE - size))
            rows = noise[place : place + size].reshape(shape) * deviation
            rows += mean
            came += rows
            queue += rows
            # What waits beyond this could not be done by the deadline.
            over = queue - (plan.deadline_s - left_s) * rows_per_s
            np.maximum(over, 0, out=over)
            refused += over
            queue -= over
            np.maximum(queue, 0, out=queue)
            left_s -= step
            taken = np.minimum(queue, full)
            taken *= (left_s <= 0) & (taken >= 1)
            begins = taken > 0
            np.maximum(left_s, -step, out=left_s)
            cost_s = begins * a_s + taken * b_s
            left_s += cost_s
            busy_s += cost_s
            queue -= taken
            computed += taken
            running *= left_s > 0
            np.maximum(running * ~begins, taken, out=running)
        # Those that left finish what they have; nobody counts on them.
        alone = world.ready_s.min(axis=1) > now_s
        asked = np.array([rate[second] for rate in rates]) * plan.request_rows
        if second >= skip_s:
            offered += asked
            missed += np.where(alone, asked, refused.sum(axis=1))
            replica_s += world.target
        waits = (
            left_s.clip(0)
            + queue / full * (plan.full_s - plan.a_s)
            + (np.ceil(queue / full) * plan.a_s)
        )
        ongoing = (queue + running) / plan.request_rows
        active = computed * plan.b_s
        busy = np.minimum(busy_s, 1)
        for cluster, policy in enumerate(policies):
            (up,) = np.nonzero(world.ready_s[cluster] <= now_s)
            before = int(world.target[cluster])
            target = policy(
                View(
                    now_s + 1.0,
                    before,
                    world.ids[cluster, up].tolist(),
                    came[cluster, up].tolist(),
                    waits[cluster, up].tolist(),
                    ongoing[cluster, up].tolist(),
                    busy[cluster, up].tolist(),
                    active[cluster, up].tolist(),
                )
            )
            target = max(1, min(plan.max_replicas, target))
            if target != before:
                world.scale(cluster, target, now_s + 1.0)
                changes[cluster] += second >= skip_s
        np.maximum(most, world.target, out=most)
    return [
        Outcome(
            float(missed[i] / offered[i]),
            float(replica_s[i] / 3600),
            int(changes[i]),
            int(most[i]),
        )
        for i in range(count)
    ]
