"""`serve run deployments.app:app bundle=...`: binding and nothing else.

Annotations are not put off here: Serve looks at the builder's, and would call it with a plain dict
where it found the text of one.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from deployments.backbone import Backbone
from deployments.config import Config

# A stream is one "ongoing request" to Serve for as long as it is open, and every device holds one.
_MAX_STREAMS = 100_000


def app(config: Config) -> Application:
    """Build the application for ``serve run`` and `deployments/serve.yaml`."""
    return bind(config)


def bind(config: Config, **options: Any) -> Application:
    """Bind one backbone as the ingress: HAProxy connects straight to its replicas.

    ``options`` are those of ``serve.deployment`` and override :func:`defaults`.
    """
    deployment = serve.deployment(**(defaults(config) | options))
    bound: Application = deployment(serve.ingress()(Backbone)).bind(config)
    return bound


def defaults(config: Config) -> dict[str, Any]:
    """The deployment's options; replicas and resources are `deployments/serve.yaml`'s business."""
    return {
        "name": "Backbone",
        "max_ongoing_requests": _MAX_STREAMS,
        "health_check_period_s": 1,
        "health_check_timeout_s": config.health_timeout_s + 2,
        "graceful_shutdown_timeout_s": 20,
        # A redeployment starts a new replica before it stops an old one, and stops none where the
        # new ones fail to start.
        "max_surge_percent": 100,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(config.device != "cpu")},
    }
