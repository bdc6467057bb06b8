"""What a device can afford, and what an architecture asks of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from datamix.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Costs:
    """What one architecture costs per input, whatever its weights are.

    Attributes:
        edge_flops: of the device, two per multiply-add; mixing and de-mixing included.
        cloud_flops: of the cloud, layer by layer.
        cloud_flops_collapsed: the same with each linear block at its cheapest.
        bytes_per_inference: values on the wire, up and down, over all rounds.
        round_trips: to the cloud.
        parameters_device_bytes: weights the device holds, in float32.
    """

    edge_flops: int
    cloud_flops: int
    cloud_flops_collapsed: int
    bytes_per_inference: int
    round_trips: int
    parameters_device_bytes: int

    @property
    def edge_flops_share(self) -> float:
        """The device's share of all FLOPs, 0 to 1."""
        return self.edge_flops / (self.edge_flops + self.cloud_flops)

    @property
    def edge_flops_share_collapsed(self) -> float:
        """The same against collapsed blocks; never the smaller of the two."""
        return self.edge_flops / (self.edge_flops + self.cloud_flops_collapsed)


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """The most that a device can afford per input; None: no limit.

    Attributes:
        edge_flops_share: share of all FLOPs, 0 to 1. Held against collapsed blocks, so a budget
            that is kept is kept by the count layer by layer, too.
        edge_flops: FLOPs on the device.
        bytes_per_inference: bytes on the wire, both ways, all rounds.
        round_trips: to the cloud.
        parameters_device_bytes: bytes of the device's weights.
    """

    edge_flops_share: float | None = None
    edge_flops: int | None = None
    bytes_per_inference: int | None = None
    round_trips: int | None = None
    parameters_device_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse a budget that nothing can keep."""
        if self.edge_flops_share is not None and not 0 < self.edge_flops_share <= 1:
            raise ConfigError(
                f"edge_flops_share is {self.edge_flops_share}, expected more than 0, at most 1"
            )
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and field.name != "edge_flops_share" and limit < 1:
                raise ConfigError(f"{field.name} is {limit}, expected at least 1")

    def excess(self, costs: Costs) -> str | None:
        """What ``costs`` breaks this budget with, all of it in one line; None if it keeps it."""
        found = []
        share = costs.edge_flops_share_collapsed
        if self.edge_flops_share is not None and share > self.edge_flops_share:
            found.append(
                f"edge_flops_share {share:.1%} (collapsed), expected at most"
                f" {self.edge_flops_share:.1%}"
            )
        for name in ("edge_flops", "bytes_per_inference", "round_trips", "parameters_device_bytes"):
            limit, value = getattr(self, name), getattr(costs, name)
            if limit is not None and value > limit:
                found.append(f"{name} {value:,}, expected at most {limit:,}")
        return "; ".join(found) or None
