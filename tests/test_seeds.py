"""Operator B: what it answers to seeds of noise, refuses, and remembers of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from datamix import wire
from datamix.bundle import ArchitectureSpec, ImagePreprocessing, load_backbone, save_bundle
from datamix.errors import Conflict, Overloaded, Unavailable
from datamix.framing import Array
from datamix.models import Architecture, build
from datamix.noise import expand_rows
from deployments import seeds as module
from deployments.config import Config
from deployments.seeds import Seeds
from tests.real_cloud import (
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

CONFIG = Config(
    engine="null", echo_shape=SHAPE, max_batch_rows=16, max_request_rows=8, operator="acme"
)
LINEAR: dict[str, int | str] = {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16}
SIGMA = 32.0


def run(test: Callable[[Cloud], Awaitable[None]], config: Config = CONFIG) -> None:
    async def go() -> None:
        async with serving(config) as cloud:
            await test(cloud)

    asyncio.run(go())


def seeds_of(seed: int, rows: int = 2) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (rows, 32), dtype=np.uint8)


def noise_message(seed: int, rows: int = 2, **fields: Any) -> bytes:
    return wire.encode_noise_request(seeds_of(seed, rows), **({"request_id": f"n{seed}"} | fields))


def decoded(seed: int, **fields: Any) -> wire.Request:
    return wire.decode_request(noise_message(seed, **fields))


def save(path: Path, name: str, options: dict[str, int | str]) -> Path:
    torch.manual_seed(0)
    model = build(Architecture(name, options)).eval()
    save_bundle(
        path,
        model,
        name="small",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name=name, options=options),
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=model.input_shape, mean=(0.25,), std=(0.5,)
        ),
        class_names=tuple(str(index) for index in range(model.classes)),
        tolerance=0.01,
        metrics={},
    )
    return path


# --- what it answers ----------------------------------------------------------------------------


def test_what_the_share_and_the_noise_give_together_is_the_blocks_output(tmp_path: Path) -> None:
    path = save(tmp_path / "linear", "convnet", LINEAR)
    manifest, blocks = load_backbone(path)

    async def test(cloud: Cloud) -> None:
        async with cloud.stream("/v2/models/small/stream") as stream, http(cloud) as peer:
            for index, block in enumerate(manifest.blocks):
                rows = rows_of(index, 3, block.input_shape).astype(np.float32)
                noise = expand_rows(seeds_of(index, 3), block.input_shape)
                share = rows + np.float32(SIGMA) * noise
                first = await ask(
                    stream,
                    wire.encode_request(share, request_id="s", dtype="float32", block=index),
                )
                message = noise_message(index, 3, block=index)
                reply = await peer.post(message, path="/v2/models/small/infer")
                second = await ask(stream, message)  # a retry, by the other way
                assert reply.status == second.status == 200
                assert second.request_id == f"n{index}"
                assert second.features.dtype == np.float32 and second.block == index
                np.testing.assert_allclose(
                    wire.decode_response(reply.body).features, second.features, atol=1e-5
                )
                with torch.inference_mode():
                    expected = blocks[index](torch.from_numpy(rows)).numpy()
                found = first.features - np.float32(SIGMA) * second.features
                scale = SIGMA * float(np.abs(second.features).max())
                assert np.abs(found - expected).max() < 4e-6 * scale
                assert np.abs(first.features - expected).max() > 0.1 * scale  # it did hide it

    run(test, Config(bundle=str(path), threads=1))


def test_noise_is_batched_with_other_requests() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            cloud.gate.close()
            await stream.send(message_of(0))
            await cloud.gate.batch()
            await stream.send(noise_message(1))
            await stream.send(message_of(2))
            await cloud.until_queued(2)
            cloud.gate.open()
            answers = {(a := await answer(stream)).request_id: a for _ in range(3)}
        assert_echoes(answers["r0"], 0)
        assert answers["n1"].batch_rows == answers["r2"].batch_rows == 4
        np.testing.assert_array_equal(answers["n1"].features, expand_rows(seeds_of(1), SHAPE))
        np.testing.assert_array_equal(answers["r2"].values(), rows_of(2).astype(np.float32))
        assert cloud.model.outcomes == {"ok": 3}

    run(test)


def test_the_operator_tells_its_name() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            server = (await peer.get("/v2")).json()
            assert server["operator"] == "acme"
            assert "datamix_noise" in server["extensions"]

    run(test)


# --- what it refuses ----------------------------------------------------------------------------


def arrow(values: Array, scale: list[float] | None, noise: str = "1", shape: Any = None) -> bytes:
    """A message of noise as a stranger may write it."""
    size = int(np.prod(values.shape[1:]))
    flat = pa.array(values.reshape(-1))
    kind = pa.fixed_shape_tensor(flat.type, shape or values.shape[1:])
    storage = pa.FixedSizeListArray.from_arrays(flat, size)
    columns = {"features": pa.ExtensionArray.from_storage(kind, storage)}
    if scale is not None:
        columns["scale"] = pa.array(scale, pa.float32())
    metadata = {"datamix.protocol": "1", "datamix.request_id": "bad", "datamix.noise": noise}
    batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body: bytes = sink.getvalue().to_pybytes()
    return body


SEED_ROWS = seeds_of(9).view(np.int8)
FORM = "rows of noise have another form, expected int8 seeds of shape (32,) with scales of 1"
HOSTILE = {
    "short seeds": (arrow(SEED_ROWS[:, :31], [1, 1]), 400, FORM),
    "long seeds": (arrow(np.tile(SEED_ROWS, 2), [1, 1]), 400, FORM),
    "seeds in two dimensions": (arrow(SEED_ROWS, [1, 1], shape=(4, 8)), 400, FORM),
    "the block's own shape": (arrow(np.ones((2, *SHAPE), np.int8), [1, 1]), 400, FORM),
    "float16": (arrow(np.ones((2, 32), np.float16), None), 400, FORM),
    "float32": (arrow(np.ones((2, 32), np.float32), None), 400, FORM),
    "a scale of 2": (arrow(SEED_ROWS, [1, 2]), 400, FORM),
    "a scale of 0": (arrow(SEED_ROWS, [0, 1]), 400, FORM),
    "a scale of NaN": (arrow(SEED_ROWS, [1, float("nan")]), 422, "features hold NaN or Inf"),
    "the map of tomorrow": (arrow(SEED_ROWS, [1, 1], "2"), 400, "datamix.noise names an unknown"),
    "no map": (arrow(SEED_ROWS, [1, 1], ""), 400, "datamix.noise names an unknown map"),
    "no rows": (arrow(SEED_ROWS[:0], []), 400, "request has no rows"),
    "unknown block": (noise_message(8, request_id="bad", block=1), 404, "block is 1, expected 0"),
    "one seed twice": (
        wire.encode_noise_request(seeds_of(7, 1).repeat(2, 0), request_id="bad"),
        409,
        "the request has a seed twice",
    ),
    "too many rows": (noise_message(6, 9, request_id="bad"), 413, "message has 9 rows"),
}


def test_hostile_noise_touches_nothing_else() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream, http(cloud) as peer:
            for number, (name, (message, status, sentence)) in enumerate(HOSTILE.items()):
                for _ in range(2):  # once read in full, once by what is remembered
                    reply = await peer.post(message)
                    assert (name, reply.status) == (name, status)
                    assert reply.error.startswith(sentence), name
                    response = await ask(stream, message)
                    assert (response.status, response.request_id) == (status, "bad"), name
                assert_echoes(await ask(stream, message_of(number)), number)
        assert len(cloud.gate.batches) == len(HOSTILE)  # only the good ones got to the engine

    run(test)


def test_a_seed_belongs_to_one_request() -> None:
    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream, http(cloud) as peer:
            good = await ask(stream, noise_message(1))
            assert good.status == 200
            other = wire.encode_noise_request(
                np.concatenate([seeds_of(2, 1), seeds_of(1)[1:]]), request_id="other"
            )
            refused = await ask(stream, other)
            assert refused.status == 409
            assert (refused.error or "").startswith("a seed came with another request before")
            assert (await peer.post(other)).status == 409
            # The seed beside it was not taken by the refused request.
            single = wire.encode_noise_request(seeds_of(2, 1), request_id="single")
            assert (await ask(stream, single)).status == 200
            again = await ask(stream, noise_message(1))
            np.testing.assert_array_equal(again.features, good.features)
            assert cloud.model.outcomes == {"ok": 3, "409": 2}

    run(test)


def test_noise_is_for_linear_blocks_only(tmp_path: Path) -> None:
    options: dict[str, int | str] = {"cloud": "relu", "depth": 2, "widths": "4,6,8"}
    path = save(tmp_path / "relu", "bridgenet", options)

    async def test(cloud: Cloud) -> None:
        async with cloud.stream("/v2/models/small/stream") as stream:
            response = await ask(stream, noise_message(0))
            assert response.status == 400
            assert (response.error or "").startswith("block 0 of 'small' is not linear")
            rows = rows_of(0, 2, cloud.model.engine.blocks[0].input_shape)
            assert (await ask(stream, wire.encode_request(rows, request_id="a"))).status == 200

    run(test, Config(bundle=str(path), threads=1))


def test_noise_is_no_larger_than_a_message() -> None:
    config = Config(engine="null", echo_shape=(64, 8, 8), max_request_bytes=40_000)

    async def test(cloud: Cloud) -> None:
        async with cloud.stream() as stream:
            refused = await ask(stream, noise_message(0, 3))
            assert refused.status == 413
            assert refused.error == "the noise has 49152 bytes, expected at most 40000"
            assert (await ask(stream, noise_message(0, 2))).status == 200

    run(test, config)


# --- what waits to be expanded ------------------------------------------------------------------


class Hold:
    """Stands before the expansion; closed, it stops each until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        monkeypatch.setattr(module, "expand_rows", self)

    def __call__(self, rows: Array, shape: tuple[int, ...]) -> Array:
        assert self.open.wait(10)
        return expand_rows(rows, shape)


