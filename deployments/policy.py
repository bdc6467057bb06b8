"""Serve's autoscaling policy: what its controller sees, decided by :mod:`deployments.autoscaling`.

Serve pickles the class into its controller, which finds what it imports by name: ``datamix`` and
``deployments`` must be on the controller's path (PYTHONPATH in cluster.yaml).
"""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from datamix.errors import ConfigError
from deployments.autoscaling import Decision, Observation, Settings, State, decide
from deployments.capacity import Report
from deployments.metrics import Backend, Decisions, RayBackend, rows

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

logger = logging.getLogger(__name__)

_FIELDS = Report._fields[1:]  # of a report, each a metric of `Backbone.record_autoscaling_stats`


class PredictedWait:
    """Serve's policy: ``policy_function: deployments.policy:PredictedWait``.

    Serve makes one, with ``policy_kwargs`` as arguments, and calls it ten times a second. It would
    apply ``upscale_delay_s`` and ``downscale_delay_s`` to what comes back: set both to 0.
    """

    def __init__(self, **settings: Any) -> None:
        """Hold these :class:`Settings`.

        Raises:
            ConfigError: an unknown one, or a number out of its range.
        """
        names = [each.name for each in fields(Settings)]
        for name in settings:
            if name not in names:
                raise ConfigError(
                    f"autoscaling has no setting {name!r}, expected one of {', '.join(names)}"
                )
        self.settings = Settings(**settings)
        self._decisions: Decisions | None = None

    def publish_to(self, backend: Backend) -> None:
        """Publish decisions there; without it, to Ray's metrics agent where there is a Ray."""
        self._decisions = Decisions(backend)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Decide for one deployment; the state lives in Serve's own."""
        state = ctx.policy_state.get("state", State())
        decision, after = decide(self.settings, state, observe(ctx))
        if decision.replicas != ctx.target_num_replicas:
            logger.warning(
                "%s: from %d to %d replicas for %.4g rows/s at %.4g each, wait %.3g s",
                ctx.deployment_name,
                ctx.target_num_replicas,
                *decision,
                after.wait_s,
            )
        self._publish(decision, after, ctx)
        return decision.replicas, {"state": after}

    def _publish(self, decision: Decision, after: State, ctx: AutoscalingContext) -> None:
        if self._decisions is None:
            import ray

            if not ray.is_initialized():  # as in a plan or a test, which have no metrics agent
                return
            self.publish_to(RayBackend(rows("autoscaler"), of_replica=False))
        assert self._decisions is not None
        try:
            self._decisions.publish(
                before=ctx.target_num_replicas,
                target=decision.replicas,
                running=len(ctx.running_replicas),
                forecast_rows=decision.forecast_rows_per_s,
                capacity_rows=decision.capacity_rows_per_s,
                wait_s=after.wait_s,
            )
        except Exception:  # the decision stands
            logger.exception("an autoscaling decision was not published")


def observe(ctx: AutoscalingContext) -> Observation:
    """What Serve knows of a deployment, as the policy sees it."""
    reports: dict[str, dict[str, float]] = {}
    for name in _FIELDS:
        for replica, series in ((ctx.raw_metrics or {}).get(name) or {}).items():
            if series:
                report = reports.setdefault(replica.unique_id, {})
                report[name] = series[-1].value
                report["time_s"] = series[-1].timestamp
    return Observation(
        now_s=time.time() if ctx.current_time is None else ctx.current_time,
        target=ctx.target_num_replicas,
        running=[replica.unique_id for replica in ctx.running_replicas],
        reports={name: Report(**report) for name, report in reports.items()},
        min_replicas=ctx.capacity_adjusted_min_replicas,
        max_replicas=ctx.capacity_adjusted_max_replicas,
    )
