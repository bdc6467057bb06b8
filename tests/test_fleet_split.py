"""A fleet in the modes split and bounded: workloads alone, and devices against real replicas."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from datamix import wire
from datamix.bundle import (
    ArchitectureSpec,
    BoundedSpec,
    ImagePreprocessing,
    SplitSpec,
    load_backbone,
    save_bundle,
)
from datamix.errors import ConfigError, DataMixError, Unavailable
from datamix.models import Architecture, build
from deployments.config import Config
from edge.fleet import result, view
from edge.fleet.behaviour import Cancellations
from edge.fleet.config import FleetConfig
from edge.fleet.inputs import bundle_workload
from edge.fleet.offline import Offline, OfflineTraffic
from edge.fleet.page import write_page
from edge.fleet.profiles import Profile, Times
from edge.fleet.report import Run, Summary, summarise
from edge.fleet.run import simulate
from edge.fleet.shard import Shard, ShardResult
from edge.fleet.terms import Terms, agree
from edge.fleet.workload import BundleWorkload, Outcome, Question
from edge.masks import Mask, Masks
from edge.promises import promise
from edge.splitting import local_masks
from tests.asynchronous import asynchronous
from tests.real_cloud import Cloud, serving
from tests.test_fleet_report import make_run
from tests.used_masks import assert_used_once, watch

GROUP, SIGMA = 3, 200.0
HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle of random weights for all modes, and its inputs."""
    path = tmp_path_factory.mktemp("modes")
    torch.manual_seed(0)
    architecture = Architecture("convnet", {"n_blocks": 2, "stem_width": 4, "width": 8})
    model = build(architecture).eval()
    save_bundle(
        path / "bundle",
        model,
        name="small",
        version="1",
        mode="mix",
        group_size=GROUP,
        architecture=ArchitectureSpec(name=architecture.name, options=dict(architecture.options)),
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=model.input_shape, mean=(0.5,), std=(0.5,)
        ),
        class_names=tuple(map(str, range(model.classes))),
        tolerance=0.02,
        metrics={"accuracy_edge_only": 0.25},
        split=SplitSpec(sigma=SIGMA, wire_dtype="float32", tolerance=0.02),
        bounded=BoundedSpec(sigma=0.5),
    )
    images = np.random.default_rng(0).integers(0, 256, (10, *model.input_shape), np.uint8)
    np.savez(path / "inputs.npz", images=images, labels=np.arange(10))
    return path


def make_config(folder: Path, **settings: Any) -> FleetConfig:
    options: dict[str, Any] = {
        "url": "http://cloud",
        "bundle": str(folder / "bundle"),
        "inputs": str(folder / "inputs.npz"),
        "devices": 5,
        "rate": 40,
        "duration_s": 1.0,
        "pacer": "constant",
        "masks_ahead": 16,
    }
    return FleetConfig(**(options | settings))


class Backbone:
    """The cloud's blocks, run here."""

    def __init__(self, folder: Path) -> None:
        self.manifest, self.blocks = load_backbone(folder / "bundle")
        self.shapes = [block.input_shape for block in self.manifest.blocks]

    def compute(self, block: int, rows: Any) -> Any:
        with torch.inference_mode():
            return self.blocks[block](torch.from_numpy(rows)).numpy()


class Answered:
    """Masks whose answers are computed here; stands where a process's :class:`Offline` does."""

    def __init__(self, backbone: Backbone, spoil: bool = False) -> None:
        self.given: list[Mask] = []
        self._backbone, self._spoil = backbone, spoil

    def take(self) -> Masks:
        masks = local_masks(list(self._backbone.blocks), self._backbone.shapes, GROUP)
        for mask in masks._left.values():
            if self._spoil:
                mask.answer = mask.answer[::-1].copy()
            self.given.append(mask)
        return masks


def respond(question: Question, values: Any, dtype: Any) -> wire.Response:
    return wire.decode_response(
        wire.encode_response(
            values, dtype=dtype, request_id="a", model="m", model_version="1", block=question.block,
            queue_s=0, compute_s=0, batch_rows=1, close_reason="full",
        )
    )  # fmt: skip