def offer(cloud: Cloud, seed: int, done: Callable[[Any], None], **fields: Any) -> Any:
    from deployments.admission import Admission

    return Admission(cloud.backbone).admit(cloud.model, decoded(seed, **fields), done)


def direct(test: Callable[[Cloud], Awaitable[None]], **changes: Any) -> None:
    async def go() -> None:
        async with replica(CONFIG.model_copy(update=changes)) as cloud:
            await test(cloud)

    asyncio.run(go())


async def outcome_of(outcomes: list[Any], count: int = 1) -> list[Any]:
    async with asyncio.timeout(10):
        while len(outcomes) < count:
            await asyncio.sleep(0.001)
    return outcomes


def test_what_waits_is_bounded_and_the_rest_is_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Hold(monkeypatch)

    async def test(cloud: Cloud) -> None:
        outcomes: list[Any] = []
        for seed in range(4):
            offer(cloud, seed, outcomes.append)
        with pytest.raises(Overloaded, match="8 rows of noise wait to be expanded") as shed:
            offer(cloud, 4, outcomes.append)
        assert shed.value.retry_after_s is not None
        hold.open.set()
        assert all(hasattr(found, "output") for found in await outcome_of(outcomes, 4))
        offer(cloud, 4, outcomes.append)  # which did not lose its seeds
        await outcome_of(outcomes, 5)

    direct(test, max_queue_rows=8)


