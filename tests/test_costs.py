"""What a network costs, against arithmetic by hand; and how that is shown."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cluster.cli import app
from cluster.costs_cli import parse_option
from datamix import wire
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build, costs, count_flops, split_model
from datamix.models.costs import row_bytes

CONVNET = Architecture("convnet", {"n_blocks": 2})


def on_meta(architecture: Architecture) -> SplitModel:
    with torch.device("meta"):
        return build(architecture)


def test_every_part_has_its_line() -> None:
    found = costs(on_meta(CONVNET), group_size=4)
    names = ["stem", "block 0", "bridge 0", "block 1", "head"]
    assert [part.name for part in found.parts] == names
    assert [part.side for part in found.parts] == ["device", "cloud", "device", "cloud", "device"]
    assert [part.output_shape for part in found.parts] == [
        *((16, 14, 14), (64, 7, 7), (64, 7, 7), (64, 7, 7), (10,))
    ]
    block = found.parts[1]
    # Entry and a pair of convolutions without biases, the gains of four norms.
    assert block.parameters == 9 * (16 * 64 + 2 * 64 * 64) + 4 * 64
    assert block.flops == 2 * 9 * 49 * (16 * 64 + 2 * 64 * 64)
    assert block.output_values == 3136
    # At the pair's second convolution: the block's input, the pair's input, what comes in and out.
    assert block.peak_values >= 3136 + 3 * 3136
    assert found.parameters == sum(p.numel() for p in build(CONVNET).parameters())


@pytest.mark.parametrize(
    ("dtype", "up", "down"),
    [("float32", 4 * 3136, 4 * 3136), ("float16", 6272, 6272), ("int8", 3140, 3140)],
)
def test_bytes_on_the_wire(dtype: wire.Dtype, up: int, down: int) -> None:
    found = costs(on_meta(CONVNET), wire_dtype=dtype)
    assert [(one.bytes_up, one.bytes_down) for one in found.rounds] == [(up, down)] * 2
    assert (found.bytes_up, found.bytes_down) == (2 * up, 2 * down)


@pytest.mark.parametrize("dtype", wire.DTYPES)
def test_a_row_has_the_bytes_that_the_wire_carries(dtype: wire.Dtype) -> None:
    values, scale = wire.quantise(np.ones((3, 2, 5, 7), np.float32), dtype)
    assert 3 * row_bytes((2, 5, 7), dtype) == values.nbytes + (0 if scale is None else scale.nbytes)


@pytest.mark.parametrize(
    "architecture",
    [CONVNET, Architecture("resnet18", {"rounds": 3, "cloud": "linear", "width": 25})],
)
def test_the_totals_are_those_of_count_flops(architecture: Architecture) -> None:
    model = on_meta(architecture)
    found, flops = costs(model, group_size=8), count_flops(model, group_size=8)
    assert found.device_flops == flops.edge
    assert found.cloud_flops == flops.cloud
    assert found.device_share == flops.edge_share
    assert found.device_share_collapsed == flops.edge_share_collapsed
    assert found.mixing_flops == flops.mixing > 0


def linear(*layers: nn.Module, inputs: tuple[int, int, int]) -> int:
    """The collapsed FLOPs of a block of these layers, in the one way that costs says it."""
    stem, head = nn.Identity(), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    with torch.no_grad():
        classes = nn.Sequential(*layers)(torch.zeros(1, *inputs)).shape[1]
    module = nn.Sequential(stem, *layers, *head)
    model = split_model(module, [1, 1 + len(layers)], input_shape=inputs, classes=classes)
    (least,) = count_flops(model).collapsed_blocks
    assert least is not None
    return least


def conv(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)


def test_a_chain_is_collapsed_where_that_is_cheaper() -> None:
    shape = (4, 16, 16)
    wide = [conv(4, 64, 1), conv(64, 4, 3)]
    # Two layers by way of 64 channels are one 3x3 convolution from 4 to 4.
    assert linear(*wide, inputs=shape) == 2 * 9 * 4 * 4 * 256
    # Four of them are two of those; one 5x5 would be more than two 3x3.
    assert linear(*wide, conv(4, 64, 1), conv(64, 4, 3), inputs=shape) == 2 * 2 * 9 * 4 * 4 * 256
    # Each convolution alone is the cheapest there is.
    assert linear(conv(4, 4, 3), conv(4, 4, 3), inputs=shape) == 2 * 2 * 9 * 4 * 4 * 256
    # An average over two by two makes it one 4x4 convolution of a quarter of the places.
    pooled = linear(conv(4, 4, 3), nn.AvgPool2d(2), inputs=shape)
    assert pooled == 2 * 16 * 4 * 4 * 64 < 2 * 9 * 4 * 4 * 256
    # All of it averaged is one matrix: 1024 values to 4.
    assert linear(conv(4, 4, 3), nn.AdaptiveAvgPool2d(1), inputs=shape) == 2 * 1024 * 4


def test_an_inverted_residual_without_activations_is_one_small_convolution() -> None:
    with torch.device("meta"):
        options: dict[str, int | str] = {"cloud": "linear", "cut": 3, "rounds": 15}
        model = build(Architecture("mobilenetv2", options))
    flops = count_flops(model)
    assert all(
        least is not None and least <= cascade
        for cascade, least in zip(flops.blocks, flops.collapsed_blocks, strict=True)
    )
    # The second unit: 32 channels on 16x16 places, six times as many inside.
    assert flops.blocks[1] == 2 * 256 * (2 * 32 * 192 + 9 * 192)
    assert flops.collapsed_blocks[1] == 2 * 256 * 9 * 32 * 32
    assert flops.edge_share_collapsed > flops.edge_share


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"wire_dtype": "float8"}, "wire_dtype is 'float8', expected one of"),
        ({"group_size": -1}, "group_size is -1, expected at least 0"),
    ],
)
def test_bad_settings(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        costs(on_meta(CONVNET), **options)


# --- the command ----------------------------------------------------------------------------------

ARGUMENTS = ["costs", "--architecture", "resnet18", "--option", "cut=2", "--option", "rounds=3"]


def test_the_command_prints_a_table() -> None:
    done = CliRunner().invoke(app, ARGUMENTS)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split()[:4] == ["part", "side", "parameters", "FLOPs"]
    assert lines[1].split() == (
        ["stem", "device", "675,392", "574,947,328", "128x16x16", "32,768", "265,344"]
    )
    assert [line.split()[0] for line in lines[1:8]] == (
        ["stem", "block", "bridge", "block", "bridge", "block", "head"]
    )
    assert len({len(line) for line in lines[:8]}) == 1
    assert "all     131,072      66,560" in done.output
    assert "K = 8" in done.output


def test_the_command_prints_json() -> None:
    done = CliRunner().invoke(app, [*ARGUMENTS, "--json", "--wire-dtype", "int8"])
    found = json.loads(done.output)
    assert found["bytes_up"] == 32768 + 2 * 16384 + 12
    assert found["parts"][-1]["parameters"] == 5130
    assert found["wire_dtype"] == "int8" and len(found["rounds"]) == 3


@pytest.mark.parametrize(
    ("text", "pair"),
    [("cut=2", ("cut", 2)), ("cloud=linear", ("cloud", "linear")), ("a=b=c", ("a", "b=c")),
     ("widths=8,16", ("widths", "8,16")), ("cut=-1", ("cut", "-1"))],
)  # fmt: skip
def test_options(text: str, pair: tuple[str, int | str]) -> None:
    assert parse_option(text) == pair


@pytest.mark.parametrize("text", ["cut", "=2", ""])
def test_bad_options(text: str) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_option(text)
