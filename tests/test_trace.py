"""Linearity and reach, read off the operations, against numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datamix.models import Architecture, build, is_linear
from datamix.models.layers import Residual, ScaleNorm
from datamix.models.memory import peak_values
from datamix.models.trace import on_meta, output_shape, trace

SHAPE = (4, 24, 24)


class Functional(nn.Module):
    """A module of which only the operations tell what it does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.factor = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "relu":
                return torch.relu(x)
            case "square":
                return x * x
            case "gate":
                return x * x.mean((2, 3), keepdim=True)
            case "offset":
                return x + self.factor
            case "one":
                return x + 1
            case "inverse":
                return self.factor / (x + x)
            case "constant":
                return self.factor * 2
            case "branch":
                return x if float(x.sum()) > 0 else -x
            case "round":
                return x.to(torch.int32).float()
            case "pad":
                return nn.functional.pad(x, [1, 1], value=3.0)
            case "twice":
                return x + 2 * x
            case "scaled":
                return (self.factor * x - x) / self.factor
            case "inplace":
                y = x.clone()
                y += x
                return y.mul_(3)
            case "matrix":
                return x.flatten(2) @ torch.ones(24 * 24, 3, device=x.device, dtype=x.dtype)
            case "shift":
                return nn.functional.pad(x[..., 1:], [0, 1])
            case "channels":
                return torch.cat([x, -x, nn.functional.avg_pool2d(x, 3, 1, 1)], 1)
        raise AssertionError(self.what)


conv = partial(nn.Conv2d, bias=False)


@pytest.mark.parametrize(
    "part",
    [
        conv(4, 5, 3),
        nn.Linear(24, 2, bias=False),
        nn.Sequential(nn.Flatten(), nn.Linear(2304, 3, bias=False)),
        nn.Sequential(nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Unflatten(1, (4, 1))),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2), nn.ChannelShuffle(4)),
        nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
        nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(3, 2), nn.AdaptiveAvgPool2d((3, 2))),
        Residual(conv(4, 4, 3, padding=1), ScaleNorm(4)),
        *map(Functional, ("twice", "scaled", "inplace", "matrix", "shift", "channels")),
    ],
    ids=repr,
)
def test_linear(part: nn.Module) -> None:
    assert trace(part, SHAPE).problem is None
    assert is_linear(part, SHAPE)
    assert is_linear(on_meta(part), SHAPE)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (nn.Conv2d(4, 5, 3), "convolution with a bias is not linear in layer"),
        (nn.Sequential(nn.BatchNorm2d(4)), "native_batch_norm is not linear in layer '0' (Batch"),
        (nn.Sequential(nn.Identity(), nn.Sequential(nn.Softmax(1))), "layer '1.0' (Softmax)"),
        (nn.Sequential(nn.MaxPool2d(2)), "layer '0' (MaxPool2d)"),
        (nn.Linear(24, 2), "addmm is not linear"),
        (nn.GroupNorm(2, 4), "native_group_norm is not linear"),
        (Functional("relu"), "relu is not linear"),
        (Functional("square"), "mul is not linear"),
        (Functional("gate"), "mul is not linear"),
        (Functional("offset"), "add is not linear"),
        (Functional("one"), "add is not linear"),
        (Functional("inverse"), "div is not linear"),
        (Functional("constant"), "the output does not depend on the input"),
        (Functional("branch"), "_local_scalar_dense is not linear"),
        (Functional("round"), "_to_copy to torch.int32 is not linear"),
        (Functional("pad"), "padding with 3.0 is not linear"),
    ],
    ids=repr,
)
def test_not_linear(part: nn.Module, problem: str) -> None:
    found = trace(part, SHAPE)
    assert found.problem is not None and found.reach is None
    assert problem.removesuffix(" in layer") in found.problem
    assert not is_linear(part, SHAPE)


def test_training_statistics_do_not_matter() -> None:
    part = nn.Sequential(conv(4, 4, 3), ScaleNorm(4), nn.Dropout()).train()
    assert is_linear(part, SHAPE)
    assert part.training and part[1].training


# --- reach ----------------------------------------------------------------------------------------

LAYERS = st.one_of(
    st.builds(
        lambda k, s, p, d: conv(1, 1, k, stride=s, padding=p, dilation=d),
        *(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    ),
    st.builds(nn.AvgPool2d, st.integers(1, 3), st.integers(1, 2)),
    st.builds(lambda k: Residual(conv(1, 1, 2 * k + 1, padding=k)), st.integers(0, 2)),
    st.just(nn.ZeroPad2d((1, 0, 2, 1))),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(LAYERS, min_size=1, max_size=4))
def test_the_reach_is_what_a_gradient_sees(layers: list[nn.Module]) -> None:
    part = nn.Sequential(*layers).double()
    for parameter in part.parameters():
        nn.init.constant_(parameter, 1.0)
    size = 64
    inputs = torch.zeros(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    outputs = part(inputs)
    found = trace(part, (1, size, size)).reach
    assert found is not None
    for axis in (0, 1):
        middle = outputs.shape[2 + axis] // 2
        place = [outputs.shape[2] // 2, outputs.shape[3] // 2]
        (gradient,) = torch.autograd.grad(
            outputs[0, 0, place[0], place[1]], inputs, retain_graph=True
        )
        seen = gradient[0, 0].abs().sum(1 - axis).nonzero().flatten()
        start = middle * found.step[axis]
        assert int(seen.min()) == start + found.low[axis]
        assert int(seen.max()) == start + found.high[axis]
        # A stride wider than the windows after it leaves holes, but none outside.
        assert found.kernel[axis] == found.high[axis] - found.low[axis] + 1


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_reach_of_convnet_is_known(depth: int) -> None:
    block = build(Architecture("convnet", {"depth": depth})).blocks[0]
    found = trace(block, (16, 14, 14)).reach
    assert found is not None
    # Each 3x3 after the entry is two of the output's places more, two of the input's each.
    assert found.kernel == (3 + 8 * depth, 3 + 8 * depth)


@pytest.mark.parametrize(
    "part",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
        Functional("shift"),
    ],
    ids=repr,
)
def test_what_is_no_convolution_has_no_reach(part: nn.Module) -> None:
    found = trace(part, SHAPE)
    assert found.problem is None and found.reach is None


# --- shapes and memory ----------------------------------------------------------------------------


def test_a_meta_copy_leaves_the_part_alone() -> None:
    part = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).train()
    copy = on_meta(part)
    assert all(tensor.is_meta for tensor in copy.state_dict().values())
    assert not any(tensor.is_meta for tensor in part.state_dict().values())
    assert part.training and not copy.training
    assert output_shape(part, SHAPE) == (5, 22, 22)


def test_the_peak_is_what_is_alive_at_once() -> None:
    values = 4 * 24 * 24
    assert peak_values(nn.Identity(), SHAPE) == values
    assert peak_values(nn.ReLU(), SHAPE) == 2 * values
    assert peak_values(nn.ReLU(inplace=True), SHAPE) == values
    # The chain's own input, a layer's input and its output.
    assert peak_values(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), SHAPE) == 3 * values
    wide = nn.Sequential(conv(4, 40, 1), conv(40, 4, 1))
    assert peak_values(wide, SHAPE) == values + 10 * values + values
    assert peak_values(nn.Flatten(), SHAPE) == values  # a view
