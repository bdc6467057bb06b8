"""The client with two operators: what each gets, what comes out, and what a failure does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from datamix import wire
from datamix.errors import AnswerError, BudgetSpent, ConfigError, Unavailable
from datamix.noise import expand_rows
from edge import installed
from edge import masks as masks_module
from edge.cache import AnswerCache
from edge.client import Client, ClientConfig
from edge.ledger import Ledger
from edge.masks import MaskPool
from edge.modes import int16_step
from edge.operators import Endpoint, check_operators, same_operator
from edge.transport import InProcessTransport
from tests.asynchronous import asynchronous
from tests.fake_cloud import echo
from tests.fake_device import GROUP, SHAPES, FakeDevice, compute, make_manifest, raw_inputs

Array = npt.NDArray[Any]
QUICK = ClientConfig(timeout_s=5, first_backoff_s=0.001)


class Operator:
    """An honest operator who writes everything down."""

    def __init__(self, spoil: Callable[[wire.Request, bytes], bytes] | None = None) -> None:
        self.requests: list[wire.Request] = []
        self.bodies: list[bytes] = []
        self.spoil = spoil
        self.transport = InProcessTransport(self._answer)

    async def _answer(self, message: bytes) -> bytes:
        request = wire.decode_request(message)
        self.requests.append(request)
        self.bodies.append(message)
        if request.noise:
            rows = expand_rows(request.features, SHAPES[request.block][0])
        else:
            rows = wire.dequantise(request.features, request.scale)
        body = echo(request, features=compute(request.block, rows))
        return self.spoil(request, body) if self.spoil else body


def device(**changes: Any) -> FakeDevice:
    return FakeDevice(all_modes=True, **changes)


def client(first: Operator, second: Operator, **options: Any) -> Client:
    usual: dict[str, Any] = {"config": QUICK, "mode": "split", "allow_same_operator": True}
    return Client(first.transport, device(), second=second.transport, **(usual | options))


@asynchronous
async def test_two_operators_give_the_answer_that_no_cloud_would() -> None:
    first, second = Operator(), Operator()
    inputs = raw_inputs(3 * GROUP + 1)
    async with client(first, second) as own:
        outputs = await own.infer(inputs)
        assert np.abs(outputs - device().local(inputs)).max() < 0.002
        assert own.not_private == "transports of one's own do not say who runs them"
        assert own.promise.mode == "split"
    assert not any(request.noise for request in first.requests)
    assert all(request.noise for request in second.requests)
    assert {request.dtype for request in first.requests} == {"float32"}


@asynchronous
async def test_integers_of_16_bits_have_one_scale_whatever_the_inputs_are() -> None:
    first, second = Operator(), Operator()
    coarse = device()
    assert coarse.manifest.split is not None
    spec = coarse.manifest.split.model_copy(update={"wire_dtype": "int16"})
    coarse.manifest = coarse.manifest.model_copy(update={"split": spec})
    own = Client(
        first.transport,
        coarse,
        second=second.transport,
        mode="split",
        allow_same_operator=True,
        config=QUICK,
    )
    inputs = raw_inputs(GROUP)
    async with own:
        for some in (inputs, np.zeros_like(inputs), np.full_like(inputs, 255)):
            outputs = await own.infer(some)
            assert np.abs(outputs - coarse.local(some)).max() < 0.1
    scales = [request.scale for request in first.requests]
    assert {request.dtype for request in first.requests} == {"int16"}
    assert {float(one) for scale in scales if scale is not None for one in scale} == {
        int16_step(spec.sigma)
    }
    assert len({len(body) for body in first.bodies}) <= len(SHAPES)


@asynchronous
async def test_operator_b_gets_seeds_and_no_request_is_seen_by_both() -> None:
    first, second = Operator(), Operator()
    async with client(first, second) as own:
        await own.infer(raw_inputs(GROUP))
    ids = [{request.request_id for request in operator.requests} for operator in (first, second)]
    assert not ids[0] & ids[1]
    seeds = [bytes(row) for request in second.requests for row in request.features]
    assert len(set(seeds)) == len(seeds)
    for request in second.requests:
        assert request.features.shape[1:] == (32,)


@asynchronous
async def test_masks_are_there_before_the_input() -> None:
    first, second = Operator(), Operator()
    async with client(first, second) as own:
        await own.prefetch()
        asked = len(second.requests)
        assert asked and not first.requests
        await own.infer(raw_inputs(GROUP))
        assert len(second.requests) == asked  # nobody waited for operator B
        assert len(first.requests) == len(SHAPES)


@asynchronous
async def test_a_retry_sends_the_same_share_and_a_failed_inference_throws_its_masks_away() -> None:
    seen: dict[str, list[Array]] = {}

    def refuse(request: wire.Request, body: bytes) -> bytes:
        seen.setdefault(request.request_id, []).append(request.features.copy())
        if len(seen[request.request_id]) < 3:
            return wire.encode_error(request.request_id, 503, "busy")
        return body

    first, second = Operator(refuse), Operator()
    async with client(first, second) as own:
        await own.infer(raw_inputs(GROUP))
    for shares in seen.values():
        assert len(shares) == 3
        assert all(np.array_equal(shares[0], other) for other in shares)

    first.spoil = lambda request, body: wire.encode_error(request.request_id, 400, "no")
    start = len(first.requests)
    async with client(first, second) as own:
        for _ in range(2):
            with pytest.raises(Exception, match="operator A: no"):
                await own.infer(raw_inputs(GROUP))
    shares = [request.features for request in first.requests[start:]]
    assert len(shares) == 2  # the same inputs, under other noise
    assert abs(np.corrcoef(shares[0].ravel(), shares[1].ravel())[0, 1]) < 0.5


def _truncated(request: wire.Request, body: bytes) -> bytes:
    return echo(request, features=compute(request.block, np.zeros((1, *SHAPES[request.block][0]))))


def _not_finite(request: wire.Request, body: bytes) -> bytes:
    features = np.full((request.rows, *SHAPES[request.block][1]), np.nan, np.float32)
    return echo(request, features=features)


@pytest.mark.parametrize("which", ["A", "B"])
@pytest.mark.parametrize("spoil", [_truncated, _not_finite])
@asynchronous
async def test_garbage_of_one_operator_is_an_error_that_names_it(which: str, spoil: Any) -> None:
    first = Operator(spoil if which == "A" else None)
    second = Operator(spoil if which == "B" else None)
    async with client(first, second) as own:
        with pytest.raises(AnswerError, match="operator B" if which == "B" else "answer"):
            await own.infer(raw_inputs(GROUP))


@pytest.mark.parametrize("which", ["A", "B"])
@asynchronous
async def test_an_operator_that_is_down_is_named_and_may_come_back(which: str) -> None:
    def down(request: wire.Request, body: bytes) -> bytes:
        return wire.encode_error(request.request_id, 503, "gone")

    operators = {"A": Operator(), "B": Operator()}
    operators[which].spoil = down
    config = ClientConfig(timeout_s=5, first_backoff_s=0.001, retry_reserve=2, retry_ratio=0)
    async with client(operators["A"], operators["B"], config=config) as own:
        with pytest.raises(Unavailable, match=f"operator {which}"):
            await own.infer(raw_inputs(GROUP))
        operators[which].spoil = None
        inputs = raw_inputs(GROUP)
        assert np.abs(await own.infer(inputs) - device().local(inputs)).max() < 0.002


def test_a_second_operator_is_needed_and_only_then_of_use() -> None:
    with pytest.raises(ConfigError, match="expected two"):
        Client(Operator().transport, device(), mode="split")
    with pytest.raises(ConfigError, match="has one operator"):
        Client(Operator().transport, device(), second=Operator().transport)
    with pytest.raises(ConfigError, match="cannot be asked who runs it"):
        client(Operator(), Operator(), allow_same_operator=False)
    with pytest.raises(ConfigError, match="was made for mix"):
        Client(Operator().transport, FakeDevice(), mode="split", second=Operator().transport)


# --- the mode bounded ---------------------------------------------------------------------------


@asynchronous
async def test_the_mode_bounded_sends_noise_that_stays() -> None:
    operator, inputs = Operator(), raw_inputs(8 * GROUP)
    async with Client(operator.transport, device(), mode="bounded", config=QUICK) as own:
        outputs = await own.infer(inputs)
    off = np.abs(outputs - device().local(inputs))
    assert 0.01 < off.mean() < 0.5
    assert not operator.requests[0].noise


# --- constant shapes, random order --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mix", "bounded", "split"])
@asynchronous
async def test_sizes_and_counts_do_not_depend_on_the_data(mode: str) -> None:
    sizes = []
    for inputs in (np.zeros((GROUP, 1, 2, 3), np.uint8), raw_inputs(GROUP), raw_inputs(1)):
        operators = [Operator(), Operator()]
        options: dict[str, Any] = {"mode": mode, "config": QUICK}
        if mode == "split":
            options |= {"second": operators[1].transport, "allow_same_operator": True}
        async with Client(operators[0].transport, device(), **options) as own:
            await own.infer(inputs)
        # The deadline's digits may differ by one; nothing else may.
        sizes.append([[len(body) // 16 for body in operator.bodies] for operator in operators])
    assert sizes[0] == sizes[1] == sizes[2]


@asynchronous
async def test_the_order_of_rows_is_random() -> None:
    """One known input among others: in which row of its share it stands."""
    inputs = np.concatenate([np.full((1, 1, 2, 3), 255, np.uint8), raw_inputs(GROUP - 1)])
    places = set()
    stem = device().stem(device().preprocess(inputs))
    for _ in range(40):
        noise: dict[bytes, Array] = {}
        first, second = Operator(), Operator()
        async with client(first, second) as own:
            await own.infer(inputs)
        for request in second.requests:
            if request.block == 0:
                rows = expand_rows(request.features, SHAPES[0][0])
                noise |= {row.tobytes(): row for row in rows}
        (sent,) = [request.features for request in first.requests if request.block == 0]
        off = [
            min(np.abs(row - 100 * one - stem[0]).max() for one in noise.values()) for row in sent
        ]
        places.add(int(np.argmin(off)))
    assert places == set(range(GROUP))


# --- nothing is used twice ----------------------------------------------------------------------


def test_a_fork_does_not_use_its_parents_masks() -> None:
    async def run() -> None:
        pool = MaskPool(_honest, make_manifest().blocks, GROUP, 2)
        await pool.fill()
        assert len(pool) >= 2
        pool._process = os.getpid() + 1  # as a child of the process that filled it would find it
        assert len(pool) == 0

    async def _honest(block: int, seeds: Array) -> Array:
        return compute(block, expand_rows(seeds, SHAPES[block][0]))

    asyncio.run(run())


def test_a_pool_of_nothing_is_refused() -> None:
    async def never(block: int, seeds: Array) -> Array:
        raise AssertionError

    with pytest.raises(ConfigError, match="depth"):
        MaskPool(never, make_manifest().blocks, GROUP, 0)


def test_the_mode_split_says_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed", lambda module: module != "cryptography")
    with pytest.raises(ConfigError, match=r"cryptography is not .*datamix-cluster\[split\]"):
        client(Operator(), Operator())
    Client(Operator().transport, device())  # other modes do without


@asynchronous
async def test_seeds_are_wiped_once_the_masks_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Array] = []
    real = masks_module.draw_seeds

    def keep(count: int) -> Array:
        drawn.append(real(count))
        return drawn[-1]

    monkeypatch.setattr(masks_module, "draw_seeds", keep)
    async with client(Operator(), Operator()) as own:
        await own.infer(raw_inputs(GROUP))
    assert drawn and not any(seeds.any() for seeds in drawn)


# --- ledger and cache ---------------------------------------------------------------------------


@asynchronous
async def test_bits_are_charged_before_anything_leaves_and_a_spent_budget_sends_nothing(
    tmp_path: Path,
) -> None:
    first, second = Operator(), Operator()
    bits = client(first, second).promise.bits_per_input
    with Ledger(tmp_path / "ledger", budget_bits=bits * 9) as ledger:
        async with client(first, second, ledger=ledger, source="door") as own:
            await own.infer(raw_inputs(5))  # five inputs and decoys, which cost nothing
            sent = len(first.requests)
            with pytest.raises(BudgetSpent, match="door"):
                await own.infer(raw_inputs(5))
            assert len(first.requests) == sent
            await own.infer(raw_inputs(3))
        (row,) = ledger.report()
        assert (row.inputs, row.mode) == (8, "split")
        assert row.bits == pytest.approx(8 * bits)


@asynchronous
async def test_a_repeated_input_is_answered_by_the_cache_and_not_sent(tmp_path: Path) -> None:
    operator, inputs = Operator(), raw_inputs(GROUP)
    cache = AnswerCache(tmp_path / "cache", device().manifest, mode="bounded")
    options: dict[str, Any] = {"mode": "bounded", "config": QUICK, "cache": cache}
    with cache:
        async with Client(operator.transport, device(), **options) as own:
            twice = await own.infer(np.concatenate([inputs, inputs]))
            assert np.array_equal(twice[:GROUP], twice[GROUP:])
            assert len(operator.requests) == len(SHAPES)
            assert np.array_equal(await own.infer(inputs[::-1]), twice[:GROUP][::-1])
            assert len(operator.requests) == len(SHAPES)


# --- who runs them ------------------------------------------------------------------------------


def _end(name: str, address: str = "192.0.2.1", certificate: bytes = b"") -> Endpoint:
    return Endpoint(name, frozenset({address}), certificate)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (_end("", "192.0.2.1"), _end("", "192.0.2.2"), "neither end"),
        (_end("acme", "192.0.2.1"), _end("", "192.0.2.2"), "only one end"),
        (_end("acme", "192.0.2.1"), _end("acme", "192.0.2.2"), "'acme'"),
        (_end("acme"), _end("other"), "address 192.0.2.1"),
        (_end("acme", "a", b"der"), _end("other", "b", b"der"), "same certificate"),
    ],
)
def test_one_operator_at_both_ends_is_refused(
    first: Endpoint, second: Endpoint, reason: str
) -> None:
    found = same_operator(first, second)
    assert found is not None and reason in found
    with pytest.raises(ConfigError, match="--allow-same-operator, which is not private"):
        check_operators(first, second, allow_same=False)
    assert check_operators(first, second, allow_same=True) == found


def test_two_operators_are_let_through() -> None:
    pair = _end("acme", "192.0.2.1", b"a"), _end("other", "192.0.2.2", b"b")
    assert check_operators(*pair, allow_same=False) is None
