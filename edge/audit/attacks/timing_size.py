"""Sizes, counts and gaps: what an operator sees without opening a message.

Traffic analysis (Dyer and others, "Peek-a-boo, I still see you", IEEE S&P 2012). Two groups whose
traffic is alike beyond chance may have an input in common; where sizes and counts depend on K and
the split point alone, only gaps are left, which are the device's own computing times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamix import wire
from edge.audit.attack import ALL_MODES, Budget, Claim
from edge.audit.features import Array
from edge.audit.observation import Observation, requests


@dataclass(frozen=True, slots=True)
class TimingSize:
    """Pairs of groups whose traffic is alike."""

    name: str = "timing-size"
    title: str = "message sizes, counts and gaps, the messages unopened"
    modes: frozenset[str] = ALL_MODES
    operators: frozenset[str] = frozenset({"A"})

    def run(self, observation: Observation, budget: Budget) -> Claim:
        """See :class:`edge.audit.attack.Attack`."""
        sizes: dict[str, list[int]] = {}
        for message in observation.messages:
            request_id = wire.peek_request_id(message.body)
            sizes.setdefault(request_id, []).append(len(message.body))
        groups = requests(observation)
        # Request ids have one length; sizes are compared without what numbers of digits add.
        counted = np.array(
            [[max(sizes[one]) for one in group.request_ids] for group in groups], np.float64
        )
        counts = np.array([[len(sizes[one]) for one in group.request_ids] for group in groups])
        gaps = np.array([np.diff(group.at_s) for group in groups]).reshape(len(groups), -1)
        traces = np.concatenate([counted, counts, gaps], axis=1)
        return Claim(
            pairs=likeness(traces),
            notes=f"{len(np.unique(counted, axis=0))} patterns of sizes,"
            f" {len(np.unique(counts, axis=0))} of counts, in {len(groups)} groups",
        )


def likeness(traces: Array) -> Array:
    """(groups, groups): the higher, the more alike two traces (groups, n); rare ones weigh more."""
    spread = traces.std(axis=0)
    standard = (traces - np.median(traces, axis=0)) / np.where(spread > 0, spread, 1)
    apart = np.abs(standard[:, None] - standard[None]).sum(axis=2)
    unusual = np.abs(standard).sum(axis=1)
    alike: Array = np.minimum(unusual[:, None], unusual[None]) - apart
    return alike


ATTACK = TimingSize()
