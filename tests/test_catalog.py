"""Several models and versions on one replica: loaded, swapped and let go of beside the traffic."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from prometheus_client import CollectorRegistry

from cluster.models import Models
from datamix import wire
from datamix.canaries import CANARIES
from datamix.errors import BundleError, ConfigError, NotFound, Unavailable
from deployments import backbone as module
from deployments import catalog as catalogs
from deployments.backbone import Backbone
from deployments.config import Config
from deployments.emulated import emulated
from deployments.metrics import PrometheusBackend
from deployments.model import Loaded, load
from deployments.peers import NoPeers
from deployments.store import MemoryStore
from deployments.table import Table
from tests.real_cloud import PATIENCE_S, Cloud, answer, ask, http, serving
from tests.test_bundle import replace_weights

SHIPPED = Path(__file__).parents[1] / "bundles" / "fashion-mnist-mix"


def copy_of(folder: Path, name: str, version: str) -> str:
    """A bundle of this name and version, from the shipped one."""
    target = folder / f"{name}-{version}"
    shutil.copytree(SHIPPED, target, ignore=shutil.ignore_patterns("device.safetensors"))
    manifest = json.loads((target / "manifest.json").read_text())
    manifest |= {"name": name, "version": version}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return str(target)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bundles")
    return {f"{n}{v}": copy_of(folder, n, v) for n, v in (("a", "1"), ("a", "2"), ("b", "1"))}


class Replicas:
    """Several replicas of one application in this process, and its operator's hand on them."""

    def __init__(self, config: Config, count: int) -> None:
        self.config = config
        self.store = MemoryStore()
        self.replicas = [self.start() for _ in range(count)]
        self.loop = asyncio.get_running_loop()
        self.models = Models(self.broadcast, self.store)

    def start(self) -> Backbone:
        return Backbone(self.config, PrometheusBackend(CollectorRegistry()), self.store, NoPeers())

    def broadcast(self, method: str, *arguments: Any) -> Sequence[dict[str, Any]]:
        async def all_of_them() -> list[dict[str, Any]]:
            calls = [getattr(replica, method)(*arguments) for replica in self.replicas]
            return [await call for call in calls]

        return asyncio.run_coroutine_threadsafe(all_of_them(), self.loop).result(30)

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.close()


def run(
    test: Callable[[Replicas], Awaitable[None]], *paths: str, replicas: int = 2, **options: Any
) -> None:
    async def go() -> None:
        config = Config(bundle=paths, **({"engine": "null"} | options))
        application = Replicas(config, replicas)
        try:
            await test(application)
        finally:
            await application.close()

    asyncio.run(go())


def standing(application: Replicas) -> list[tuple[str, str, bool, int]]:
    return [(r.name, r.version, r.current, r.ready) for r in application.models.list()]


# --- what is served from the start --------------------------------------------------------------


def test_the_first_bundle_of_a_model_is_current(bundles: dict[str, str]) -> None:
    async def test(application: Replicas) -> None:
        found = await asyncio.to_thread(standing, application)
        assert found == [("a", "2", True, 1), ("b", "1", True, 1), ("a", "1", False, 1)]
        catalog = application.replicas[0].catalog
        assert catalog.find("a").version == "2"
        assert catalog.find("a", "1").version == "1"
        with pytest.raises(NotFound, match="^model is 'c', expected one of 'a', 'b'$"):
            catalog.find("c")
        with pytest.raises(NotFound, match="^version of 'a' is '3', expected one of '2', '1'$"):
            catalog.find("a", "3")

    run(test, bundles["a2"], bundles["b1"], bundles["a1"], replicas=1)


def test_the_same_version_twice_is_refused(bundles: dict[str, str]) -> None:
    async def test(application: Replicas) -> None:
        raise AssertionError("it started")

    with pytest.raises(ValueError, match="there twice"):
        run(test, bundles["a1"], bundles["a1"])


