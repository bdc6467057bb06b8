"""The fleet's shards as Ray actors: load from as many machines as a cluster has.

One actor per shard, sized by resources and spread over the nodes, each with thousands of devices;
never one actor per device. The driver asks each what it has to say, as it does its own processes.

Clocks: each machine has a monotonic clock of its own. Before the start the driver asks each actor
for its time, again and again; the quickest answer gives the offset, and half of its round trip
bounds the error. All times of one device come from one clock, so a latency has no such error.

``edge`` is not on a cloud's nodes, and stays off its replicas: the code goes to the workers of this
driver's own job (``py_modules``), and to nobody else's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import datamix
import edge
from datamix.errors import ConfigError, Unavailable
from edge.fleet.config import FleetConfig
from edge.fleet.crew import Crew, Lost, Word
from edge.fleet.outpost import Outpost
from edge.fleet.prepare import Shelf
from edge.fleet.process import Failure, Target, Task
from edge.fleet.shard import ShardResult

_CALLS = 4  # of one actor at once: a long one that waits for words, and orders
_POLL_S = 1.0
_PLACED_S = 60.0  # for all shards to get their place; a cluster may have to start nodes
_PINGS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """An actor's clock, seen from here.

    Attributes:
        offset_s: its time minus ours.
        error_s: by how much that may be wrong, at most.
    """

    offset_s: float
    error_s: float


def compare_clocks(pings: Sequence[tuple[float, float, float]]) -> Clock:
    """Find a clock's offset from (our time before, its time, our time after), at least one.

    Its time was read somewhere between ours; the narrowest window says most.
    """
    before, theirs, after = min(pings, key=lambda ping: ping[2] - ping[0])
    return Clock(theirs - (before + after) / 2, (after - before) / 2)


def parse_resources(text: str) -> dict[str, float]:
    """Read ``CPU=1,generator=0.5``: what one shard takes of its node.

    Raises:
        ConfigError: it is no such list, or no CPU is in it.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            equals = ""
        if not equals or not name.strip() or not 0 < found[name.strip()] < math.inf:
            raise ConfigError(f"resources are {text!r}, expected such as CPU=1,generator=1")
    if "CPU" not in found:
        raise ConfigError(f"resources are {text!r}, expected some CPU: a shard is busy with one")
    return found


class RayFleet:
    """Launches shards on the cluster that this process is connected to.

    Attributes:
        resources: what each shard takes.
    """

    def __init__(self, resources: Mapping[str, float]) -> None:
        """Launch shards of this size."""
        self.resources = dict(resources)

    def room(self) -> int:
        """How many shards fit on the cluster now.

        Raises:
            Unavailable: none does.
        """
        import ray

        free = ray.available_resources()  # type: ignore[no-untyped-call]
        fitting = min(int(free.get(name, 0.0) // size) for name, size in self.resources.items())
        if fitting < 1:
            raise Unavailable(self._no_room(1))
        return fitting

    @contextlib.contextmanager
    def __call__(self, config: FleetConfig, target: Target, shelf: Shelf | None) -> Iterator[Crew]:
        """Start the actors; on leaving, whatever the reason, none of them is alive.

        Raises:
            Unavailable: the cluster has no room for them.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        shards = config.processes
        group = placement_group([self.resources] * shards, strategy="SPREAD")
        actors: list[Any] = []
        try:
            if not group.wait(_PLACED_S):
                raise Unavailable(self._no_room(shards))
            others = {name: size for name, size in self.resources.items() if name != "CPU"}
            layout, memory = None, None
            if shelf is not None:
                # One copy per node, which its actors see as it is, read-only.
                layout, memory = shelf.layout, ray.put(np.frombuffer(shelf.memory.view, np.uint8))
            for number in range(shards):
                actor: Any = (
                    ray.remote(Outpost)
                    .options(
                        num_cpus=self.resources["CPU"],
                        resources=others,
                        max_concurrency=_CALLS,
                        max_restarts=0,
                        scheduling_strategy=PlacementGroupSchedulingStrategy(
                            group, placement_group_bundle_index=number
                        ),
                    )
                    .remote()
                )
                actors.append(actor)
                actor.work.remote(Task(config, target, number, shards), layout, memory)
            yield _Actors(actors)
        finally:
            for actor in actors:
                ray.kill(actor)
            remove_placement_group(group)

    def _no_room(self, shards: int) -> str:
        import ray

        available = ray.available_resources()  # type: ignore[no-untyped-call]
        free = {name: available.get(name, 0.0) for name in self.resources}
        return f"the cluster has no room for {shards} shards of {self.resources}: {free} are free"


class _Actors:
    """A crew of Ray actors."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.size = len(actors)
        self.start_error_s = 0.0
        self._actors = actors
        self._hosts = [actor.where.remote() for actor in actors]
        # Who is being asked for words now: by the answer to come.
        self._asked = {self._ask(number): number for number in range(self.size)}

    def hear(self, timeout_s: float) -> list[Word]:
        import ray
        from ray.exceptions import RayError

        if not self._asked:
            return []
        said: list[Word] = []
        first, waiting = ray.wait(list(self._asked), num_returns=1, timeout=timeout_s)
        others = ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else []
        for answer in [*first, *others]:
            number = self._asked.pop(answer)
            try:
                words: list[Word] = ray.get(answer)
            except RayError as error:
                said.append(Lost(number, f"on {self._host(number)}: {_sentence(error)}"))
                continue
            said += words
            if not any(isinstance(word, ShardResult | Failure) for word in words):
                self._asked[self._ask(number)] = number
        return said

    def start(self, headroom_s: float) -> float:
        import ray

        clocks = []
        for actor in self._actors:
            pings = []
            for _ in range(_PINGS):
                before = time.monotonic()
                theirs = ray.get(actor.clock.remote())
                pings.append((before, theirs, time.monotonic()))
            clocks.append(compare_clocks(pings))
        self.start_error_s = max(clock.error_s for clock in clocks)
        start_s = time.monotonic() + headroom_s + 20 * self.start_error_s
        for actor, clock in zip(self._actors, clocks, strict=True):
            actor.tell.remote(start_s + clock.offset_s)
        return start_s

    def stop(self) -> None:
        for actor in self._actors:
            actor.tell.remote(None)

    def _ask(self, number: int) -> Any:
        return self._actors[number].words.remote(_POLL_S)

    def _host(self, number: int) -> str:
        import ray
        from ray.exceptions import RayError

        try:
            return str(ray.get(self._hosts[number], timeout=1))
        except RayError:
            return "a node that it never said the name of"


def _sentence(error: Exception) -> str:
    """What Ray says about a lost actor, on one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:"))]
    return (told or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def on_ray(address: str, resources: Mapping[str, float]) -> Iterator[RayFleet]:
    """Connect to a running Ray cluster, with the generator's code for the workers of this job.

    Args:
        address: ``auto`` or ``host:port``.
        resources: what one shard takes, ``{"CPU": 1}``; names of its own keep shards to nodes that
            have them.

    Raises:
        Unavailable: no cluster answers there.
    """
    import ray

    modules = [str(Path(str(module.__file__)).parent) for module in (datamix, edge)]
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": modules},
        )
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield RayFleet(resources)
    finally:
        ray.shutdown()
