"""`datamix serve`: an application in the foreground, on this machine or on a running cluster."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cluster.local import APPLICATION, deploy, local_cluster
from datamix.errors import ConfigError, Unavailable
from deployments.config import Config
from deployments.store import RayStore
from deployments.tokens import Tokens


def serve(
    config: Config,
    *,
    port: int,
    replicas: int = 1,
    address: str | None = None,
    name: str = APPLICATION,
    prefix: str = "/",
) -> None:
    """Deploy, say where, stay until Ctrl-C or SIGTERM, take everything down.

    Args:
        config: the application's settings.
        port: the front door's port.
        replicas: how many replicas to run.
        address: a running Ray cluster (``auto`` or ``host:port``); None for one of our own.
        name: of the application; another one beside it on a running cluster needs another name.
        prefix: the path under which it is found, likewise.

    Raises:
        ConfigError: the port is taken, the file of tokens cannot be used, or the name or prefix is
            for a running cluster and there is none.
        Unavailable: the cluster cannot be reached, or the application did not come up.
    """
    if not re.fullmatch(r"/|(/[A-Za-z0-9._-]+)+", prefix):
        raise ConfigError(f"prefix is {prefix!r}, expected / or a path like /operator-b")
    with contextlib.ExitStack() as stack:
        if address is None:
            if (name, prefix) != (APPLICATION, "/"):
                raise ConfigError(
                    "an application got a name or prefix of its own, expected --address with the "
                    "running cluster where it is to be beside another"
                )
            if config.tokens_file is not None:
                Tokens(config.tokens_file, time.monotonic)  # says what is wrong before Ray starts
            cluster = local_cluster(config, port=port, replicas=replicas, say=_say)
            running = stack.enter_context(cluster)
            url = running.url
            print(f"datamix models --address {running.address}", flush=True)
        else:
            url = stack.enter_context(_on_cluster(config, address, port, replicas, name, prefix))
        print(f"serving at {url}, Ctrl-C ends it", flush=True)
        wait_for_signal()


@contextlib.contextmanager
def _on_cluster(
    config: Config, address: str, port: int, replicas: int, name: str, prefix: str
) -> Iterator[str]:
    import ray

    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        if name in ray_serve.status().applications:
            raise ConfigError(f"application {name!r} runs on {address!r} already")
        # A table of models that an application of the same name left behind is not ours.
        RayStore(name).write(None)
        try:
            # All interfaces: on a cluster HAProxy of every node is a front door.
            yield deploy(
                config, port=port, replicas=replicas, host="0.0.0.0", name=name, prefix=prefix
            )
        finally:
            _say("deleting the application")
            ray_serve.delete(name)
    finally:
        ray.shutdown()


def wait_for_signal(ended: Callable[[], bool] | None = None) -> None:
    """Return at Ctrl-C or SIGTERM, or soon after ``ended`` says so."""
    done = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        done.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not done.wait(None if ended is None else 0.5) and not (ended and ended()):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)