def test_endpoints_tell_models_and_versions_apart(bundles: dict[str, str]) -> None:
    config = Config(bundle=(bundles["a1"], bundles["a2"], bundles["b1"]), engine="null")

    async def go() -> None:
        async with serving(config) as cloud, http(cloud) as peer:
            index = (await peer.request("POST", "/v2/repository/index")).json()
            assert [(m["name"], m["version"], m["state"]) for m in index] == [
                ("a", "1", "READY"), ("a", "2", "READY"), ("b", "1", "READY"),
            ]  # fmt: skip
            about = (await peer.get("/v2/models/a")).json()
            assert (about["versions"], about["parameters"]["version"]) == (["1", "2"], "1")
            about = (await peer.get("/v2/models/a/versions/2")).json()
            assert about["parameters"]["version"] == "2"
            assert (await peer.get("/v2/models/a/versions/3/ready")).status == 404
            async with cloud.stream("/v2/models/a/stream") as stream:
                for version in (None, "2", "1"):
                    response = await ask(stream, message("a", version))
                    assert (response.model, response.model_version) == ("a", version or "1")
                assert (await ask(stream, message("b", None))).status == 404
            stats = (await peer.get("/v2/stats")).json()
            assert [m["requests"] for m in stats["models"]] == [{"ok": 2}, {"ok": 1}, {}]
            assert stats["requests"] == {"ok": 3, "404": 1}

    asyncio.run(go())


def message(model: str, version: str | None, number: int = 0) -> bytes:
    rows = np.full((1, 16, 14, 14), number, np.float16)
    return wire.encode_request(rows, request_id=f"r{number}", model=model, model_version=version)


def test_a_post_counts_for_the_version_that_its_message_names(bundles: dict[str, str]) -> None:
    """Whoever unloads a version looks at its requests first."""
    config = Config(bundle=(bundles["a1"], bundles["a2"]), engine="null")
    bad = wire.encode_request(
        np.zeros((1, 2, 2), np.float16), request_id="b", model="a", model_version="2"
    )

    async def go() -> None:
        async with serving(config) as cloud, http(cloud) as peer:
            path = "/v2/models/a/infer"
            for body, status in ((message("a", None), 200), (message("a", "2"), 200), (bad, 400)):
                assert (await peer.post(body, path=path)).status == status
            assert (await peer.post(b"no message", path=path)).status == 400
            stats = (await peer.get("/v2/stats")).json()
            assert [m["requests"] for m in stats["models"]] == [
                {"ok": 1, "400": 1}, {"ok": 1, "400": 1},
            ]  # fmt: skip

    asyncio.run(go())


# --- the commands -------------------------------------------------------------------------------


def test_a_version_is_loaded_promoted_rolled_back_and_unloaded(bundles: dict[str, str]) -> None:
    async def test(application: Replicas) -> None:
        models = application.models

        def commands() -> None:
            assert models.load(bundles["a2"]).version == "2"
            assert standing(application) == [("a", "1", True, 2), ("a", "2", False, 2)]
            with pytest.raises(ConfigError, match="^version '2' of 'a' is loaded already$"):
                models.load(bundles["a2"])
            models.promote("a", "2")
            assert standing(application) == [("a", "1", False, 2), ("a", "2", True, 2)]
            assert models.rollback("a") == "1"
            assert standing(application) == [("a", "1", True, 2), ("a", "2", False, 2)]
            assert models.rollback("a") == "2"
            models.unload("a", "1")
            assert standing(application) == [("a", "2", True, 2)]
            models.load(bundles["b1"], promote=True)
            assert standing(application) == [("a", "2", True, 2), ("b", "1", True, 2)]
            models.unload("a", "2")
            assert standing(application) == [("b", "1", True, 2)]

        await asyncio.to_thread(commands)
        # One that starts now serves what the others serve, not what its configuration says.
        late = application.start()
        try:
            assert [(m.name, m.version) for m in late.catalog] == [("b", "1")]
        finally:
            await late.close()

    run(test, bundles["a1"])


