"""On which terms a run's inputs leave: the mode, its promise, and who gets what.

Agreed before a device connects, and refused for the reasons for which the client refuses.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from datamix.errors import ConfigError
from edge.promises import Promise, promise

if TYPE_CHECKING:
    from edge.fleet.config import FleetConfig

ECHO = "echo: a load test; the devices sent noise, so there was nothing to protect"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run may say about privacy.

    Attributes:
        promise: of the mode that the devices use.
        not_private: in the mode split, why the two ends seem to have one operator; else None.
        accuracy_edge_only: what a network that never used the cloud reached in training, where
            the bundle says so: what a mode has to beat.
    """

    promise: Promise
    not_private: str | None = None
    accuracy_edge_only: float | None = None


def agree(config: FleetConfig) -> Terms | None:
    """Check mode and ends, and ask in the mode split who runs these; None for the echo workload.

    Raises:
        BundleError: the bundle cannot be read or trusted.
        ConfigError: the bundle was not made for the mode, there is one operator too many or too
            few, both ends seem to have one, or the second serves another model.
        DataMixError: an end could not be asked.
    """
    if config.workload == "echo" or config.bundle is None:
        return None
    from datamix.bundle import read_manifest

    manifest = read_manifest(config.bundle)
    promised = promise(manifest, config.mode)
    # What it imports, an echo worker does without.
    from edge.operators import Operators, check_ends

    more = config.second_token is not None or config.allow_same_operator
    check_ends(promised.mode, second=config.second is not None, more=more)
    edge_only = manifest.metrics.get("accuracy_edge_only")
    if config.second is None:
        return Terms(promised, None, edge_only)
    _check_second(config, [tuple(block.input_shape) for block in manifest.blocks])
    operators = Operators(
        (config.base_url, config.second.rstrip("/")),
        (config.access, config.second_access),
        allow_same=config.allow_same_operator,
    )
    asyncio.run(operators.check())
    return Terms(promised, operators.same, edge_only)


def _check_second(config: FleetConfig, shapes: list[tuple[int, ...]]) -> None:
    """Refuse an operator B that cannot answer for operator A's model."""
    from edge.fleet.run import discover

    assert config.second is not None
    other = discover(
        replace(
            config,
            url=config.second,
            token=config.second_token,
            second=None,
            second_token=None,
            allow_same_operator=False,
        )
    )
    if list(other.input_shapes) != shapes:
        raise ConfigError(
            f"operator B's blocks take {list(other.input_shapes)}, expected {shapes} as the"
            " bundle's do"
        )
