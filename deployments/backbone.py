"""The replica: the models it serves, behind the endpoints, and what Ray asks of it.

A plain class: `deployments.app` wraps it into a Serve deployment late, so that Ray pickles it by
reference and tests can build one without Ray.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import secrets
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from datamix.errors import DataMixError
from deployments import logs, oip, websocket
from deployments.batcher import EngineHangs
from deployments.catalog import Catalog
from deployments.config import Config
from deployments.load import Load
from deployments.metrics import Backend, RayBackend, Traffic, TrafficRecorder
from deployments.node import publish_node
from deployments.peers import Peers, RayPeers, announce
from deployments.protocol import Protocol
from deployments.seeds import Expander
from deployments.store import RayStore, Store
from deployments.streams import Streams
from deployments.table import Table, read_table
from deployments.tokens import Tokens
from deployments.tracing import Tracing

_PUBLISH_PERIOD_S = 1.0
_FOLLOW_PERIOD_S = 2.0
_EXTENSIONS = ("datamix_arrow", "datamix_stream", "datamix_stats", "datamix_noise")

logger = logging.getLogger(__name__)


class Backbone:
    """Serves the backbones of one or more bundles. Must be built on a running event loop."""

    def __init__(
        self,
        config: Config,
        backend: Backend | None = None,
        store: Store | None = None,
        peers: Peers | None = None,
        end: Callable[[], None] | None = None,
    ) -> None:
        """Load, warm up, and start the engines' threads.

        Args:
            config: the application's settings.
            backend: where metrics go; None for Ray's metrics agent.
            store: where the table of models is kept; None for Ray's control store.
            peers: the other replicas; None for those that Serve runs.
            end: ends this process at once; None to do so.

        Raises:
            BundleError: a bundle cannot be read or trusted.
            ConfigError: the settings do not fit a bundle or this machine, or
                ``tokens_file`` cannot be read.
        """
        loop = asyncio.get_running_loop()
        websocket.install()  # Ray starts this replica's server after the constructor
        self.config = config
        self.clock = time.monotonic
        self._end = end or _end
        self.traffic = Traffic()
        self.tokens = None if config.tokens_file is None else Tokens(config.tokens_file, self.clock)
        self._backend = backend or RayBackend()
        self._store = store or RayStore(_application())
        self.catalog = Catalog(config, self._backend, loop, self.clock, self._read_table())
        self.expander = Expander(config, loop, self.clock)
        self.streams = Streams(config, self.traffic, self.tokens, self.clock)
        self.streams.start()
        self.tracing = None
        if config.trace_endpoint is not None:
            self.tracing = Tracing.to(config.trace_endpoint, config.traces_per_s)
        self._load = Load(self.clock)
        self._replica = secrets.token_hex(4)
        self._started = self.clock()
        self._tasks = [loop.create_task(self._publish()), loop.create_task(self._follow())]
        if config.rotate_streams_within_s is not None:
            peers = peers or RayPeers(self._replica)
            hello = announce(peers, config.rotate_streams_within_s)
            self._tasks.append(loop.create_task(hello))
        if backend is None:
            logs.install(config.logs)
            gpus_expected = config.device != "cpu"
            self._tasks.append(loop.create_task(publish_node(gpus_expected=gpus_expected)))
            # In a process of Ray's: a full collection would stop the event loop for 0.1 s to look
            # at the quarter of a million objects that were there before the first request.
            gc.collect()
            gc.freeze()
        self.ready = True

    def __serve_build_asgi_app__(self) -> Protocol:  # noqa: PLW3201 (the name is Ray's)
        """Give Ray Serve the ASGI application; it calls this after the constructor."""
        return Protocol(self)

    async def check_health(self) -> None:
        """Prove that batchers and engines are alive; Ray replaces the replica where this raises.

        It does so after three times in a row, and gives the replica time to drain. An engine that
        hangs has none to offer: its thread cannot be ended, and holds the device that the next
        replica needs, while streams wait for its answers. So the process ends, which Ray sees at
        once, and so do the devices.

        Raises:
            Unavailable: an engine raised, or hangs.
        """
        patience_s = self.config.health_timeout_s
        try:
            await asyncio.gather(*(model.batcher.probe(patience_s) for model in self.catalog))
        except EngineHangs as error:
            logger.critical("%s: this replica ends itself", error)
            self._end()
            raise

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray's controller what the autoscaling policy needs; every second or so."""
        return self._load.report(self.catalog)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Drain: refuse new requests, answer the waiting ones, stop the engines' threads.

        The ASGI server calls this at its shutdown (lifespan), and so does Ray when it stops the
        replica.

        Raises:
            Unavailable: requests were still waiting after ``timeout_s``.
        """
        self.ready = False
        try:
            await self.catalog.close(timeout_s)
        finally:
            self.expander.close()
            self.streams.stop()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self.tracing is not None:
                await self.tracing.close()

    async def rotate_streams(self, share: float, within_s: float, asked_by: str = "") -> int:
        """Send a share of the devices elsewhere, oldest streams first: to replicas that are new.

        Ray's ``handle.broadcast("rotate_streams", share, within_s)`` calls it on every replica. It
        returns at once; see :meth:`deployments.streams.Streams.rotate`. A replica that asks keeps
        its own streams: they have come in since HAProxy knows it.
        """
        if asked_by == self._replica:
            return 0
        return self.streams.rotate(share, within_s)

    # --- what `datamix models` asks of every replica ---

    async def inspect(self, bundle: str) -> dict[str, Any]:
        """Name, version and hashes of a bundle as this replica can read it, or the ``error``."""
        from datamix.bundle import read_manifest

        try:
            manifest = await asyncio.to_thread(read_manifest, bundle)
        except DataMixError as error:
            return {"replica": self._replica, "error": str(error)}
        return {
            "replica": self._replica,
            "name": manifest.name,
            "version": manifest.version,
            "hashes": dict(manifest.hashes),
        }

    async def models(self, follow: bool = False) -> dict[str, Any]:
        """What this replica serves; with ``follow``, after it has caught up with the table."""
        if follow:
            await self._catch_up()
        return {
            "replica": self._replica,
            "table": self.catalog.table.model_dump_json(),
            "models": self.catalog.status(),
        }

    def _read_table(self) -> Table | None:
        """The table in the store, if it is one for this configuration."""
        body = self._store.read()
        if body is None:
            return None
        table = read_table(body)
        return table if table.configured == self.config.bundles else None

    async def _catch_up(self) -> None:
        table = await asyncio.to_thread(self._read_table)
        if table is not None:
            await self.catalog.follow(table)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_PERIOD_S)
            try:
                await self._catch_up()
            except Exception as error:
                # What is served is served on, and the next look may find the store well again: a
                # replica that stopped to look would fall behind the others for good.
                logger.error("the table of models was not followed: %r", error)

    # --- what it tells about itself ---

    def server_metadata(self) -> dict[str, Any]:
        """`GET /v2` of the Open Inference Protocol."""
        return {
            "name": "datamix",
            "version": _version(),
            "extensions": [*oip.EXTENSIONS, *_EXTENSIONS],
            "operator": self.config.operator,
            "release": self.config.release,
        }

    def stats(self) -> dict[str, Any]:
        """`GET /v2/stats`: running totals of this replica, durations in seconds.

        The engines' busy time is summed over all models; figures of each stand in ``models``.
        """
        usage = resource.getrusage(resource.RUSAGE_SELF)
        models = [model.stats() for model in self.catalog]
        first = self.catalog.current[0]
        sums = {
            key: sum(model[key] for model in models)
            for key in ("engine_busy_s", "batches", "rows", "queue_s", "queue_rows")
        }
        counts = {
            key: dict(sum((Counter(model[key]) for model in models), Counter()))
            for key in ("requests", "close_reasons")
        }
        return {
            "replica": self._replica,
            "pid": os.getpid(),
            "model": first.name,
            "version": first.version,
            "engine": first.engine.name,
            "uptime_s": self.clock() - self._started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            **sums,
            "batch_rows_mean": sums["rows"] / max(1, sums["batches"]),
            **counts,
            "requests": dict(Counter(counts["requests"]) + self.traffic.astray),
            "open_streams": self.traffic.open_streams,
            "streams_closed": dict(self.traffic.streams_closed),
            "received_bytes": self.traffic.received_bytes,
            "sent_bytes": self.traffic.sent_bytes,
            "copied_bytes": {
                "receive": self.traffic.received_bytes,
                "batch": sum(model["copied_bytes"] for model in models),
                "send": self.traffic.sent_bytes,
            },
            "models": models,
        }

    async def _publish(self) -> None:
        config = self.config
        recorder = TrafficRecorder(self._backend, config.price_per_hour, config.power_watts)
        while True:
            await asyncio.sleep(_PUBLISH_PERIOD_S)
            try:
                recorder.publish(self.traffic)
                recorder.costs(self.clock() - self._started)
                recorder.versions(self.catalog.status())
                for model in self.catalog:
                    model.publish()
                self._backend.flush()
            except Exception:
                # Metrics that cannot be published now may be again, and serving goes on meanwhile.
                logger.exception("metrics were not published")


def _end() -> None:
    """End this process, whatever its threads are in."""
    logging.shutdown()
    os._exit(1)


def _application() -> str:
    from ray import serve

    name: str = serve.get_replica_context().app_name
    return name


def _version() -> str:
    try:
        return installed_version("datamix-cluster")
    except PackageNotFoundError:  # shipped to the node as a folder, by Ray's working_dir
        return "unknown"
