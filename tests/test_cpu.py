"""The processor's engine: a batch gives each request what it would have got alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from datamix import wire
from datamix.errors import ConfigError
from deployments.cpu import TorchEngine
from deployments.engine import Block, Rows
from tests.rows import SIZES, assert_close, requests, shapes

SHAPE = (3, 8, 8)
BLOCKS = [Block((3, 8, 8), (6, 4, 4)), Block((6, 4, 4), (5, 2, 2))]
MAX_ROWS = 16


def backbone() -> torch.nn.ModuleList:
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 2, 1), torch.nn.BatchNorm2d(6))
    second = torch.nn.Sequential(torch.nn.Conv2d(6, 5, 3, 2, 1), torch.nn.ReLU(inplace=True))
    return torch.nn.ModuleList([first, second])


def engine(**options: object) -> TorchEngine:
    return TorchEngine(backbone(), BLOCKS, max_batch_rows=MAX_ROWS, **options)  # type: ignore[arg-type]


# float32 sums in another order for another batch size; bfloat16 has 8 bits of mantissa, and the
# results of float16 requests are rounded to float16's 11.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("block", [0, 1])
def test_a_batch_gives_what_each_request_gets_alone(
    dtype: str, channels_last: bool, block: int
) -> None:
    runner = engine(dtype=dtype, channels_last=channels_last)
    asked = requests(BLOCKS[block].input_shape)
    together = runner.run(block, asked)
    assert shapes(together) == [(n, *BLOCKS[block].output_shape) for n in SIZES]
    alone = [output for request in asked for output in runner.run(block, [request])]
    assert_close(together, alone, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_engine_computes_the_backbone(dtype: str, channels_last: bool) -> None:
    asked = requests(SHAPE)
    with torch.inference_mode():
        reference = backbone().eval()[0]
        expected = [reference(torch.from_numpy(request.features)).numpy() for request in asked]
    outputs = engine(dtype=dtype, channels_last=channels_last).run(0, asked)
    assert_close(outputs, expected, TOLERANCE[dtype])
    assert all(output.flags.c_contiguous for output in outputs)


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_every_value_type_of_the_wire_is_understood(dtype: wire.Dtype) -> None:
    runner = engine()
    asked = requests(SHAPE, dtype)
    plain = [Rows(wire.dequantise(*request), None) for request in asked]
    outputs = runner.run(0, asked)
    assert {output.dtype.name for output in outputs} == {
        "float16" if dtype == "float16" else "float32"
    }
    tolerance = TOLERANCE["float16"] if dtype == "float16" else 0.0
    assert_close(outputs, runner.run(0, plain), tolerance)


def test_value_types_may_share_a_batch() -> None:
    runner = engine()
    asked = [requests(SHAPE, dtype, (2,))[0] for dtype in wire.DTYPES]
    alone = [output for request in asked for output in runner.run(0, [request])]
    assert_close(runner.run(0, asked), alone, TOLERANCE["float16"])


def test_rows_are_read_from_views_of_a_message() -> None:
    """Decoded features are read-only, and the engine neither minds nor writes to them."""
    message = wire.encode_request(np.full((2, *SHAPE), 0.5), request_id="a")
    request = wire.decode_request(message)
    assert not request.features.flags.writeable
    before = bytes(message)
    (output,) = engine().run(0, [Rows(request.features, request.scale)])
    assert np.isfinite(output).all()
    assert message == before


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def one_module(module: torch.nn.Module, block: Block) -> TorchEngine:
    return TorchEngine(torch.nn.ModuleList([module]), [block], max_batch_rows=MAX_ROWS)


def test_rows_come_back_in_their_order() -> None:
    runner = one_module(Double(), Block((1, 1, 1), (1, 1, 1)))
    numbers = np.arange(MAX_ROWS, dtype=np.float32).reshape(-1, 1, 1, 1)
    parts = np.split(numbers, [1, 5, 6, 12])
    outputs = runner.run(0, [Rows(part, None) for part in parts])
    for output, part in zip(outputs, parts, strict=True):
        np.testing.assert_array_equal(output, 2 * part)


class FirstChannel(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


@pytest.mark.parametrize(
    ("module", "channels"),
    [(torch.nn.Identity(), 3), (torch.nn.ReLU(inplace=True), 3), (FirstChannel(), 1)],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_result_outlives_the_next_batch(
    module: torch.nn.Module, channels: int, dtype: wire.Dtype, rows: int
) -> None:
    """Responses are written while the next batch is already computed."""
    runner = one_module(module, Block(SHAPE, (channels, 8, 8)))
    (ones,) = runner.run(0, [Rows(np.ones((rows, *SHAPE), dtype), None)])
    runner.run(0, [Rows(np.full((rows, *SHAPE), 7, dtype), None)])
    np.testing.assert_array_equal(ones, 1)


def test_batch_norm_runs_in_evaluation_mode() -> None:
    modules = backbone().train()
    runner = TorchEngine(modules, BLOCKS, max_batch_rows=MAX_ROWS)
    before = copy.deepcopy(modules.state_dict())
    runner.run(0, requests(SHAPE))
    for name, tensor in modules.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_buffer_holds_the_largest_batch_of_the_largest_block() -> None:
    runner = engine()
    for index, block in enumerate(BLOCKS):
        rows = np.zeros((MAX_ROWS, *block.input_shape), np.float32)
        assert shapes(runner.run(index, [Rows(rows, None)])) == [(MAX_ROWS, *block.output_shape)]


def test_threads_are_set_only_where_asked() -> None:
    before = torch.get_num_threads()
    try:
        engine()
        assert torch.get_num_threads() == before
        engine(threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_an_engine_is_named_by_device_and_dtype() -> None:
    assert engine(dtype="bfloat16").name == "torch:cpu:bfloat16"


@pytest.mark.parametrize("dtype", ["float16", "int8", "", "float64"])
def test_unknown_dtype(dtype: str) -> None:
    with pytest.raises(ConfigError) as raised:
        engine(dtype=dtype)
    assert str(raised.value) == f"engine dtype is {dtype!r}, expected float32 or bfloat16"


@pytest.mark.parametrize(("device", "found"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there(
    device: str, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ConfigError) as raised:
        engine(device=device)
    assert str(raised.value) == (
        f"engine device is {device!r}, but torch finds {found} CUDA devices here"
    )