def complete(workload: BundleWorkload, cloud: Any) -> Outcome:
    """One inference against ``cloud``: (block, rows as they came) -> output."""
    inference = workload.start(0)
    question = next(inference)
    while True:
        sent = wire.dequantise(*wire.quantise(question.features, workload.dtype))
        answer = respond(question, cloud(question.block, sent), workload.dtype)
        try:
            question = inference.send(answer)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome


# --- workloads without a network ----------------------------------------------------------------


def split_workload(folder: Path, offline: Any) -> BundleWorkload:
    return bundle_workload(make_config(folder, mode="split", second="http://b"), 2, offline)


def test_shares_are_answered_right_and_another_groups_answer_is_seen(folder: Path) -> None:
    backbone = Backbone(folder)
    workload = split_workload(folder, Answered(backbone))
    assert (workload.mode, workload.dtype) == ("split", "float32")
    outcome = complete(workload, backbone.compute)
    assert not outcome.wrong and outcome.correct == outcome.correct_local
    assert complete(workload, lambda block, rows: backbone.compute(block, rows[[1, 0, 2]])).wrong
    off = complete(workload, lambda block, rows: backbone.compute(block, rows) + np.float32(0.1))
    assert off.wrong


def test_a_wrong_answer_of_operator_b_is_seen(folder: Path) -> None:
    backbone = Backbone(folder)
    assert complete(split_workload(folder, Answered(backbone, spoil=True)), backbone.compute).wrong


@pytest.mark.parametrize("rounds", [0, 1])
def test_an_inference_that_is_given_up_wipes_its_masks(folder: Path, rounds: int) -> None:
    backbone = Backbone(folder)
    offline = Answered(backbone)
    workload = split_workload(folder, offline)
    inference = workload.start(0)
    question = next(inference)
    for _ in range(rounds):
        values = backbone.compute(question.block, question.features)
        question = inference.send(respond(question, values, "float32"))
    inference.close()
    assert len(offline.given) == 2
    assert not any(mask.noise.any() or mask.answer.any() for mask in offline.given)


def test_in_the_mode_bounded_the_answer_is_compared_with_the_rows_that_were_sent(
    folder: Path,
) -> None:
    backbone = Backbone(folder)
    workload = bundle_workload(make_config(folder, mode="bounded"), 2)
    sent: list[Any] = []

    def keep(block: int, rows: Any) -> Any:
        sent.append(rows)
        return backbone.compute(block, rows)

    assert not complete(workload, keep).wrong
    assert not complete(workload, keep).wrong
    # The same inputs twice, under other noise: 0.5 of it in each, so 0.7 between the two.
    assert np.std(sent[0] - sent[2]) > 0.5
    off = complete(workload, lambda block, rows: backbone.compute(block, rows) + np.float32(0.05))
    assert off.wrong


def test_a_mode_the_bundle_was_not_made_for_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="was made for mix, bounded, split"):
        bundle_workload(make_config(folder, mode="sum"), 1)


# --- terms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"mode": "split"}, "only one operator was given"),
        ({"mode": "mix", "second": "http://b"}, "has one operator"),
        ({"second": "http://b"}, "has one operator"),
        ({"mode": "bounded", "allow_same_operator": True}, "has one operator"),
        ({"mode": "bounded", "second_token": "t" * 43}, "has one operator"),
        ({"mode": "sum"}, "was made for mix, bounded, split"),
    ],
)
def test_ends_that_do_not_fit_the_mode_are_refused_before_anybody_is_asked(
    folder: Path, settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        simulate(make_config(folder, url="http://127.0.0.1:9", **settings))


@pytest.mark.parametrize(
    "settings", [{"second": "cloud:80"}, {"masks_ahead": 0}, {"workload": "echo", "mode": "split"}]
)
def test_settings_that_mean_nothing_are_refused(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make_config(folder, **settings)


def test_a_second_token_never_shows(folder: Path) -> None:
    config = make_config(folder, second="http://b", second_token="s3cret" * 8)
    assert "s3cret" not in repr(config) and config.second_access.token == "s3cret" * 8


# --- devices against two real replicas ----------------------------------------------------------


@asynccontextmanager
async def two(folder: Path, names: tuple[str, str] = ("acme", "other")) -> AsyncIterator[Any]:
    configs = [
        Config(bundle=str(folder / "bundle"), operator=name, threads=1, max_batch_rows=64,
               max_request_rows=64)
        for name in names
    ]  # fmt: skip
    async with serving(configs[0], host=HOSTS[0]) as a, serving(configs[1], host=HOSTS[1]) as b:
        yield a, b


def aimed(folder: Path, a: Cloud, b: Cloud, **settings: Any) -> FleetConfig:
    return make_config(folder, url=a.url, second=b.url, mode="split", **settings)


async def fly(config: FleetConfig, prepared: Any = None) -> ShardResult:
    """One shard in this loop."""
    backbone_manifest = load_backbone(str(config.bundle))[0]
    plan = config.schedule()
    offline = Offline(config, backbone_manifest, len(plan))
    workload = bundle_workload(config, len(plan), offline)
    shard = Shard(config, backbone_manifest.name, plan, workload, offline=offline)
    await shard.connect()
    if prepared is not None:
        prepared()
    return await shard.run(shard.clock())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[bytes]]]:
    """What the test uses, each only once."""
    seen = watch(monkeypatch)
    yield seen
    assert_used_once(seen)


