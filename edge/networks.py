"""Untrained networks, as each method needs them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from datamix.errors import ConfigError
from datamix.models import Architecture, build
from edge.methods import METHODS


def architecture_for(method: str, architecture: Architecture) -> Architecture:
    """The architecture with the cloud that ``method`` needs.

    An option ``cloud`` that is given stays, if it fits. An architecture that has no such option is
    taken as it is, if it fits.

    Raises:
        ConfigError: the blocks are linear where the method needs others, or the other way round;
            or what :func:`datamix.models.build` raises.
    """
    wanted = METHODS[method]
    chosen = architecture
    if "cloud" not in architecture.options:
        chosen = replace(architecture, options={**architecture.options, "cloud": wanted.cloud})
    with torch.device("meta"):
        try:
            model = build(chosen)
        except ConfigError as error:
            if "unknown option 'cloud'" not in str(error) or chosen is architecture:
                raise
            chosen, model = architecture, build(architecture)
    if wanted.linear is not None and model.linear != wanted.linear:
        kind = "linear" if model.linear else "non-linear"
        raise ConfigError(
            f"the blocks of {architecture.name} are {kind}, expected the others for the method"
            f" {method}"
        )
    return chosen


def untrained(method: str, architecture: Architecture, seed: int) -> nn.Module:
    """The network of ``method`` before training: a :class:`SplitModel`, or stem and edge head.

    Weights are a function of ``seed``. Both kinds have a stem of the same sizes.
    """
    torch.manual_seed(seed)
    model = build(architecture_for(method, architecture))
    if METHODS[method].offloads:
        return model
    return nn.Sequential(model.stem, model.edge_head())
