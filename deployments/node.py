"""GPUs of a node, published by one of the replicas that run there.

A replica cannot know who else is on its node, so they draw: who binds the node's name publishes.
The name goes with the process, and another one then takes over. A node without a replica publishes
nothing of this; Ray's own figures (``ray_node_gpus_utilization``) are there on every node.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from deployments import nvml
from deployments.metrics import RayBackend, Recorder, rows

PERIOD_S = 2.0  # a reading is some dozens of calls per GPU, in a thread beside the event loop

logger = logging.getLogger(__name__)


async def publish_node(*, gpus_expected: bool, period_s: float = PERIOD_S) -> None:
    """Publish through Ray's metrics agent for as long as it runs.

    Args:
        gpus_expected: whether a driver that is not there is a fault; otherwise this ends.
        period_s: time between two readings, in seconds.
    """
    import ray

    try:
        watch = nvml.Watch(nvml.load())
        # Before anybody registers a metric: on nodes without GPUs none of these shall exist.
        await asyncio.to_thread(watch.samples)
        if watch.absent and not gpus_expected:
            return
        name = await _name(f"datamix-node-{ray.get_runtime_context().get_node_id()}", period_s)
        with name:
            recorder = Recorder(RayBackend(rows("node"), of_replica=False))
            problem = ""
            while True:
                recorder.publish(await asyncio.to_thread(watch.samples))
                if watch.problem != problem and (problem := watch.problem):
                    logger.warning("the GPUs of this node were not read: %s", problem)
                await asyncio.sleep(period_s)
    except Exception:  # serving goes on without it
        logger.exception("the GPUs of this node are not published any more")


async def _name(name: str, period_s: float) -> socket.socket:
    """Wait until this process has the name, which no other on this machine has then."""
    while (held := take_name(name)) is None:
        await asyncio.sleep(period_s)
    return held


def take_name(name: str) -> socket.socket | None:
    """A name of this machine (of its network namespace) until it is closed; None: it is taken.

    An abstract Unix socket: no file is left behind, and the kernel lets go of it with its process.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0{name}")
    except OSError:
        held.close()
        return None
    return held