def statuses(flown: ShardResult) -> dict[int, int]:
    return dict(Counter(flown.table["status"].tolist()))


@asynchronous
async def test_devices_infer_through_two_operators_and_their_traffic_is_kept_apart(
    folder: Path, used: dict[str, list[bytes]]
) -> None:
    async with two(folder) as (a, b):
        flown = await fly(aimed(folder, a, b))
        received = [cloud.backbone.traffic.received_bytes for cloud in (a, b)]
        sent = [cloud.backbone.traffic.sent_bytes for cloud in (a, b)]
        assert a.outcomes == {"ok": 80} and set(b.outcomes) == {"ok"}
    assert statuses(flown) == {result.OK: 40}
    offline = flown.offline
    assert offline is not None and offline.used == 40 <= offline.fetched
    assert len(used["noise"]) == 80 and len(used["seed"]) == offline.fetched * GROUP * 2
    assert offline.requests == b.outcomes["ok"] and offline.retries == 0
    assert flown.table["bytes_up"].sum() == received[0] and offline.bytes_up == received[1]
    assert flown.table["bytes_down"].sum() == sent[0] and offline.bytes_down == sent[1]
    assert np.array_equal(flown.table["correct"], flown.table["correct_local"])


@asynchronous
async def test_without_masks_an_inference_waits_and_then_fails_by_that_name(
    folder: Path, used: dict[str, list[bytes]]
) -> None:
    async with two(folder) as (a, b):
        config = aimed(folder, a, b, masks_ahead=4, timeout_s=0.6, rate=20)
        flown = await fly(config, b.gate.close)
        b.gate.open()
    found = statuses(flown)
    assert set(found) == {result.OK, result.MASKS} and found[result.OK] >= 4
    late = flown.table[flown.table["status"] == result.MASKS]
    # Nothing of it left the device, and the generator was in time all the same.
    assert np.isnan(late["sent_s"]).all() and not late["bytes_up"].any()
    assert (late["lag_s"] < 0.5).all()
    assert flown.offline is not None and flown.offline.waited >= len(late)


@asynchronous
async def test_devices_of_their_own_speed_that_give_up_use_no_mask_twice(
    folder: Path, used: dict[str, list[bytes]]
) -> None:
    async with two(folder) as (a, b):
        slow = Profile("slow", times=Times(stem_s=0.01, mix_s=0.02, demix_s=0.02))
        give_up = Cancellations(share=0.4, after_s=0.04)  # after the first message has left
        flown = await fly(aimed(folder, a, b, profiles=(slow,), cancel=give_up))
    found = statuses(flown)
    assert set(found) == {result.OK, result.CANCELLED} and min(found.values()) > 5
    assert flown.offline is not None and flown.offline.used == 40
    assert 40 + found[result.OK] <= len(used["noise"]) <= 80  # one or two rounds, if given up


@asynchronous
async def test_an_operator_b_that_comes_back_serves_those_who_waited(folder: Path) -> None:
    async with two(folder) as (a, b):

        def stall() -> None:
            b.gate.close()
            asyncio.get_running_loop().call_later(0.7, b.gate.open)

        flown = await fly(aimed(folder, a, b, masks_ahead=4, timeout_s=8.0, rate=20), stall)
    assert statuses(flown) == {result.OK: 20}
    latency_s = flown.table["done_s"] - flown.table["scheduled_s"]
    assert latency_s.max() > 0.2  # from the schedule: a wait for operator B is no secret


