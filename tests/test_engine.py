"""The null engine, and what the settings of an engine may say."""

from __future__ import annotations

import numpy as np
import pytest

from datamix import wire
from datamix.errors import ConfigError
from deployments.engine import Block, EchoEngine, EngineText, check_device, parse_engine
from tests.rows import requests, shapes

SHAPE = (3, 8, 8)

# --- EchoEngine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_echo_returns_each_request_its_rows(dtype: wire.Dtype) -> None:
    asked = requests(SHAPE, dtype)
    for output, request in zip(EchoEngine([SHAPE]).run(0, asked), asked, strict=True):
        assert output.dtype == ("float16" if dtype == "float16" else "float32")
        np.testing.assert_array_equal(output, wire.dequantise(*request))


def test_a_batch_of_nothing_has_no_outputs() -> None:
    assert list(EchoEngine([SHAPE]).run(0, [])) == []


def test_echo_keeps_the_shapes_of_its_blocks_apart() -> None:
    echo = EchoEngine([(2, 3, 3), (4, 1, 1)])
    assert echo.blocks == [
        Block((2, 3, 3), (2, 3, 3), linear=True),
        Block((4, 1, 1), (4, 1, 1), linear=True),
    ]
    assert shapes(echo.run(1, requests((4, 1, 1)))) == [(1, 4, 1, 1), (4, 4, 1, 1), (2, 4, 1, 1)]


def test_the_null_engine_is_done_at_once_and_hands_float_rows_on() -> None:
    echo = EchoEngine([SHAPE])
    assert (echo.name, echo.depth) == ("null", 1)
    asked = requests(SHAPE, "float16")
    pending = echo.start(0, asked)
    assert pending.done()
    assert (pending.copied_bytes, pending.copy_s) == (0, 0.0)
    assert all(a is b.features for a, b in zip(pending.wait(), asked, strict=True))
    # int8 becomes float32: 7 rows of 192 values.
    assert echo.start(0, requests(SHAPE, "int8")).copied_bytes == 7 * 192 * 4


# --- check_device -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:-1", "cpu:0", "meta", "mps"])
def test_a_device_nobody_knows(device: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_device(device)
    assert str(raised.value) == f"engine device is {device!r}, expected cpu, cuda or cuda:N"


# --- parse_engine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("torch", EngineText("torch")),
        ("null", EngineText("null")),
        ("emulated:0.05,0.0005", EngineText("emulated", 0.05, 0.0005)),
        ("emulated:1e-3,0", EngineText("emulated", 0.001, 0.0)),
        ("emulated:some/h100.json", EngineText("emulated", profile="some/h100.json")),
    ],
)
def test_parse_engine(text: str, parsed: EngineText) -> None:
    assert parse_engine(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Torch",
        "torch:cuda",
        "null:",
        "null:1,2",
        "emulated",
        "emulated:",
        "emulated:1",
        "emulated:1,2,3",
        "emulated:a,b",
        "emulated:-1,0",
        "emulated:0,-0.1",
        "emulated:nan,0",
        "emulated:0,inf",
        "emulated:h100",
        "null:h100.json",
    ],
)
def test_parse_engine_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_engine(text)
    assert str(raised.value) == (
        f"engine is {text!r}, expected torch, null, emulated:a_s,b_s in seconds or "
        "emulated:PATH.json"
    )
