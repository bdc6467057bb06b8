"""Ray's node provider for AWS, spot first; `provider: module` in cluster.yaml. Needs boto3."""

from __future__ import annotations

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from deployments import spot


class SpotFirst(spot.SpotFirst, AWSNodeProvider):
    """AWSNodeProvider that asks on demand where a spot machine is refused."""
