"""The queue of a batching engine, solved: Poisson requests, a batch whenever the engine is free.

What waits when the engine is free goes into one batch, up to ``most`` requests, in the order of
arrival; an idle engine starts at once. A batch of k requests takes ``a_s + b_s * k`` seconds. So
requests that are left at the end of a batch form a Markov chain, and the distribution of latencies
follows from it by sums over the Poisson distribution, without a random number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BatchQueue:
    """An engine and its bound.

    Attributes:
        a_s: seconds per batch.
        b_s: seconds per request.
        most: requests in a batch at most.
    """

    a_s: float
    b_s: float
    most: int

    @property
    def saturation(self) -> float:
        """Requests per second if every batch were full: above that the queue grows for ever."""
        return self.most / self.step_s(self.most)

    def step_s(self, requests: float) -> float:
        """How long a batch takes."""
        return self.a_s + self.b_s * requests

    def waiting(self, rate: float) -> Floats:
        """Distribution of the requests that wait at the end of a batch, (n,), cut where it is 0."""
        if not 0 < rate < self.saturation:
            raise ValueError(f"rate is {rate}, expected below the saturation {self.saturation}")
        size = 4 * self.most
        while True:
            found = self._stationary(rate, size)
            if found[-self.most :].sum() < 1e-9 or size > 4096:
                return found
            size *= 2

    def _stationary(self, rate: float, size: int) -> Floats:
        moves = np.zeros((size, size))
        for state in range(size):
            # An engine with nothing to do waits for one request and starts with it alone.
            batch = min(max(state, 1), self.most)
            left = max(state, 1) - batch
            arrivals = poisson(rate * self.step_s(batch), size - left)
            moves[state, left:] = arrivals
            moves[state, -1] += max(0.0, 1.0 - arrivals.sum())
        system = np.vstack([moves.T - np.eye(size), np.ones(size)])
        right = np.zeros(size + 1)
        right[-1] = 1.0
        found = np.clip(np.linalg.lstsq(system, right, rcond=None)[0], 0.0, None)
        return np.asarray(found / found.sum(), np.float64)

    def late(self, rate: float, bound_s: float, points: int = 64) -> float:
        """Share of requests that are answered later than ``bound_s`` after their arrival."""
        states = self.waiting(rate)
        late_requests = requests = 0.0
        # A request that finds the engine idle is its own batch: one per state 0.
        requests += states[0]
        late_requests += states[0] * (self.step_s(1) > bound_s)
        size = len(states) + 8 * self.most
        for batch in range(1, self.most + 1):
            # All states with this batch, by what they leave behind.
            left = np.zeros(len(states))
            if batch == self.most:
                left[: len(states) - batch] = states[batch:]
            else:
                left[0] = states[batch]
            if batch == 1:
                left[0] += states[0]
            if left.sum() < 1e-12:
                continue
            step_s = self.step_s(batch)
            expected = rate * step_s
            requests += left.sum() * expected
            # Arrivals at the middles of equal parts of the batch: ahead are those left and those
            # that came before.
            for part in range(points):
                passed_s = (part + 0.5) / points * step_s
                ahead = np.convolve(left, poisson(rate * passed_s, size))[:size]
                share = self._late_behind(ahead, rate, step_s - passed_s, bound_s)
                late_requests += expected / points * share
        return float(late_requests / requests)

    def _late_behind(self, ahead: Floats, rate: float, rest_s: float, bound_s: float) -> float:
        """Weight of ``ahead`` (by requests before this one) for which the answer is late."""
        full_s = self.step_s(self.most)
        late = 0.0
        for batches in range(-(-len(ahead) // self.most)):
            weights = ahead[batches * self.most : (batches + 1) * self.most]
            if weights.sum() < 1e-13:
                continue
            waits_s = rest_s + batches * full_s
            # The largest own batch that is in time; with it, what may still join.
            room_s = bound_s - waits_s - self.a_s
            fits = min(self.most, math.floor(room_s / self.b_s + 1e-9)) if self.b_s else self.most
            if room_s < 0 or fits < 1:
                late += weights.sum()
            elif fits < self.most:
                joins = np.cumsum(poisson(rate * waits_s, self.most + 1))
                for place, weight in enumerate(
                    weights
                ):  # this one is number place + 1 of its batch
                    may_join = fits - place - 1
                    late += weight * (1.0 - (joins[may_join] if may_join >= 0 else 0.0))
        return float(late)

    def capacity(self, bound_s: float, share: float) -> float:
        """The largest rate at which at most ``share`` of the requests are later than ``bound_s``.

        0 where even a request that finds everything idle is late.
        """
        low, high = 0.0, self.saturation * 0.9999
        while high - low > 1e-4 * self.saturation:
            middle = (low + high) / 2
            low, high = (middle, high) if self.late(middle, bound_s) <= share else (low, middle)
        return low

    def follow(self, arrivals_s: Floats) -> Floats:
        """Latencies, (n,), of requests that arrive then, (n,) rising; in seconds."""
        done_s = np.empty(len(arrivals_s))
        free_s, first = 0.0, 0
        while first < len(arrivals_s):
            start_s = max(free_s, float(arrivals_s[first]))
            last = int(np.searchsorted(arrivals_s, start_s, side="right"))
            last = min(max(last, first + 1), first + self.most)
            free_s = start_s + self.step_s(last - first)
            done_s[first:last] = free_s
            first = last
        return done_s - arrivals_s

    def simulate(self, rate: float, requests: int, seed: int) -> tuple[Floats, Floats]:
        """Draw arrivals and follow them: (requests,) arrival times and latencies, in seconds."""
        arrivals_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
        return arrivals_s, self.follow(arrivals_s)


def poisson(mean: float, size: int) -> Floats:
    """Probabilities of 0 to size - 1 events where ``mean`` are expected."""
    counts = np.arange(size)
    if mean == 0:
        return np.asarray(counts == 0, dtype=np.float64)
    logs = counts * math.log(mean) - mean
    logs[1:] -= np.cumsum(np.log(counts[1:]))
    return np.asarray(np.exp(logs), dtype=np.float64)
