"""The replica: what it loads, refuses and reports, and whether it knows that it is ill."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from datamix import wire
from datamix.bundle import (
    BACKBONE,
    ArchitectureSpec,
    ImagePreprocessing,
    load_backbone,
    save_bundle,
)
from datamix.errors import BundleError, ConfigError, NotFound, TooLarge, Unavailable, WireError
from datamix.models import Architecture, build
from deployments import backbone as module
from deployments import model as models
from deployments.backbone import Backbone
from deployments.config import Config
from deployments.emulated import Cost, EmulatedEngine
from deployments.engine import Block, EchoEngine, Rows
from deployments.metrics import TABLE, Metric, PrometheusBackend, rows
from deployments.model import Loaded, build_engine
from deployments.peers import NoPeers
from deployments.store import MemoryStore
from deployments.table import Entry
from deployments.waiting import Job
from tests.real_cloud import (
    PATIENCE_S,
    SHAPE,
    Cloud,
    answer,
    ask,
    assert_echoes,
    http,
    message_of,
    replica,
    rows_of,
    serving,
)

CONFIG = Config(engine="null", echo_shape=SHAPE, max_batch_rows=16, max_request_rows=8)
ECHO = Entry(name="echo", version="1", bundle=None)
OPTIONS: dict[str, int | str] = {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16}


def run(test: Callable[[Cloud], Awaitable[None]], config: Config = CONFIG) -> None:
    async def go() -> None:
        async with replica(config) as cloud:
            await test(cloud)

    asyncio.run(go())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundles") / "small"
    save_bundle(
        path,
        build(Architecture("convnet", OPTIONS)).eval(),
        name="small",
        version="7",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name="convnet", options=OPTIONS),
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=(1, 28, 28), mean=(0.25,), std=(0.5,)
        ),
        class_names=tuple("abcdefghij"),
        tolerance=0.01,
        metrics={},
    )
    return path


@pytest.fixture
def cloud_only(bundle: Path, tmp_path: Path) -> Path:
    """The bundle as a cloud should get it: without the device's half."""
    path = tmp_path / "small"
    shutil.copytree(bundle, path, ignore=shutil.ignore_patterns("device.safetensors"))
    assert (path / BACKBONE).exists()
    return path


# --- what it loads ------------------------------------------------------------------------------


def test_a_bundle_is_served_from_the_backbones_half(cloud_only: Path) -> None:
    config = Config(bundle=str(cloud_only), threads=torch.get_num_threads())
    manifest, modules = load_backbone(cloud_only)

    async def go() -> None:
        async with serving(config) as cloud, cloud.stream("/v2/models/small/stream") as stream:
            assert (cloud.model.name, cloud.model.version) == ("small", "7")
            for index, block in enumerate(manifest.blocks):
                rows = rows_of(index, 3, block.input_shape).astype(np.float32)
                message = wire.encode_request(
                    rows, request_id="a", dtype="float32", block=index, model_version="7"
                )
                response = await ask(stream, message)
                assert (response.status, response.block) == (200, index)
                assert (response.model, response.model_version) == ("small", "7")
                with torch.inference_mode():
                    expected = modules[index](torch.from_numpy(rows)).numpy()
                np.testing.assert_allclose(response.features, expected, rtol=1e-5, atol=1e-5)
            async with http(cloud) as peer:
                parameters = (await peer.get("/v2/models/small")).json()["parameters"]
            assert parameters["engine"] == "torch:cpu:float32"
            assert parameters["blocks"] == [
                {"input_shape": list(b.input_shape), "output_shape": list(b.output_shape)}
                for b in manifest.blocks
            ]

    asyncio.run(go())


def test_a_null_engine_takes_its_shapes_from_the_bundle(cloud_only: Path) -> None:
    manifest, _ = load_backbone(cloud_only)
    path = str(cloud_only)
    entry, engine = build_engine(Config(bundle=path, engine="null"), path)
    assert entry == Entry(name="small", version="7", bundle=path)
    assert engine.name == "null"
    assert [b.input_shape for b in engine.blocks] == [b.input_shape for b in manifest.blocks]


def test_an_emulated_engine() -> None:
    config = CONFIG.model_copy(update={"engine": "emulated:0.5,0.001"})
    entry, engine = build_engine(config, None)
    assert entry == Entry(name="echo", version="1", bundle=None)
    assert isinstance(engine, EmulatedEngine)
    assert engine.costs == [Cost(0.5, 0.001)]