def test_bytes_that_wait_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Hold(monkeypatch)

    async def test(cloud: Cloud) -> None:
        outcomes: list[Any] = []
        offer(cloud, 0, outcomes.append)  # 2 rows of 18 values
        with pytest.raises(Overloaded):
            offer(cloud, 1, outcomes.append)
        hold.open.set()
        await outcome_of(outcomes)

    direct(test, max_queue_bytes=287)


def test_who_left_is_not_answered_and_frees_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Hold(monkeypatch)

    async def test(cloud: Cloud) -> None:
        outcomes: list[Any] = []
        offer(cloud, 0, lambda outcome: pytest.fail("it was cancelled")).cancelled = True
        offer(cloud, 1, outcomes.append)
        hold.open.set()
        await outcome_of(outcomes)
        assert cloud.gate.batches != [] and len(cloud.gate.batches) == 1
        offer(cloud, 2, outcomes.append)
        offer(cloud, 3, outcomes.append)
        await outcome_of(outcomes, 3)

    direct(test, max_queue_rows=8)


def test_a_deadline_that_passed_is_told() -> None:
    async def test(cloud: Cloud) -> None:
        outcomes: list[Any] = []
        offer(cloud, 0, outcomes.append, deadline_s=0.0)
        (found,) = await outcome_of(outcomes)
        assert found.status == 408
        assert cloud.gate.batches == []

    direct(test)


