"""Anybody's Sequential, split: the same function, or exactly linear blocks; and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datamix.errors import ConfigError
from datamix.models import ScaleNorm, SplitModel, Whiten, block_shapes, count_flops, split_model
from tests.test_fuse import count, scattered
from tests.test_networks import mixed

INPUT = (3, 12, 12)


def network() -> nn.Sequential:
    """Twelve layers, trained as far as its norms know."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(), nn.GELU()),
        *(nn.Flatten(), nn.Linear(72, 5)),
    )
    scattered(module)
    return module


def split(cuts: list[int], **options: Any) -> SplitModel:
    return split_model(network(), cuts, input_shape=INPUT, classes=5, **options).eval()


def inputs_for(rows: int) -> Tensor:
    return torch.randn(rows, *INPUT, generator=torch.Generator().manual_seed(1))


ASCENDING = (
    st.integers(1, 3)
    .flatmap(lambda n: st.lists(st.integers(1, 10), min_size=2 * n, max_size=2 * n))
    .map(sorted)
    # A block holds a layer; a bridge may be empty.
    .filter(lambda cuts: all(a < b for a, b in zip(cuts[::2], cuts[1::2], strict=True)))
)


@settings(deadline=None, max_examples=30)
@given(cuts=ASCENDING)
def test_a_split_network_computes_what_it_did(cuts: list[int]) -> None:
    model = split(cuts)
    assert len(model.blocks) == len(cuts) // 2 == len(model.bridges) + 1
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs_for(2)), network()(inputs_for(2)))


def test_the_parts_are_where_the_cuts_say() -> None:
    module = network()
    model = split_model(module, [3, 6, 7, 10], input_shape=INPUT, classes=5)
    parts = (model.stem, model.blocks[0], model.bridges[0], model.blocks[1], model.head)
    layers = [list(part.children()) for part in parts]
    assert layers == [list(module)[a:b] for a, b in ((0, 3), (3, 6), (6, 7), (7, 10), (10, 12))]
    assert block_shapes(model) == [((6, 12, 12), (8, 6, 6)), ((8, 3, 3), (8, 3, 3))]
    assert not model.linear
    assert model.edge_head()(model.stem(inputs_for(2))).shape == (2, 5)


def test_linearity_is_found_and_not_declared() -> None:
    assert not split([3, 4]).linear  # its convolution has a bias
    layers = [nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.AvgPool2d(2), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(100, 5))
    model = split_model(module, [1, 3], input_shape=INPUT, classes=5)
    assert model.linear and next(model.blocks[0].children()) is layers[1]


@settings(deadline=None, max_examples=25)
@given(cuts=ASCENDING, k=st.sampled_from([2, 4, 8, 32]), seed=st.integers(0, 2**32 - 1))
def test_linear_blocks_de_mix_exactly(cuts: list[int], k: int, seed: int) -> None:
    model = split(cuts, linear=True)
    scattered(model)
    assert model.linear
    assert None not in count_flops(model).collapsed_blocks
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((k, k)))
    a = torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))
    with torch.inference_mode():
        expected = model(inputs_for(k))
        torch.testing.assert_close(mixed(model, inputs_for(k), a), expected, rtol=1e-4, atol=1e-4)


def test_what_the_device_gets_for_a_linear_block() -> None:
    model = split([3, 7, 7, 10], linear=True)
    kinds = [[type(layer) for layer in part.modules()][1:] for part in (model.stem, *model.bridges)]
    whiten = [Whiten, nn.BatchNorm2d, nn.Hardtanh]
    assert kinds[0] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, *whiten]
    assert kinds[1] == [nn.Sequential, nn.BatchNorm2d, nn.ReLU, *whiten]
    assert [type(layer) for layer in model.head.modules()][2:4] == [nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in model.blocks[0].children()] == [
        nn.Conv2d,
        ScaleNorm,
        nn.AvgPool2d,
    ]
    assert [type(layer) for layer in model.blocks[1].children()] == [nn.Conv2d]