@asynchronous
async def test_an_operator_b_that_is_gone_is_named_before_the_run(folder: Path) -> None:
    async with two(folder) as (a, _):
        config = replace(aimed(folder, a, a, timeout_s=0.3), second="http://127.0.0.1:9")
        manifest = load_backbone(str(config.bundle))[0]
        offline = Offline(config, manifest, 4)
        with pytest.raises(Unavailable, match="operator B: "):
            await offline.fill()
        with pytest.raises(ConfigError, match="no masks are ready"):
            offline.take()
        await offline.close()


def test_a_whole_run_asks_who_runs_the_ends_and_says_what_it_found(folder: Path) -> None:
    async def run() -> Summary:
        async with two(folder, ("acme", "acme")) as (a, b):
            config = aimed(folder, a, b, rate=20)
            with pytest.raises(ConfigError, match="both ends declare the operator 'acme'"):
                await asyncio.to_thread(simulate, config)
            assert not a.outcomes and not b.outcomes
            return await asyncio.to_thread(simulate, replace(config, allow_same_operator=True))

    summary = asyncio.run(run())
    assert summary.ok == summary.inferences == 20 and summary.mode == "split"
    assert summary.not_private == "both ends declare the operator 'acme'"
    assert summary.masks_used == 20 and summary.offline_bytes_up_per_input is not None
    assert summary.offline_bytes_up_per_input < 0.1 * (summary.bytes_up_per_input or 0)


@asynchronous
async def test_an_operator_b_with_another_model_is_refused(folder: Path) -> None:
    other = Config(engine="null", echo_shape=(2, 3, 3))
    async with two(folder) as (a, _), serving(other) as echo:
        with pytest.raises(DataMixError):
            await asyncio.to_thread(agree, aimed(folder, a, echo))
        assert not echo.outcomes.get("ok")


# --- reports ------------------------------------------------------------------------------------


def run_of(folder: Path, mode: str, not_private: str | None = None) -> Run:
    manifest = load_backbone(folder / "bundle")[0]
    traffic = OfflineTraffic(100, 90, 5, 200, 3, 30_000, 600_000) if mode == "split" else None
    return replace(
        make_run(),
        config=make_config(folder, mode=mode),
        mode=mode,
        terms=Terms(promise(manifest, mode), not_private, 0.25),
        offline=traffic,
    )


@pytest.mark.parametrize(
    ("mode", "not_private"),
    [("mix", None), ("bounded", None), ("split", None), ("split", "both ends are at one address")],
)
def test_every_report_quotes_the_promise_and_marks_what_is_not_private(
    folder: Path, tmp_path: Path, mode: str, not_private: str | None
) -> None:
    run = run_of(folder, mode, not_private)
    summary, promised = summarise(run), promise(load_backbone(folder / "bundle")[0], mode)
    read = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert (read["mode"], read["promise"]) == (mode, promised.text)
    assert read["known_break"] == promised.known_break and read["not_private"] == not_private
    expected = None if mode == "mix" else promised.bits_per_input
    assert read["bits_per_input"] == expected
    assert summary.privacy == promised.sentence(not_private)
    screen = io.StringIO()
    view.show(summary, Console(file=screen, width=400))
    write_page(tmp_path / "page.html", summary, summary.series)
    for shown in (screen.getvalue(), (tmp_path / "page.html").read_text()):
        assert promised.text in shown and promised.known_break in shown
        assert ("NOT PRIVATE" in shown) == (not_private is not None)
        assert "25.0%" in shown


def test_offline_figures_are_per_input_that_masks_were_fetched_for(folder: Path) -> None:
    summary = summarise(run_of(folder, "split"))
    assert (summary.masks_fetched, summary.masks_used, summary.masks_waited) == (100, 90, 5)
    assert (summary.offline_requests, summary.offline_retries) == (200, 3)
    assert summary.offline_bytes_up_per_input == 30_000 / (100 * summary.group_size)
    assert summary.offline_bytes_down_per_input == 600_000 / (100 * summary.group_size)
    assert summarise(run_of(folder, "mix")).masks_fetched is None
