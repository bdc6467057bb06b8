"""Serve's side of autoscaling: its own controller code calls the policy, without a cluster."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from datamix.errors import ConfigError
from deployments.autoscaling import Settings
from deployments.capacity import Report
from deployments.policy import PredictedWait

ROOT = Path(__file__).parents[1]
DEPLOYMENT = DeploymentID("Backbone", "datamix")
COST = {"round_s": 0.03, "row_s": 0.001, "round_rows": 256.0}


def section() -> dict[str, Any]:
    """What serve.yaml says of autoscaling."""
    settings = yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())
    found: dict[str, Any] = settings["applications"][0]["deployments"][0]["autoscaling_config"]
    return found


def configured(**other: Any) -> AutoscalingConfig:
    """As serve.yaml says, but for some."""
    return AutoscalingConfig(**{**section(), **other})


class Controller:
    """Serve's own state of one deployment, and the replicas that report to it."""

    def __init__(self, config: AutoscalingConfig, running: int = 1) -> None:
        deployment = DeploymentConfig(autoscaling_config=config)
        info = DeploymentInfo(
            deployment_config=deployment,
            replica_config=ReplicaConfig.create(lambda: None),
            start_time_ms=0,
            deployer_job_id="",
            version="1",
        )
        self.state = DeploymentAutoscalingState(DEPLOYMENT)
        self.target = self.state.register(info, running)
        self.run(running)

    def run(self, count: int) -> None:
        self.replicas = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(count)]
        self.state.update_running_replica_ids(self.replicas)

    def report(self, at_s: float, **figures: float) -> None:
        for replica in self.replicas:
            series = {
                name: [TimeStampedValue(at_s - 1, 0.0), TimeStampedValue(at_s, value)]
                for name, value in figures.items()
            }
            self.state.record_request_metrics_for_replica(
                ReplicaMetricReport(replica_id=replica, timestamp=at_s, metrics=series)
            )

    def decide(self) -> int:
        self.target = self.state.get_decision_num_replicas(self.target)
        return self.target


def test_serves_controller_gets_from_one_replica_to_what_the_load_needs_and_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    controller = Controller(configured(max_replicas=64))
    settings = Settings(**section()["policy"]["policy_kwargs"])
    with caplog.at_level(logging.WARNING, "deployments.policy"):
        for _ in range(20):
            now += 1
            each = {"offered_rows_per_s": 6000 / len(controller.replicas)}
            each |= {"offered_requests_per_s": each["offered_rows_per_s"] / 4}
            controller.report(now, predicted_wait_s=0.1, **each, **COST)
            controller.run(controller.decide())
    assert 8 <= controller.target <= 16
    assert "rows/s" in caplog.text
    top = controller.target
    downs = []
    for _ in range(int(settings.burst_window_s + settings.down_window_s) + 60):
        now += 1
        controller.report(now, predicted_wait_s=0.0, offered_rows_per_s=40, **COST)
        controller.run(controller.decide())
        downs.append(controller.target)
    assert set(downs[: int(settings.down_window_s) - 5]) == {top}
    assert downs[-1] == 1


def test_without_a_report_nothing_changes() -> None:
    controller = Controller(configured(max_replicas=64, initial_replicas=5), 5)
    assert [controller.decide() for _ in range(5)] == [5] * 5


def test_serves_from_zero_is_left_alone() -> None:
    controller = Controller(configured(min_replicas=0, max_replicas=4), 0)
    assert controller.decide() == 0
    controller.target = 1  # Serve's cold start: it starts, and has nothing to report
    assert [controller.decide() for _ in range(3)] == [1, 1, 1]


def test_serve_yaml_has_a_policy_that_serve_applies_as_it_is() -> None:
    text = (ROOT / "deployments/serve.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (deployment,) = schema.applications[0].deployments
    assert isinstance(deployment.autoscaling_config, dict)
    config = configured()
    # Serve would apply these to what the policy decides.
    assert config.upscale_delay_s == config.downscale_delay_s == 0
    assert config.get_upscaling_factor() == config.get_downscaling_factor() == 1
    # How often replicas report: metrics are recorded as often as they are pushed.
    assert config.metrics_interval_s <= 0.2 * config.look_back_period_s
    policy = config.policy.get_policy()  # as the controller unpickles it
    made = policy(**config.policy.policy_kwargs)
    assert made.settings == Settings(**section()["policy"]["policy_kwargs"])
    assert made.settings.stale_s > 3 * config.metrics_interval_s


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="^autoscaling has no setting 'wait_s', expected one of "):
        PredictedWait(wait_s=1)
    with pytest.raises(ConfigError, match="^headroom is 2, expected "):
        PredictedWait(headroom=2)


def test_the_metrics_are_those_that_the_replica_sends() -> None:
    from deployments.load import Load

    assert set(Load(lambda: 0.0).report([])) == set(Report._fields[1:])