def test_a_bundle_that_cannot_be_read_changes_nothing(
    bundles: dict[str, str], tmp_path: Path
) -> None:
    async def test(application: Replicas) -> None:
        with pytest.raises(ConfigError, match="^replica [0-9a-f]+: no manifest.json in bundle"):
            await asyncio.to_thread(application.models.load, str(tmp_path))
        assert application.store.read() is None

    run(test, bundles["a1"])


def test_a_version_that_one_replica_cannot_load_is_taken_back(
    bundles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(range(10))

    def second_fails(config: Config, bundle: str | None) -> Loaded:
        if next(turns) == 1:
            raise BundleError("backbone.safetensors: sha256 differs")
        return load(config, bundle)

    async def test(application: Replicas) -> None:
        monkeypatch.setattr(catalogs, "load", second_fails)
        with pytest.raises(
            Unavailable, match=r"^'.*a-2' was not loaded: backbone.safetensors: sha"
        ):
            await asyncio.to_thread(application.models.load, bundles["a2"])
        found = await asyncio.to_thread(standing, application)
        assert found == [("a", "1", True, 2)]

    run(test, bundles["a1"])


def test_a_load_during_which_a_replica_dies_is_taken_back(bundles: dict[str, str]) -> None:
    async def test(application: Replicas) -> None:
        plain, asked = application.broadcast, 0

        def dying(method: str, *arguments: Any) -> Sequence[dict[str, Any]]:
            nonlocal asked
            answers = plain(method, *arguments)
            if arguments == (True,):  # to follow the table
                asked += 1
                if asked == 1:
                    raise Unavailable("a replica did not answer: ActorDiedError")
            return answers

        models = Models(dying, application.store)
        with pytest.raises(Unavailable, match="^a replica did not answer: ActorDiedError$"):
            await asyncio.to_thread(models.load, bundles["a2"])
        assert await asyncio.to_thread(standing, application) == [("a", "1", True, 2)]
        await asyncio.to_thread(
            models.load, bundles["a2"]
        )  # and a second try is no "loaded already"
        assert (await asyncio.to_thread(standing, application))[1] == ("a", "2", False, 2)

    run(test, bundles["a1"])


def test_a_replica_goes_on_following_after_a_fault_nobody_foresaw(
    bundles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FOLLOW_PERIOD_S", 0.01)

    class Odd(MemoryStore):
        faults = 0

        def read(self) -> bytes | None:
            if self.faults:
                self.faults -= 1
                raise RuntimeError("nobody knows")
            return super().read()

    async def go() -> None:
        store = Odd()
        config = Config(bundle=bundles["a1"], engine="null")
        async with serving(config, store) as cloud:
            entry = load(config, bundles["a2"]).entry
            store.faults = 2
            table = cloud.backbone.catalog.table.loaded(entry).promoted("a", "2")
            store.write(table.model_dump_json().encode())
            async with asyncio.timeout(PATIENCE_S):
                while cloud.backbone.catalog.find("a").version != "2":
                    await asyncio.sleep(0.001)
            assert store.faults == 0

    asyncio.run(go())


def test_a_replica_catches_up_by_itself(
    bundles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FOLLOW_PERIOD_S", 0.01)

    async def test(application: Replicas) -> None:
        table = application.replicas[0].catalog.table
        entry = load(application.config, bundles["a2"]).entry
        application.store.write(table.loaded(entry).promoted("a", "2").model_dump_json().encode())
        async with asyncio.timeout(10):
            while any(r.catalog.find("a").version != "2" for r in application.replicas):
                await asyncio.sleep(0.001)

    run(test, bundles["a1"])


def test_a_table_of_another_configuration_is_not_followed(bundles: dict[str, str]) -> None:
    async def test(application: Replicas) -> None:
        await asyncio.to_thread(application.models.load, bundles["a2"])
        config = Config(bundle=bundles["b1"], engine="null")
        other = Backbone(
            config, PrometheusBackend(CollectorRegistry()), application.store, NoPeers()
        )
        try:
            assert [(m.name, m.version) for m in other.catalog] == [("b", "1")]
        finally:
            await other.close()

    run(test, bundles["a1"])


def test_an_old_version_that_is_gone_does_not_stop_a_replica(
    bundles: dict[str, str], tmp_path: Path
) -> None:
    old = copy_of(tmp_path, "a", "0")

    async def test(application: Replicas) -> None:
        await asyncio.to_thread(application.models.load, old)
        shutil.rmtree(old)
        application.replicas.append(application.start())
        rows = await asyncio.to_thread(application.models.list)
        assert [(r.version, r.ready, r.replicas) for r in rows] == [("1", 3, 3), ("0", 2, 3)]
        assert rows[1].reason.startswith("no manifest.json in bundle")
        with pytest.raises(
            Unavailable, match="^version '0' of 'a' is ready on 2 of 3 replicas: no"
        ):
            await asyncio.to_thread(application.models.promote, "a", "0")
        # The current version must be there, or the replica would answer nobody.
        table = application.replicas[0].catalog.table.promoted("a", "0")
        application.store.write(table.model_dump_json().encode())
        with pytest.raises(BundleError):
            application.start()

    run(test, bundles["a1"])


# --- beside the traffic -------------------------------------------------------------------------


def test_a_swap_fails_no_request_and_mixes_no_versions(bundles: dict[str, str]) -> None:
    """20 streams ask without a pause while versions are loaded, promoted, rolled back, unloaded."""
    config = Config(bundle=bundles["a1"], engine="null")
    store = MemoryStore()

    async def one(cloud: Cloud, done: asyncio.Event, seen: list[str]) -> None:
        async with cloud.stream("/v2/models/a/stream") as stream:
            number = 0
            while not done.is_set():
                for each in range(number, number + 4):
                    await stream.send(message("a", None, each % 2000))
                for each in range(number, number + 4):
                    response = await answer(stream)
                    assert (response.status, response.error) == (200, None)
                    assert response.request_id == f"r{each % 2000}"
                    assert (response.features == each % 2000).all()
                    assert response.model_version is not None
                    seen.append(response.model_version)
                number += 4

    async def go() -> None:
        done = asyncio.Event()
        async with serving(config, store) as cloud:
            loop = asyncio.get_running_loop()

            def broadcast(method: str, *arguments: Any) -> Sequence[dict[str, Any]]:
                call = getattr(cloud.backbone, method)(*arguments)
                return [asyncio.run_coroutine_threadsafe(call, loop).result(30)]

            models = Models(broadcast, store)
            seen: list[list[str]] = [[] for _ in range(20)]
            async with asyncio.TaskGroup() as tasks:
                for each in seen:
                    tasks.create_task(one(cloud, done, each))

                def until_all_see(version: str) -> None:
                    deadline = time.monotonic() + PATIENCE_S
                    while not all(each and each[-1] == version for each in seen):
                        assert time.monotonic() < deadline
                        time.sleep(0.001)

                def swaps() -> None:
                    until_all_see("1")
                    models.load(bundles["a2"], promote=True)
                    until_all_see("2")
                    assert models.rollback("a") == "1"
                    until_all_see("1")
                    models.unload("a", "2")
                    models.load(bundles["a2"])
                    models.promote("a", "2")
                    until_all_see("2")
                    models.unload("a", "1")

                await asyncio.to_thread(swaps)
                done.set()
            for each in seen:
                changes = [b for a, b in zip(each, each[1:], strict=False) if a != b]
                assert changes == ["2", "1", "2"]

    asyncio.run(go())


def test_a_version_that_leaves_answers_what_it_has(bundles: dict[str, str]) -> None:
    # A slow engine is nothing to be compared with, and this one is stopped.
    config = Config(bundle=bundles["a1"], engine="null", canary_slowdown=None)

    async def go() -> None:
        store = MemoryStore()
        async with serving(config, store) as cloud, cloud.stream("/v2/models/a/stream") as stream:
            old = cloud.model
            cloud.gate.close()
            await stream.send(message("a", "1", 5))
            await cloud.gate.batch()
            await stream.send(message("a", "1", 6))
            await cloud.until_queued(1)
            two = load(config, bundles["a2"]).entry
            table = cloud.backbone.catalog.table.loaded(two).promoted("a", "2").unloaded("a", "1")
            await cloud.backbone.catalog.follow(table)
            refused = await ask(stream, message("a", "1", 7))
            assert (refused.status, refused.error) == (404, "version of 'a' is '1', expected '2'")
            assert (await ask(stream, message("a", None, 8))).model_version == "2"
            cloud.gate.open()
            for number in (5, 6):
                response = await answer(stream)
                assert (response.status, response.request_id) == (200, f"r{number}")
                assert response.model_version == "1"
            await asyncio.to_thread(old.batcher._thread.join, 10)
            assert not old.batcher._thread.is_alive()

    asyncio.run(go())


@pytest.mark.parametrize(("slowdown", "refused"), [(2.0, True), (None, False)])
def test_a_version_much_slower_than_the_current_one_is_refused(
    bundles: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    slowdown: float | None,
    refused: bool,
) -> None:
    def slow(config: Config, bundle: str | None) -> Loaded:
        loaded = load(config, bundle)
        shapes = [block.input_shape for block in loaded.engine.blocks]
        return loaded._replace(engine=emulated(shapes, 0.01, 0.0))

    async def test(application: Replicas) -> None:
        monkeypatch.setattr(catalogs, "load", slow)
        if not refused:
            await asyncio.to_thread(application.models.load, bundles["a2"])
            return
        with pytest.raises(
            Unavailable,
            match=r"was not loaded: full batches of all blocks take 0.02\d* s, and .* s with the "
            r"current version '1', expected at most 2 times as long \(canary_slowdown\)$",
        ):
            await asyncio.to_thread(application.models.load, bundles["a2"])
        found = await asyncio.to_thread(standing, application)
        assert found == [("a", "1", True, 2)]

    run(test, bundles["a1"], canary_slowdown=slowdown)


def test_a_version_that_fails_its_canaries_is_refused_with_the_reason(
    bundles: dict[str, str], tmp_path: Path
) -> None:
    spoilt = Path(copy_of(tmp_path, "a", "3"))
    tensors = safetensors.numpy.load((spoilt / CANARIES).read_bytes())
    tensors["blocks.1.output"] = -tensors["blocks.1.output"]
    replace_weights(spoilt, CANARIES, safetensors.numpy.save(tensors))

    async def test(application: Replicas) -> None:
        with pytest.raises(Unavailable, match="was not loaded: block 1 fails its canaries: "):
            await asyncio.to_thread(application.models.load, str(spoilt))
        found = await asyncio.to_thread(standing, application)
        assert found == [("a", "1", True, 1)]

    threads = torch.get_num_threads()
    run(test, bundles["a1"], replicas=1, engine="torch", threads=threads)


def test_serving_goes_on_while_a_version_loads(
    bundles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def slow(config: Config, bundle: str | None) -> Loaded:
        begun.set()
        assert go_on.wait(10)
        return load(config, bundle)

    async def go() -> None:
        config = Config(bundle=bundles["a1"], engine="null")
        async with serving(config) as cloud, cloud.stream("/v2/models/a/stream") as stream:
            entry = load(config, bundles["a2"]).entry
            monkeypatch.setattr(catalogs, "load", slow)
            table: Table = cloud.backbone.catalog.table.loaded(entry)
            following = asyncio.create_task(cloud.backbone.catalog.follow(table))
            await asyncio.to_thread(begun.wait, 10)
            assert (await ask(stream, message("a", None))).status == 200
            assert (await ask(stream, message("a", "2"))).status == 404
            go_on.set()
            await following
            assert (await ask(stream, message("a", "2"))).status == 200

    asyncio.run(go())
