"""What a candidate costs, computed on shapes alone: nothing is allocated, nothing trained."""

from __future__ import annotations

import torch
from torch import nn

from datamix.errors import ConfigError
from datamix.models import Architecture, block_shapes, build, count_flops
from datamix.models.costs import bytes_on_wire
from datamix.wire import Dtype
from edge.networks import architecture_for
from edge.search.budget import Costs
from edge.search.space import Candidate


def cost(
    candidate: Candidate,
    *,
    method: str = "linear",
    group_size: int,
    wire_dtype: Dtype,
    input_shape: tuple[int, int, int],
    classes: int,
) -> Costs:
    """Costs per input of ``candidate`` in groups of ``group_size``, with the cloud of ``method``.

    Raises:
        ConfigError: options that no network can be built from, or that don't fit the data or the
            method.
    """
    plain = Architecture(candidate.architecture, dict(candidate.options))
    architecture = architecture_for(method, plain)
    with torch.device("meta"):
        model = build(architecture)
    if (model.input_shape, model.classes) != (input_shape, classes):
        raise ConfigError(
            f"the network takes {model.input_shape} and tells {model.classes} classes,"
            f" expected {input_shape} and {classes}"
        )
    flops = count_flops(model, group_size=group_size)
    pairs = zip(flops.blocks, flops.collapsed_blocks, strict=True)
    return Costs(
        edge_flops=flops.edge,
        cloud_flops=flops.cloud,
        cloud_flops_collapsed=sum(b if least is None else least for b, least in pairs),
        bytes_per_inference=bytes_on_wire(block_shapes(model), wire_dtype),
        round_trips=len(model.blocks),
        parameters_device_bytes=sum(map(_float_bytes, (model.stem, model.bridges, model.head))),
    )


def _float_bytes(part: nn.Module) -> int:
    """Weights and a norm's statistics; not its counter of batches, which no device needs."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in part.state_dict().values()
        if tensor.is_floating_point()
    )
