"""Ray's node provider for GCP, spot first; `provider: module` in cluster/launch/gcp.yaml.

Needs google-api-python-client.
"""

from __future__ import annotations

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

from deployments import spot


class SpotFirst(spot.SpotFirst, GCPNodeProvider):
    """GCPNodeProvider that asks on demand where a spot machine is refused."""
