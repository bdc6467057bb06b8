"""Spot first: a refused machine is asked for on demand, once, and no other is asked for twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.spot import SpotFirst, on_demand

ROOT = Path(__file__).parents[1]


def worker(name: str) -> dict[str, Any]:
    """What the shipped file asks the cloud for."""
    config = yaml.safe_load((ROOT / name).read_text())
    found: dict[str, Any] = config["available_node_types"]["gpu_worker"]["node_config"]
    return found


AWS, GCP = worker("cluster.yaml"), worker("cluster/launch/gcp.yaml")


def is_spot(config: dict[str, Any]) -> bool:
    """As the clouds understand it."""
    market = config.get("InstanceMarketOptions", {}).get("MarketType")
    model = config.get("scheduling", {}).get("provisioningModel")
    return bool(market == "spot" or model == "SPOT")


class Cloud:
    """A provider with so many spot machines, and so many others."""

    def __init__(self, spot: int, others: int) -> None:
        self.left = {True: spot, False: others}
        self.asked: list[bool] = []

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        spot = is_spot(node_config)
        self.asked += [spot] * count
        if self.left[spot] < count:
            raise RuntimeError(f"InsufficientInstanceCapacity: {'spot' if spot else 'on demand'}")
        self.left[spot] -= count
        return {f"machine-{len(self.asked)}": (node_config["zone"], tags["kind"])}


class Provider(SpotFirst, Cloud):
    """As deployments/spot_aws.py makes one of Ray's."""


@pytest.mark.parametrize("config", [AWS, GCP])
def test_the_shipped_workers_are_spot_and_the_same_on_demand(config: dict[str, Any]) -> None:
    assert is_spot(config)
    instead = on_demand(config)
    assert not is_spot(instead)
    same = config.keys() - {"InstanceMarketOptions", "scheduling"}
    assert {key: instead[key] for key in same} == {key: config[key] for key in same}
    assert on_demand(instead) == instead


def test_a_gpu_machine_of_gcp_ends_for_maintenance_all_the_same() -> None:
    assert on_demand(GCP)["scheduling"] == {"onHostMaintenance": "TERMINATE"}


@pytest.mark.parametrize("config", [AWS, GCP])
def test_spot_first_then_on_demand(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    provider = Provider(spot=2, others=9)
    made = provider.create_node(config | {"zone": "a"}, {"kind": "worker"}, 4)
    assert provider.asked == [True, True, True, False, True, False]
    assert sorted(made.values()) == [("a", "worker")] * 4
    assert "InsufficientInstanceCapacity: spot" in caplog.text


def test_refused_on_demand_too_is_an_error() -> None:
    provider = Provider(spot=0, others=1)
    with pytest.raises(RuntimeError, match="on demand"):
        provider.create_node(AWS | {"zone": "a"}, {"kind": "worker"}, 2)


def test_a_machine_on_demand_is_asked_for_once() -> None:
    provider = Provider(spot=9, others=0)
    with pytest.raises(RuntimeError, match="on demand"):
        provider.create_node(on_demand(AWS) | {"zone": "a"}, {"kind": "head"}, 1)
    assert provider.asked == [False]


def test_ray_itself_would_ask_for_spot_for_ever() -> None:
    """Why this exists: a type that was refused is as good to Ray's autoscaler as another."""
    from ray.autoscaler._private.node_provider_availability_tracker import (
        NodeProviderAvailabilityTracker,
    )
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    tracker = NodeProviderAvailabilityTracker(timer=lambda: 0.0)
    refused = NodeLaunchException("InsufficientInstanceCapacity", "none", None)
    tracker.update_node_availability("spot", 0, refused)
    seen = tracker.summary()
    machine: dict[str, Any] = {"CPU": 8, "GPU": 1}
    demand: list[Any] = [{"GPU": 1}]
    scores = [
        _default_utilization_scorer(machine, demand, kind, node_availability_summary=seen)
        for kind in ("spot", "on-demand")
    ]
    assert scores[0] == scores[1]
