"""The replica: one model version, its engine and its batcher, behind the endpoints.

A plain class: `deployments.app` wraps it into a Serve deployment late, so that Ray pickles it by
reference and tests can build one without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import time
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np

from datamix import wire
from datamix.errors import ConfigError, NotFound, TooLarge, WireError
from deployments import oip, websocket
from deployments.batcher import Batcher
from deployments.config import Config
from deployments.engine import Block, EchoEngine, Engine, Rows, TorchEngine, parse_engine
from deployments.metrics import Backend, RayBackend, Recorder, Traffic
from deployments.protocol import Protocol
from deployments.streams import Streams
from deployments.tokens import Tokens

_PUBLISH_PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class Backbone:
    """Serves the backbone of one bundle. Must be built on a running event loop."""

    def __init__(self, config: Config, backend: Backend | None = None) -> None:
        """Load, warm up, and start the engine's thread.

        Args:
            config: the application's settings.
            backend: where metrics go; None for Ray's metrics agent.

        Raises:
            BundleError: the bundle cannot be read or trusted.
            ConfigError: the settings do not fit the bundle or this machine, or ``tokens_file``
                cannot be read.
        """
        loop = asyncio.get_running_loop()
        websocket.install()  # Ray starts this replica's server after the constructor
        self.config = config
        self.clock = time.monotonic
        self.traffic = Traffic()
        self.tokens = None if config.tokens_file is None else Tokens(config.tokens_file, self.clock)
        self.model, self.version, self.engine = build_engine(config)
        self._warm_up()
        self._recorder = Recorder(backend or RayBackend(), self.model)
        self.batcher = Batcher(
            self.engine,
            loop,
            max_batch_rows=config.max_batch_rows,
            max_queue_rows=config.max_queue_rows,
            target_batch_s=config.target_batch_s,
            on_batch=self._recorder.batch,
            clock=self.clock,
        )
        self.streams = Streams(config, self.traffic, self.tokens, self.clock)
        self.streams.start()
        self._replica = secrets.token_hex(4)
        self._started = self.clock()
        self._publisher = loop.create_task(self._publish())
        self.ready = True

    def __serve_build_asgi_app__(self) -> Protocol:  # noqa: PLW3201 (the name is Ray's)
        """Give Ray Serve the ASGI application; it calls this after the constructor."""
        return Protocol(self)

    async def check_health(self) -> None:
        """Prove that batcher and engine are alive; Ray replaces the replica where this raises."""
        await self.batcher.probe(self.config.health_timeout_s)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Drain: refuse new requests, answer the waiting ones, stop the engine's thread.

        The ASGI server calls this at its shutdown (lifespan), and so does Ray when it stops the
        replica.

        Raises:
            Unavailable: requests were still waiting after ``timeout_s``.
        """
        self.ready = False
        try:
            await self.batcher.drain(timeout_s)
        finally:
            self.streams.stop()
            self._publisher.cancel()
            await asyncio.gather(self._publisher, return_exceptions=True)

    async def rotate_streams(self, share: float, within_s: float) -> int:
        """Send a share of the devices elsewhere, oldest streams first: to replicas that are new.

        Ray's ``handle.broadcast("rotate_streams", share, within_s)`` calls it on every replica. It
        returns at once; see :meth:`deployments.streams.Streams.rotate`.
        """
        return self.streams.rotate(share, within_s)

    def check_model(self, model: str, version: str | None) -> None:
        """Refuse a model or version that is not served here.

        Raises:
            NotFound: with what is served.
        """
        if model != self.model:
            raise NotFound(f"model is {model[:64]!r}, expected {self.model!r}")
        if version is not None and version != self.version:
            raise NotFound(f"version of {model!r} is {version[:64]!r}, expected {self.version!r}")

    def check_request(self, request: wire.Request) -> None:
        """Refuse a request that no block here can run.

        Raises:
            NotFound: its model, version or block is not served here.
            WireError: its rows have the wrong shape.
            TooLarge: it has more rows than one batch.
        """
        if request.model is not None:
            self.check_model(request.model, request.model_version)
        elif request.model_version is not None:
            self.check_model(self.model, request.model_version)
        blocks = self.engine.blocks
        if request.block >= len(blocks):
            raise NotFound(f"block is {request.block}, expected 0 to {len(blocks) - 1}")
        expected = blocks[request.block].input_shape
        if request.features.shape[1:] != expected:
            raise WireError(
                f"rows have shape {request.features.shape[1:]}, expected {expected} for block "
                f"{request.block}"
            )
        if request.rows > self.config.max_batch_rows:
            raise TooLarge(
                f"request has {request.rows} rows, expected at most {self.config.max_batch_rows}"
            )

    def server_metadata(self) -> dict[str, Any]:
        """`GET /v2` of the Open Inference Protocol."""
        return {
            "name": "datamix",
            "version": _version(),
            "extensions": [*oip.EXTENSIONS, "datamix_arrow", "datamix_stream", "datamix_stats"],
        }

    def model_metadata(self) -> dict[str, Any]:
        """`GET /v2/models/{model}`; block shapes and limits stand in ``parameters``."""
        blocks = self.engine.blocks
        return {
            "name": self.model,
            "versions": [self.version],
            "platform": "datamix",
            "inputs": [_tensor("features", blocks[0].input_shape)],
            "outputs": [_tensor("features", blocks[0].output_shape)],
            "parameters": {
                "engine": self.engine.name,
                "blocks": [
                    {"input_shape": list(b.input_shape), "output_shape": list(b.output_shape)}
                    for b in blocks
                ],
                "max_request_rows": self.config.max_request_rows,
                "max_request_bytes": self.config.max_request_bytes,
                "max_batch_rows": self.config.max_batch_rows,
            },
        }

    def stats(self) -> dict[str, Any]:
        """`GET /v2/stats`: running totals of this replica, durations in seconds."""
        statistics = self.batcher.statistics
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "replica": self._replica,
            "pid": os.getpid(),
            "model": self.model,
            "version": self.version,
            "engine": self.engine.name,
            "uptime_s": self.clock() - self._started,
            "engine_busy_s": self.batcher.busy_s,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "batches": statistics.batches,
            "rows": statistics.rows,
            "batch_rows_mean": statistics.rows / max(1, statistics.batches),
            "queue_s": statistics.queue_s,
            "queue_rows": self.batcher.queue_rows,
            "requests": dict(self.traffic.requests),
            "close_reasons": dict(statistics.close_reasons),
            "open_streams": self.traffic.open_streams,
            "streams_closed": dict(self.traffic.streams_closed),
            "received_bytes": self.traffic.received_bytes,
            "sent_bytes": self.traffic.sent_bytes,
        }

    async def _publish(self) -> None:
        while True:
            await asyncio.sleep(_PUBLISH_PERIOD_S)
            try:
                self._recorder.publish(
                    self.batcher.statistics, self.traffic, self.batcher.queue_rows
                )
            except Exception:
                # Metrics that cannot be published now may be again, and serving goes on meanwhile.
                logger.exception("metrics were not published")

    def _warm_up(self) -> None:
        """Run every block at one row and at full size, so that the first request pays nothing."""
        for index, block in enumerate(self.engine.blocks):
            for rows in (1, self.config.max_batch_rows):
                zeros = np.zeros((rows, *block.input_shape), np.float32)
                (output,) = self.engine.run(index, [Rows(zeros, None)])
                if output.shape != (rows, *block.output_shape):
                    raise ConfigError(
                        f"block {index} gives shape {output.shape[1:]}, expected "
                        f"{block.output_shape} by the manifest"
                    )


