"""Spot machines where there are any, on demand where not: what Ray's autoscaler leaves undone.

Ray 2.60 picks a node type again and again whose machines are refused: a refusal counts against a
type only where it comes as a time-out, as Kubernetes' does. So two node types, spot and on demand,
would never become one the other. Here the refused machine is asked for once more, on demand.
"""

from __future__ import annotations

import logging
from typing import Any

_logger = logging.getLogger(__name__)


def on_demand(node_config: dict[str, Any]) -> dict[str, Any]:
    """The same machine on demand; the very configuration where it asks for no spot machine.

    Args:
        node_config: as in `available_node_types`, for AWS (``InstanceMarketOptions``) or for GCP
            (``scheduling`` with ``provisioningModel``).
    """
    config = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
    scheduling = config.get("scheduling")
    if isinstance(scheduling, dict) and scheduling.get("provisioningModel") == "SPOT":
        # The rest says how a spot machine ends, or that it does not come back.
        config["scheduling"] = {"onHostMaintenance": scheduling["onHostMaintenance"]}
    return config


class SpotFirst:
    """A mixin for Ray's node providers."""

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Start ``count`` machines, one after the other, each on demand where spot is refused.

        One after the other, so that a refused one does not start those before it twice.

        Raises:
            Exception: the provider's own, where the machine is refused on demand too.
        """
        created: dict[str, Any] = {}
        for _ in range(count):
            created |= self._create_one(node_config, tags) or {}
        return created

    def _create_one(self, node_config: dict[str, Any], tags: dict[str, str]) -> Any:
        create = super().create_node  # type: ignore[misc]
        instead = on_demand(node_config)
        if instead == node_config:
            return create(node_config, tags, 1)
        try:
            return create(node_config, tags, 1)
        except Exception as error:
            _logger.warning("no spot machine (%s); asking for one on demand", error)
            return create(instead, tags, 1)
