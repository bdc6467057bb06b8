"""One version of one model as a replica serves it: its engine, its batcher and what it counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from datamix import wire
from datamix.errors import ConfigError, NotFound, TooLarge, WireError
from deployments.batcher import Batcher
from deployments.canaries import batch_s, check_canaries, check_speed
from deployments.config import Config
from deployments.cores import let_threads_sleep
from deployments.engine import Block, Engine, Rows, parse_engine
from deployments.engines import echo_engine, torch_engine
from deployments.metrics import Backend, ModelRecorder
from deployments.seeds import expanded_bytes
from deployments.table import Entry


class Loaded(NamedTuple):
    """A model that is in memory and warm, not served yet."""

    entry: Entry
    engine: Engine


class ServedModel:
    """A model version with an engine and a batcher of its own."""

    def __init__(
        self,
        loaded: Loaded,
        config: Config,
        backend: Backend,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        """Start the engine's thread; answers come on ``loop``."""
        self.entry, self.engine = loaded
        self.name = self.entry.name
        self.version = self.entry.version
        self.outcomes: Counter[str] = Counter()  # requests answered: ok, or the HTTP status
        self.offered_requests = 0  # well-formed ones, refused for lack of room or time or not
        self.offered_rows = [0] * len(self.engine.blocks)
        self._config = config
        self._recorder = ModelRecorder(backend, self.name, self.version)
        self.batcher = Batcher(
            self.engine,
            loop,
            max_batch_rows=config.max_batch_rows,
            max_queue_rows=config.max_queue_rows,
            max_queue_bytes=config.max_queue_bytes,
            target_batch_s=config.target_batch_s,
            on_batch=self._recorder.batch,
            clock=clock,
        )

    def check(self, request: wire.Request) -> None:
        """Refuse a request that no block here can run.

        Raises:
            NotFound: there is no such block.
            WireError: its rows have the wrong shape, or are noise and the block is not linear.
            TooLarge: it has more rows than one batch, or more bytes of noise than a message may.
        """
        blocks = self.engine.blocks
        if request.block >= len(blocks):
            raise NotFound(f"block is {request.block}, expected 0 to {len(blocks) - 1}")
        shape, expected = request.features.shape, blocks[request.block].input_shape
        if request.noise:
            self._check_noise(request, blocks[request.block])
        elif shape[1:] != expected:
            raise WireError(
                f"rows have shape {shape[1:]}, expected {expected} for block {request.block}"
            )
        if shape[0] > self._config.max_batch_rows:
            raise TooLarge(
                f"request has {shape[0]} rows, expected at most {self._config.max_batch_rows}"
            )

    def _check_noise(self, request: wire.Request, block: Block) -> None:
        if not block.linear:
            raise WireError(
                f"block {request.block} of {self.name!r} is not linear, expected a linear one for"
                " noise, which could not be taken off its output"
            )
        size_bytes = expanded_bytes(request.rows, block.input_shape)
        if size_bytes > self._config.max_request_bytes:
            raise TooLarge(
                f"the noise has {size_bytes} bytes, expected at most "
                f"{self._config.max_request_bytes}"
            )

    def metadata(self, versions: list[str]) -> dict[str, Any]:
        """`GET /v2/models/{model}`; block shapes and limits stand in ``parameters``."""
        blocks = self.engine.blocks
        return {
            "name": self.name,
            "versions": versions,
            "platform": "datamix",
            "inputs": [_tensor("features", blocks[0].input_shape)],
            "outputs": [_tensor("features", blocks[0].output_shape)],
            "parameters": {
                "version": self.version,
                "engine": self.engine.name,
                "blocks": [
                    {"input_shape": list(b.input_shape), "output_shape": list(b.output_shape)}
                    for b in blocks
                ],
                "max_request_rows": self._config.max_request_rows,
                "max_request_bytes": self._config.max_request_bytes,
                "max_batch_rows": self._config.max_batch_rows,
            },
        }

    def stats(self) -> dict[str, Any]:
        """Running totals, durations in seconds."""
        statistics = self.batcher.statistics
        return {
            "model": self.name,
            "version": self.version,
            "engine": self.engine.name,
            "engine_busy_s": self.batcher.busy_s,
            "batches": statistics.batches,
            "rows": statistics.rows,
            "batch_rows_mean": statistics.rows / max(1, statistics.batches),
            "queue_s": statistics.queue_s,
            "queue_rows": self.batcher.queue_rows,
            "copied_bytes": statistics.copied_bytes,
            "requests": dict(self.outcomes),
            "close_reasons": dict(statistics.close_reasons),
        }

    async def batch_s(self) -> float:
        """Seconds that full batches take, one for every block, before all waiting requests.

        Raises:
            Unavailable: the engine does not compute them.
        """
        rows, patience_s = self._config.max_batch_rows, self._config.health_timeout_s
        blocks = range(len(self.engine.blocks))
        return sum([await self.batcher.probe(patience_s, block=b, rows=rows) for b in blocks])

    def publish(self) -> None:
        """Publish the running totals as metrics."""
        batcher = self.batcher
        self._recorder.publish(
            batcher.statistics,
            self.outcomes,
            busy_s=batcher.busy_s,
            queue_rows=batcher.queue_rows,
            predicted_wait_s=batcher.predicted_wait_s(),
            limit_rows=self._config.max_batch_rows,
        )

    async def close(self, timeout_s: float) -> None:
        """Refuse new requests, answer the waiting ones, stop the engine's thread.

        Raises:
            Unavailable: requests were still waiting after ``timeout_s``.
        """
        try:
            await self.batcher.drain(timeout_s)
        finally:
            self.publish()