def build_engine(config: Config) -> tuple[str, str, Engine]:
    """Model name, version and engine for ``config``.

    Raises:
        BundleError: the bundle cannot be read or trusted.
        ConfigError: the device or dtype cannot be had.
    """
    kind, a_s, b_s = parse_engine(config.engine)
    if config.bundle is None:
        assert config.echo_shape is not None  # Config holds this
        return "echo", "1", EchoEngine([config.echo_shape], a_s, b_s)
    from datamix.bundle import load_backbone, read_manifest

    if kind != "torch":
        manifest = read_manifest(config.bundle)
        shapes = [block.input_shape for block in manifest.blocks]
        return manifest.name, manifest.version, EchoEngine(shapes, a_s, b_s)
    manifest, modules = load_backbone(config.bundle)
    blocks = [Block(block.input_shape, block.output_shape) for block in manifest.blocks]
    engine = TorchEngine(
        modules,
        blocks,
        max_batch_rows=config.max_batch_rows,
        device=config.device,
        dtype=config.dtype,
        channels_last=config.channels_last,
        threads=config.threads,
    )
    return manifest.name, manifest.version, engine


def _version() -> str:
    try:
        return installed_version("datamix-cluster")
    except PackageNotFoundError:  # shipped to the node as a folder, by Ray's working_dir
        return "unknown"


def _tensor(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [-1, *shape]}
