"""The product's replica, which knows what its metrics cost it and how long its engine worked.

In arm ``off`` nothing is recorded: what is left is the replica without metrics. In arm ``timed`` a
clock runs around all that records, which itself costs two calls of the system each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from deployments.backbone import Backbone
from deployments.config import Config
from deployments.emulated import EmulatedEngine
from deployments.engine import Array, Pending, Rows
from deployments.metrics import ModelRecorder, RayBackend, TrafficRecorder

Arm = Literal["off", "on", "timed"]
_RECORDING = (
    *((ModelRecorder, name) for name in ("batch", "publish")),
    (RayBackend, "flush"),
    *((TrafficRecorder, name) for name in ("publish", "costs", "versions")),
)


class Metered(Backbone):
    """A replica; its statistics have ``telemetry_cpu_s`` and ``engine_worked_s`` besides."""

    def __init__(self, config: Config, arm: Arm) -> None:
        self.telemetry_cpu_s = 0.0
        self.engine_worked_s = 0.0
        for owner, name in _RECORDING if arm != "on" else ():
            method = self._timed(getattr(owner, name)) if arm == "timed" else _nothing
            setattr(owner, name, method)
        self._watch_engine()
        super().__init__(config)

    def stats(self) -> dict[str, Any]:
        return {
            **super().stats(),
            "telemetry_cpu_s": self.telemetry_cpu_s,
            "engine_worked_s": self.engine_worked_s,
        }

    def _timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any, **keywords: Any) -> None:
            began = time.thread_time()
            method(*arguments, **keywords)
            self.telemetry_cpu_s += time.thread_time() - began

        return timed

    def _watch_engine(self) -> None:
        """By a clock around the engine itself, which does one batch at a time."""
        start = EmulatedEngine.start

        def watched(engine: EmulatedEngine, block: int, requests: Sequence[Rows]) -> Pending:
            began = time.perf_counter()
            pending: Any = start(engine, block, requests)
            return _Watched(pending, began, self)

        EmulatedEngine.start = watched  # type: ignore[method-assign,assignment]


class _Watched:
    def __init__(self, pending: Any, began: float, replica: Metered) -> None:
        self._pending, self._began, self._replica = pending, began, replica
        self.copied_bytes = int(pending.copied_bytes)
        self.copy_s = float(pending.copy_s)

    def done(self) -> bool:
        return bool(self._pending.done())

    def wait(self) -> Sequence[Array]:
        outputs: Sequence[Array] = self._pending.wait()
        self._replica.engine_worked_s += time.perf_counter() - self._began
        return outputs


def _nothing(*arguments: Any, **keywords: Any) -> None:
    """What is left of recording without metrics."""


def deploy(configs: dict[str, Config], port: int, replicas: int) -> None:
    """Deploy each configuration at ``/NAME``; in the arm of that name, else ``on``."""
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for name, config in configs.items():
        deployment = serve.deployment(
            name="Replica",
            max_ongoing_requests=100_000,
            graceful_shutdown_timeout_s=5,
            num_replicas=replicas,
            ray_actor_options={"num_cpus": 0},
        )
        arm: Arm = "off" if name == "off" else "timed" if name == "timed" else "on"
        bound = deployment(serve.ingress()(Metered)).bind(config, arm)
        serve.run(bound, name=name, route_prefix=f"/{name}")