def load(config: Config, bundle: str | None) -> Loaded:
    """Load a model, warm it up and try its canaries; takes seconds and blocks the calling thread.

    Args:
        config: the application's settings.
        bundle: folder or URI of the bundle; None for the echo model of a load test.

    Raises:
        BundleError: the bundle cannot be read or trusted, or the engine fails its canaries.
        ConfigError: the settings do not fit the bundle or this machine, or it is too slow.
    """
    loaded = build_engine(config, bundle)
    warm_up(loaded.engine, config.max_batch_rows)
    if bundle is not None and parse_engine(config.engine).kind == "torch":
        check_canaries(loaded.engine, bundle)
    if config.canary_batch_s is not None:
        check_speed(batch_s(loaded.engine, config.max_batch_rows), config.canary_batch_s)
    return loaded


def build_engine(config: Config, bundle: str | None) -> Loaded:
    """The model's engine, cold (an operator's was tried with noise); see :func:`load`."""
    let_threads_sleep()  # before anything loads torch
    text = parse_engine(config.engine)
    if bundle is None:
        assert config.echo_shape is not None  # Config holds this
        echo = Entry(name="echo", version="1", bundle=None)
        shapes = [config.echo_shape]
        return Loaded(echo, echo_engine(text, shapes, config.max_batch_rows, bundle=False))
    from datamix.bundle import load_backbone, read_manifest

    if text.kind != "torch":
        manifest = read_manifest(bundle)
        shapes = [block.input_shape for block in manifest.blocks]
        engine = echo_engine(text, shapes, config.max_batch_rows)
    else:
        from datamix.models import is_linear

        manifest, modules = load_backbone(bundle)
        # Before the engine makes them over.
        blocks = [
            Block(shapes.input_shape, shapes.output_shape, is_linear(block, shapes.input_shape))
            for shapes, block in zip(manifest.blocks, modules, strict=True)
        ]
        engine = torch_engine(modules, blocks, config)
        if config.operator and manifest.split is not None:
            from deployments.cancelling import check_cancelling

            check_cancelling(engine, modules, manifest.split, name=manifest.name)
    return Loaded(Entry(name=manifest.name, version=manifest.version, bundle=bundle), engine)


def warm_up(engine: Engine, max_batch_rows: int) -> None:
    """Run every block at one row and at full size, so that the first request pays nothing.

    Raises:
        ConfigError: a block does not give the shape that the manifest declares.
    """
    for index, block in enumerate(engine.blocks):
        for rows in (1, max_batch_rows):
            zeros = np.zeros((rows, *block.input_shape), np.float32)
            (output,) = engine.run(index, [Rows(zeros, None)])
            if output.shape != (rows, *block.output_shape):
                raise ConfigError(
                    f"block {index} gives shape {output.shape[1:]}, expected "
                    f"{block.output_shape} by the manifest"
                )


def _tensor(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [-1, *shape]}
