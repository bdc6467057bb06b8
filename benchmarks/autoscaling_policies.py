"""Three ways to size a deployment, on the same figures: ours and two rivals at their best.

The rival on ongoing requests is Ray Serve's own code (2.60): its policy, scaling factors and delay
logic, on metrics that are recorded, pushed and averaged as Serve does it. Requests are counted as
if each were one to Serve; with streams it would count devices and not follow the load at all.

The rival on GPU% is the algorithm of Kubernetes' HorizontalPodAutoscaler: every 15 s the mean over
started replicas over its target, a tolerance of 0.1, replicas that are starting counted as idle on
the way up, at most twice as many or 4 more in 15 s, and down to the most that was recommended
within a stabilisation window. It comes with two readings of GPU%: "busy", the share of time in
which a kernel ran (nvidia-smi's utilisation), and "active", the share in which rows were computed
(the profilers' SM activity).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve._private.metrics_utils import aggregate_timeseries
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AggregationFunction, AutoscalingConfig, AutoscalingContext

from benchmarks.autoscaling_world import Plan, View
from deployments.autoscaling import Observation, Settings, State, decide
from deployments.capacity import Report


class PredictedWait:
    """Ours: the core as it ships, on reports that are a second old."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self._plan, self._settings = plan, settings
        self._state = State()
        self._before: dict[int, float] = {}
        self._reports: dict[str, Report] = {}

    def __call__(self, view: View) -> int:
        reports, self._reports = self._reports, self._report(view)
        running = [str(name) for name in view.ids]
        seen = Observation(
            view.now_s,
            view.target,
            running,
            {name: reports[name] for name in running if name in reports},
            1,
            self._plan.max_replicas,
        )
        decision, self._state = decide(self._settings, self._state, seen)
        return decision.replicas

    def _report(self, view: View) -> dict[str, Report]:
        """Rates over two seconds, as a replica's load meter has them."""
        plan = self._plan
        reports = {}
        for name, rows, wait_s in zip(view.ids, view.offered_rows, view.wait_s, strict=True):
            rate = (rows + self._before.get(name, 0.0)) / 2
            reports[str(name)] = Report(
                view.now_s,
                wait_s,
                rate,
                rate / plan.request_rows,
                plan.a_s,
                plan.b_s,
                plan.max_batch_rows if name in self._before else 0,  # it has to learn its costs
            )
        self._before = dict(zip(view.ids, view.offered_rows, strict=True))
        return reports


class OngoingRequests:
    """Ray Serve's default policy."""

    def __init__(
        self,
        plan: Plan,
        target: float,
        *,
        up_delay_s: float = 30.0,
        down_delay_s: float = 600.0,
        look_back_s: float = 30.0,
        push_s: float = 10.0,
    ) -> None:
        # Look-back and push interval are done here: they would only make the constructor warn.
        self._config = AutoscalingConfig(
            min_replicas=1,
            max_replicas=plan.max_replicas,
            target_ongoing_requests=target,
            upscale_delay_s=up_delay_s,
            downscale_delay_s=down_delay_s,
        )
        self._look_back_s, self._push_s = look_back_s, push_s
        self._record_s = max(1.0, min(0.2 * look_back_s, push_s))
        self._recorded: deque[TimeStampedValue] = deque()
        self._pushed: list[TimeStampedValue] = []
        self._state: dict[str, Any] = {}

    def __call__(self, view: View) -> int:
        now_s = view.now_s
        if not self._recorded or now_s - self._recorded[-1].timestamp >= self._record_s:
            self._recorded.append(TimeStampedValue(now_s, math.fsum(view.ongoing)))
        while now_s - self._recorded[0].timestamp > self._look_back_s:
            self._recorded.popleft()
        if now_s % self._push_s < 1.0:
            self._pushed = list(self._recorded)
        total = 0.0
        if self._pushed:
            held_s = max(1e-3, now_s - self._pushed[-1].timestamp)
            total = aggregate_timeseries(self._pushed, AggregationFunction.MEAN, held_s) or 0.0
        context = AutoscalingContext(
            deployment_id=DeploymentID("Backbone"),
            deployment_name="Backbone",
            app_name="datamix",
            current_num_replicas=len(view.ids),
            target_num_replicas=view.target,
            running_replicas=[],
            total_num_requests=total,
            total_queued_requests=0.0,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
        # What Serve's `_apply_default_params` does, with our clock instead of the wall's.
        desired, _ = replica_queue_length_autoscaling_policy(context)
        desired = _apply_scaling_factors(desired, len(view.ids), self._config)
        decided, self._state = _apply_delay_logic(
            max(0, desired), view.target, self._config, self._state, now_s
        )
        return decided


class GpuShare:
    """The HorizontalPodAutoscaler on a share of GPU time."""

    PERIOD_S = 15
    TOLERANCE = 0.1

    def __init__(
        self,
        target: float,
        reading: Literal["busy", "active"] = "busy",
        *,
        stabilisation_s: float = 300.0,
    ) -> None:
        self._target, self._reading, self._stabilisation_s = target, reading, stabilisation_s
        self._means: deque[float] = deque(maxlen=self.PERIOD_S)
        self._recommended: list[tuple[float, int]] = []

    def __call__(self, view: View) -> int:
        values: list[float] = getattr(view, self._reading)
        if values:
            self._means.append(math.fsum(values) / len(values))
        if not self._means or round(view.now_s) % self.PERIOD_S:
            return view.target
        if not self._recommended:
            self._recommended.append((view.now_s, view.target))
        desired = self._desired(len(view.ids), view.target)
        most = max(2 * view.target, view.target + 4)
        self._recommended = [
            (at_s, replicas)
            for at_s, replicas in self._recommended
            if view.now_s - at_s < self._stabilisation_s
        ]
        self._recommended.append((view.now_s, desired))
        if desired < view.target:
            return min(view.target, max(replicas for _, replicas in self._recommended))
        return min(desired, most)

    def _desired(self, started: int, target: int) -> int:
        ratio = math.fsum(self._means) / len(self._means) / self._target
        if abs(ratio - 1) <= self.TOLERANCE:
            return target
        if ratio > 1 and started < target:
            ratio *= started / target
            if ratio <= 1 + self.TOLERANCE:
                return target
            return math.ceil(ratio * target)
        return math.ceil(ratio * started)
