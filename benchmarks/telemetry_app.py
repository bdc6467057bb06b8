"""The product's replica, which knows what telemetry costs it and how long its engine worked.

A replica ``off`` records nothing, one that is ``on`` is the product. One that takes ``turns`` does
each in turn, in one process, as two processes of the same code differ by some percent for good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from deployments.backbone import Backbone
from deployments.config import Config
from deployments.emulated import EmulatedEngine
from deployments.engine import Array, Pending, Rows
from deployments.metrics import ModelRecorder, RayBackend, TrafficRecorder
from deployments.tracing import Tracing

Arm = Literal["off", "on", "turns"]
TURNS = ("off", "on", "traced")
SETTLING_S, TURN_S = 2.5, 8.0  # what the turn before left to be exported; what is measured
_RECORDING = (
    *((ModelRecorder, name) for name in ("batch", "publish")),
    (RayBackend, "flush"),
    *((TrafficRecorder, name) for name in ("publish", "costs", "versions")),
)


class Metered(Backbone):
    """A replica; its statistics have ``turns`` and ``engine_worked_s`` besides."""

    def __init__(self, config: Config, arm: Arm) -> None:
        self.engine_worked_s = 0.0
        self.turn = "on" if arm == "on" else "off"
        self.turns: list[tuple[str, float, int]] = []
        for owner, name in _RECORDING:
            setattr(owner, name, self._unless_off(getattr(owner, name)))
        follow = Tracing.follow

        def followed(*arguments: Any) -> Any:
            return follow(*arguments) if self.turn == "traced" else None

        Tracing.follow = followed  # type: ignore[method-assign,assignment]
        self._watch_engine()
        super().__init__(config)
        if arm == "turns":
            threading.Thread(target=self._take_turns, daemon=True).start()

    def stats(self) -> dict[str, Any]:
        """The replica's, and each turn so far: its name, CPU seconds and answers."""
        return {
            **super().stats(),
            "turns": self.turns,
            "engine_worked_s": self.engine_worked_s,
        }

    def _unless_off(self, method: Callable[..., None]) -> Callable[..., None]:
        def recording(*arguments: Any, **keywords: Any) -> None:
            if self.turn != "off":
                method(*arguments, **keywords)

        return recording

    def _take_turns(self) -> None:
        while True:
            for self.turn in TURNS:
                time.sleep(SETTLING_S)
                cpu_s, answers = time.process_time(), self._answers()
                time.sleep(TURN_S)
                cpu_s, answers = time.process_time() - cpu_s, self._answers() - answers
                self.turns.append((self.turn, cpu_s, answers))

    def _answers(self) -> int:
        return sum(model.outcomes["ok"] for model in self.catalog)

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
        arm: Arm = "off" if name == "off" else "turns" if name == "turns" else "on"
        bound = deployment(serve.ingress()(Metered)).bind(config, arm)
        serve.run(bound, name=name, route_prefix=f"/{name}")
