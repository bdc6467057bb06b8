"""The compact network: linear where the cloud computes, however its sections are dealt out."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, block_shapes, build, count_flops
from datamix.models.layers import PReLU

TINY: dict[str, Any] = {"stem_width": 4, "widths": "6,8,8", "strides": "2,1,2", "stem_units": 1}


def tiny(**options: Any) -> SplitModel:
    torch.manual_seed(0)
    model = build(Architecture("bridgenet", {**TINY, **options}))
    model(torch.randn(64, *model.input_shape))  # norms learn some statistics
    return model.eval()


def mixed(model: SplitModel, inputs: Tensor, matrix: Tensor) -> Tensor:
    features = model.stem(inputs)
    for index, block in enumerate(model.blocks):
        if index:
            features = model.bridges[index - 1](features)
        mixtures = torch.einsum("ij,jchw->ichw", matrix, features)
        features = torch.einsum("ij,jchw->ichw", torch.linalg.inv(matrix), block(mixtures))
    logits: Tensor = model.head(features)
    return logits


@settings(deadline=None, max_examples=20)
@given(
    rounds=st.integers(1, 3), depth=st.integers(1, 2), group=st.sampled_from([2, 4, 8, 32]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_blocks_commute_with_any_mixing(
    rounds: int, depth: int, group: int, seed: int
) -> None:
    model = tiny(rounds=rounds, depth=depth)
    chance = np.random.default_rng(seed)
    matrix = np.linalg.qr(chance.standard_normal((group, group)))[0].astype(np.float32)
    inputs = torch.from_numpy(chance.standard_normal((group, 1, 28, 28)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(
            mixed(model, inputs, torch.from_numpy(matrix)), model(inputs), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("cloud", ["relu", "prelu"])
def test_other_clouds_do_not(cloud: str) -> None:
    model, inputs = tiny(cloud=cloud, depth=2), torch.randn(4, 1, 28, 28)
    matrix = torch.linalg.qr(torch.randn(4, 4))[0]
    for slope in (part.slope for part in model.modules() if isinstance(part, PReLU)):
        torch.nn.init.constant_(slope, 0.2)
    assert not model.linear
    with torch.no_grad():
        assert float((mixed(model, inputs, matrix) - model(inputs)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("rounds", "blocks"),
    [
        (1, [((4, 14, 14), (8, 4, 4))]),
        (2, [((4, 14, 14), (8, 7, 7)), ((8, 7, 7), (8, 4, 4))]),
        (3, [((4, 14, 14), (6, 7, 7)), ((6, 7, 7), (8, 7, 7)), ((8, 7, 7), (8, 4, 4))]),
    ],
)
def test_sections_are_dealt_out_to_rounds(rounds: int, blocks: list[Any]) -> None:
    assert block_shapes(tiny(rounds=rounds)) == blocks


def test_one_linear_round_needs_no_layers_between_its_convolutions() -> None:
    (block,) = tiny(rounds=1).blocks
    assert [type(layer).__name__ for layer in block.children()] == ["Conv2d"] * 3


def test_the_default_keeps_a_fifth_of_the_work_on_the_device() -> None:
    flops = count_flops(build(Architecture("bridgenet", {"neck": 96})), group_size=8)
    assert flops.edge_share < 0.2
    assert flops.edge_share_collapsed < 0.2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rounds": 4}, "rounds is 4, expected 1 to 3"),
        ({"strides": "2,1"}, "3 widths and 2 strides"),
        ({"widths": "8,x"}, "widths is '8,x', expected integers from 1 to 4096"),
        ({"input": "28,28"}, "expected C,H,W"),
        ({"cloud": "tanh"}, "cloud is 'tanh', expected one of"),
        ({"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny(**options)


def test_a_projection_says_how_much_leaves() -> None:
    shapes = [block_shapes(tiny(rounds=1, sent_width=width))[0][0] for width in (0, 2)]
    assert shapes == [(4, 14, 14), (2, 14, 14)]
    model = tiny(rounds=1, sent_width=2).train()  # so that norms go by this very batch
    with torch.no_grad():
        features = model.stem(torch.randn(64, *model.input_shape))
    assert float(features.abs().max()) <= 4
    assert 0.9 < float(features.square().mean()) <= 1  # after the projection, too
    assert model.edge_head()(features).shape == (64, 10)


def test_any_head_and_input() -> None:
    for options in ({"neck": 4}, {"hidden": 8}, {"neck": 4, "hidden": 8}, {"input": "1,40,61"}):
        model = tiny(**options)
        assert model(torch.zeros(2, *model.input_shape)).shape == (2, 10)
        assert model.edge_head()(model.stem(torch.zeros(2, *model.input_shape))).shape == (2, 10)