def test_a_bundle_that_was_tampered_with(cloud_only: Path) -> None:
    weights = bytearray((cloud_only / BACKBONE).read_bytes())
    weights[-1] ^= 1
    (cloud_only / BACKBONE).write_bytes(weights)

    async def go() -> None:
        Backbone(
            Config(bundle=str(cloud_only)), PrometheusBackend(CollectorRegistry()), MemoryStore()
        )

    with pytest.raises(BundleError):
        asyncio.run(go())


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        build_engine(Config(bundle="x"), str(tmp_path / "nothing"))


def test_a_device_that_is_not_there(cloud_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="^engine device is 'cuda', but torch finds 0 CUDA"):
        build_engine(Config(bundle="x", device="cuda"), str(cloud_only))


def test_every_block_is_warmed_up_at_one_row_and_at_full_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = EchoEngine([(2, 3, 3), (4, 1, 1)])
    warmed: list[tuple[int, tuple[int, ...]]] = []
    plain = engine.run

    def spy(block: int, requests: Any) -> Any:
        warmed.extend((block, request.features.shape) for request in requests)
        return plain(block, requests)

    monkeypatch.setattr(engine, "run", spy)
    monkeypatch.setattr(models, "build_engine", lambda config, bundle: Loaded(ECHO, engine))

    async def test(cloud: Cloud) -> None:
        assert warmed == [
            (0, (1, 2, 3, 3)),
            (0, (16, 2, 3, 3)),
            (1, (1, 4, 1, 1)),
            (1, (16, 4, 1, 1)),
        ]

    run(test)


def test_a_backbone_that_is_not_what_its_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EchoEngine([(2, 3, 3)])
    engine.blocks = [Block((2, 3, 3), (5, 3, 3))]
    monkeypatch.setattr(models, "build_engine", lambda config, bundle: Loaded(ECHO, engine))

    async def go() -> None:
        Backbone(CONFIG, PrometheusBackend(CollectorRegistry()), MemoryStore(), NoPeers())

    with pytest.raises(ConfigError) as raised:
        asyncio.run(go())
    assert str(raised.value) == (
        "block 0 gives shape (2, 3, 3), expected (5, 3, 3) by the manifest"
    )


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "block", "error", "sentence"),
    [
        (rows_of(0), 1, NotFound, "block is 1, expected 0 to 0"),
        (rows_of(0, 2, (3, 3, 2)), 0, WireError, r"rows have shape \(3, 3, 2\), expected \(2, 3"),
        (rows_of(0, 17), 0, TooLarge, "request has 17 rows, expected at most 16"),
    ],
)
def test_requests_that_no_block_can_run(
    features: Any, block: int, error: type[Exception], sentence: str
) -> None:
    request = wire.Request(features=features, scale=None, request_id="a", block=block)

    async def test(cloud: Cloud) -> None:
        with pytest.raises(error, match=f"^{sentence}"):
            cloud.model.check(request)
        cloud.model.check(wire.Request(rows_of(0, 16), None, "a"))

    run(test)


@pytest.mark.parametrize(
    ("path", "fields", "sentence"),
    [
        ("echo", {"model": "other"}, "model of the message is 'other', expected 'echo'"),
        ("echo", {"model": "echo", "model_version": "9"}, "version of 'echo' is '9', expected '1'"),
        ("echo", {"model_version": "9"}, "version of 'echo' is '9', expected '1'"),
        (
            "echo/versions/1",
            {"model_version": "9"},
            "version of the message is '9', expected '1'",
        ),
        ("echo", {}, None),
        ("echo", {"model": "echo"}, None),
        ("echo", {"model": "echo", "model_version": "1"}, None),
        ("echo/versions/1", {"model_version": "1"}, None),
        ("echo/versions/1", {}, None),
    ],
)
def test_path_and_message_name_the_model_together(
    path: str, fields: dict[str, Any], sentence: str | None
) -> None:
    async def go() -> None:
        async with serving(CONFIG) as cloud, http(cloud) as peer:
            message = message_of(0, **fields)
            unary = await peer.post(message, path=f"/v2/models/{path}/infer")
            async with cloud.stream(f"/v2/models/{path}/stream") as stream:
                streamed = await ask(stream, message)
        if sentence is None:
            assert unary.status == 200
            assert_echoes(streamed, 0)
        else:
            assert (unary.status, unary.error) == (404, sentence)
            assert (streamed.status, streamed.error) == (404, sentence)

    asyncio.run(go())