def test_weights_of_a_linear_copy_are_copies_of_the_trained_ones() -> None:
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = split_model(module, [3, 7], input_shape=INPUT, classes=5, linear=True)
    block: Any = model.blocks[0]
    convolution, norm = block[0], block[1]
    assert convolution.bias is None
    assert torch.equal(convolution.weight, before["3.weight"])
    assert torch.equal(norm.gain, before["4.weight"])
    assert torch.equal(norm.square, before["4.running_var"] + before["4.running_mean"] ** 2)
    torch.nn.init.zeros_(convolution.weight)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_bridge_of_ones_own() -> None:
    def bridge(channels: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.Tanh())

    plain = split([3, 6, 6, 10], bridge=bridge)
    assert [type(layer) for layer in plain.bridges[0].modules()][2:] == [nn.BatchNorm2d, nn.Tanh]
    linear = split([3, 6, 7, 10], linear=True, bridge=bridge)
    assert [type(layer) for layer in linear.bridges[0].children()] == [
        nn.Sequential,
        nn.MaxPool2d,
        Whiten,
    ]
    assert count(linear.bridges[0], nn.Tanh) == 1
    assert linear(inputs_for(2)).shape == (2, 5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(rows, rows, rows)
        return mixed.transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.Softmax(1), r"block 1 cannot be made linear: _softmax is not linear in layer '1' \(So"),
        (nn.Sigmoid(), r"block 1 cannot be made linear: sigmoid is not linear in layer '1'"),
        (nn.GroupNorm(2, 8), r"native_group_norm is not linear in layer '1' \(GroupNorm\)"),
        (nn.LocalResponseNorm(2), r"block 1 cannot be made linear: \w+ is not linear in layer '1'"),
        (nn.MaxPool2d(2, 1, 1, dilation=2), r"max_pool2d_with_indices is not linear in layer '1'"),
        (Hidden(), r"relu is not linear in layer '1' \(Hidden\), expected sums and products"),
        (Attention(), r"block 1 cannot be made linear: .* is not linear in layer '1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_made_linear(layer: nn.Module, sentence: str) -> None:
    layers = list(network())
    layers.insert(8, layer)
    with pytest.raises(ConfigError, match=sentence):
        split_model(
            nn.Sequential(*layers), [3, 6, 7, 11], input_shape=INPUT, classes=5, linear=True
        )


@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ([], "got 0 cuts, expected an even number of at least 2"),
        ([3], "got 1 cuts"),
        ([2, 4, 6], "got 3 cuts"),
        (
            [0, 4],
            r"cuts are \[0, 4\], expected ascending ones from 1 to 11 with layers in the stem",
        ),
        ([4, 4], r"cuts are \[4, 4\]"),
        ([6, 4], r"cuts are \[6, 4\]"),
        ([3, 12], r"cuts are \[3, 12\]"),
        ([3, 13], r"cuts are \[3, 13\]"),
        ([-2, 4], r"cuts are \[-2, 4\]"),
        ([3, 7, 6, 9], r"cuts are \[3, 7, 6, 9\]"),
        ([3, 11], r"block 0 gives rows of shape \(72,\), expected \(C, H, W\)"),
        ([11, 12], r"cuts are \[11, 12\]"),
    ],
)
def test_bad_cuts(cuts: list[int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        split(cuts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"input_shape": (1, 12, 12)}, r"the stem does not take inputs of shape \(1, 12, 12\): "),
        ({"input_shape": (3, 16, 16)}, r"the head does not take inputs of shape \(8, 8, 8\): "),
        ({"classes": 4}, r"the head's output has shape \(5,\), expected \(4,\)"),
    ],
)
def test_a_network_that_does_not_fit(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        split_model(network(), [3, 6], **{"input_shape": INPUT, "classes": 5, **options})