def test_a_fault_in_the_expansion_is_one_requests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(rows: Array, shape: tuple[int, ...]) -> Array:
        raise RuntimeError(f"secret {rows}")

    monkeypatch.setattr(module, "expand_rows", fail)

    async def test(cloud: Cloud) -> None:
        outcomes: list[Any] = []
        offer(cloud, 0, outcomes.append)
        (found,) = await outcome_of(outcomes)
        assert isinstance(found, Unavailable) and "secret" not in str(found)

    direct(test)
    assert [r.getMessage() for r in caplog.records] == ["noise was not expanded: RuntimeError"]


def test_a_replica_that_stops_answers_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Hold(monkeypatch)

    async def test(cloud: Cloud) -> None:
        outcomes: list[Any] = []
        offer(cloud, 0, outcomes.append)
        await cloud.backbone.close()
        hold.open.set()
        (found,) = await outcome_of(outcomes)
        assert isinstance(found, Unavailable)
        with pytest.raises(Unavailable, match="draining"):
            offer(cloud, 1, outcomes.append)

    direct(test)


# --- what it remembers --------------------------------------------------------------------------


def test_a_retry_is_the_same_in_everything_that_counts() -> None:
    seen = Seeds()
    seen.claim(decoded(0))
    seen.claim(decoded(0, deadline_s=1.0))
    for change in ({"request_id": "other"}, {"block": 1}):
        with pytest.raises(Conflict):
            seen.claim(decoded(0, **change))
    with pytest.raises(Conflict):  # the same id, and one seed more
        seen.claim(decoded(0, rows=3))
    seen.claim(decoded(1, request_id="n0"))  # an id is not a secret, and may come again
    assert len(seen) == 4


def test_the_latest_are_remembered() -> None:
    seen = Seeds(limit=4)
    for seed in range(3):
        seen.claim(decoded(seed))
    assert len(seen) == 4
    with pytest.raises(Conflict):
        seen.claim(decoded(1, request_id="other"))
    seen.claim(decoded(0, request_id="other"))  # long ago
    with pytest.raises(Conflict):
        seen.claim(decoded(2, request_id="other"))


def test_a_retry_is_remembered_as_the_latest() -> None:
    seen = Seeds(limit=4)
    for seed in (0, 1, 0, 2):
        seen.claim(decoded(seed))
    with pytest.raises(Conflict):
        seen.claim(decoded(0, request_id="other"))
    seen.claim(decoded(1, request_id="other"))


def test_neither_seeds_nor_ids_are_kept() -> None:
    seen = Seeds()
    seen.claim(decoded(0, request_id="passport"))
    kept = repr(vars(seen)).encode() + b"".join(k + v for k, v in seen._owners.items())
    assert b"passport" not in kept
    assert not any(row.tobytes()[:8] in kept for row in seeds_of(0))