# --- health -------------------------------------------------------------------------------------


def offer(cloud: Cloud, seed: int) -> asyncio.Future[Any]:
    """A request straight into the batcher."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    cloud.model.batcher.offer(Job(0, Rows(rows_of(seed), None), answer.set_result))
    return answer


def test_the_health_check_passes_idle_and_busy() -> None:
    async def test(cloud: Cloud) -> None:
        await cloud.backbone.check_health()
        answers = [offer(cloud, seed) for seed in range(50)]
        await cloud.backbone.check_health()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*answers)

    run(test)


def test_the_health_check_fails_when_the_engine_hangs() -> None:
    async def test(cloud: Cloud) -> None:
        cloud.gate.close()
        answer = offer(cloud, 0)
        with pytest.raises(Unavailable, match="^the engine gave no sign of life in 0.05 s$"):
            await cloud.backbone.check_health()
        assert cloud.ends == ["end"]  # nothing else would free what the engine holds
        cloud.gate.open()
        await answer
        await cloud.backbone.check_health()

    run(test, CONFIG.model_copy(update={"health_timeout_s": 0.05}))


def test_the_health_check_fails_when_the_engine_does() -> None:
    async def test(cloud: Cloud) -> None:
        cloud.gate.fails_on = 0.0  # what the probe is made of
        with pytest.raises(Unavailable, match="^the engine failed its health probe: RuntimeError$"):
            await cloud.backbone.check_health()
        cloud.gate.fails_on = None
        await cloud.backbone.check_health()
        assert not cloud.ends  # it may be well again: Serve decides

    run(test)


# --- what it reports ----------------------------------------------------------------------------


def risen(cloud: Cloud, metrics: Sequence[Metric], before: Mapping[str, float]) -> bool:
    """Whether each of ``metrics`` stands higher than ``before``."""
    now = totals(cloud)
    return all(now[metric.name] > before.get(metric.name, 0.0) for metric in metrics)


def totals(cloud: Cloud) -> dict[str, float]:
    """Every metric of the table as it would be scraped, summed over labels; histograms by sum."""
    values = dict.fromkeys((metric.name for metric in TABLE), 0.0)
    for family in cloud.registry.collect():
        for sample in family.samples:
            name = sample.name.removesuffix("_sum")
            if name in values:
                values[name] += sample.value
    return values


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


# What takes a model that is warm, an overload, a device or a price: tests/test_monitored.py.
ELSEWHERE = {
    "datamix_batch_error_seconds",
    "datamix_batch_limit_rows",
    "datamix_copy_seconds_total",
    "datamix_expired_rows_total",
    "datamix_predicted_wait_seconds",
    "datamix_replica_cost_total",
    "datamix_replica_energy_joules_total",
    "datamix_served_versions",
    "datamix_shed_rows_total",
}


def test_what_one_request_moves_in_the_table_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PUBLISH_PERIOD_S", 0.001)
    here = [metric for metric in rows("replica", "model") if metric.name not in ELSEWHERE]
    gauges = [metric for metric in here if metric.kind == "gauge"]
    others = [metric for metric in here if metric.kind != "gauge"]
    assert gauges
    assert others

    async def go() -> None:
        async with serving(CONFIG) as cloud:
            before = totals(cloud)
            async with cloud.stream():
                pass
            async with cloud.stream() as stream:
                cloud.gate.close()
                await stream.send(message_of(0))
                await cloud.gate.batch()
                await stream.send(message_of(1))
                await until(lambda: risen(cloud, gauges, before))
                cloud.gate.open()
                for seed in (0, 1):
                    assert_echoes(await answer(stream), seed)
                await until(lambda: risen(cloud, others, before))
            # Nothing waits and nobody is connected: the gauges go back to where they were.
            await until(lambda: all(totals(cloud)[m.name] == before[m.name] for m in gauges))

    asyncio.run(go())


def test_outcomes_are_counted_as_they_were_answered() -> None:
    async def go() -> None:
        async with serving(CONFIG) as cloud, http(cloud) as peer, cloud.stream() as stream:
            assert (await peer.post(message_of(0))).status == 200
            assert (await peer.post(b"no message")).status == 400
            assert (await peer.post(message_of(1), media="text/plain")).status == 415
            assert (await peer.post(message_of(1), path="/v2/models/other/infer")).status == 404
            assert (await peer.get("/v2/models/other")).status == 404  # no inference: not counted
            assert_echoes(await ask(stream, message_of(2)), 2)
            assert (await ask(stream, message_of(3, deadline_s=0))).status == 408
            assert (await ask(stream, message_of(4, rows=9))).status == 413
            assert cloud.outcomes == {
                "ok": 2,
                "400": 1,
                "404": 1,
                "408": 1,
                "413": 1,
                "415": 1,
            }

    asyncio.run(go())


def test_statistics_tell_what_happened() -> None:
    config = CONFIG.model_copy(update={"engine": "emulated:0.01,0.001"})

    async def go() -> None:
        async with serving(config) as cloud, http(cloud) as peer, cloud.stream() as stream:
            idle = (await peer.get("/v2/stats")).json()
            assert (idle["batches"], idle["rows"], idle["batch_rows_mean"]) == (0, 0, 0)
            assert idle["queue_rows"] == idle["engine_busy_s"] == idle["received_bytes"] == 0
            sizes = [len(message_of(0)), len(message_of(1, 4))]
            received = await ask(stream, message_of(0))
            second = await ask(stream, message_of(1, 4))
            assert (await ask(stream, b"no message")).status == 400
            cloud.gate.close()
            await stream.send(message_of(2))
            await cloud.gate.batch()
            await stream.send(message_of(3, 3))
            await cloud.until_queued(1)
            busy = (await peer.get("/v2/stats")).json()
            cloud.gate.open()
            for _ in range(2):
                await answer(stream)

        assert busy.keys() == idle.keys()
        for key in ("replica", "pid", "model", "version", "engine"):
            assert busy[key] == idle[key]
        assert (busy["model"], busy["version"]) == ("echo", "1")
        assert busy["engine"] == "emulated:0.01,0.001"
        assert (busy["batches"], busy["rows"], busy["batch_rows_mean"]) == (2, 6, 3)
        assert busy["close_reasons"] == {"engine_free": 2}
        assert busy["requests"] == {"ok": 2, "400": 1}
        assert (busy["queue_rows"], busy["open_streams"]) == (3, 1)
        assert busy["received_bytes"] >= sum(sizes)
        assert busy["sent_bytes"] > 0
        assert busy["engine_busy_s"] >= received.compute_s + second.compute_s - 1e-5
        assert busy["engine_busy_s"] >= 2 * 0.01 + 6 * 0.001
        assert 0 < busy["queue_s"] < busy["uptime_s"]
        assert busy["uptime_s"] > idle["uptime_s"] > 0
        assert busy["cpu_s"] > idle["cpu_s"] > 0

    asyncio.run(go())


# --- the end ------------------------------------------------------------------------------------


def test_closing_twice_does_no_harm() -> None:
    async def test(cloud: Cloud) -> None:
        await cloud.backbone.close()
        await cloud.backbone.close()
        assert not cloud.backbone.ready
        with pytest.raises(Unavailable, match="draining"):
            offer(cloud, 0)

    run(test)


def test_closing_gives_up_on_an_engine_that_hangs() -> None:
    async def test(cloud: Cloud) -> None:
        cloud.gate.close()
        answer = offer(cloud, 0)
        await cloud.gate.batch()
        with pytest.raises(Unavailable, match="^the queue did not drain in 0.01 s$"):
            await cloud.backbone.close(0.01)
        cloud.gate.open()
        await answer

    run(test)


def test_nothing_stays_behind(caplog: pytest.LogCaptureFixture) -> None:
    """No thread, no task and, once the collector ran, no coroutine that nobody awaited."""
    caplog.set_level(logging.INFO)

    async def test(cloud: Cloud) -> None:
        await offer(cloud, 0)

    async def go() -> None:
        async with replica(CONFIG) as cloud:
            await test(cloud)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())
    gc.collect()  # a warning here is an error by pytest's settings
    assert "engine" not in [thread.name for thread in threading.enumerate()]
    assert caplog.get_records("call") == []
