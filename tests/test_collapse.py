"""What a linear block costs at its cheapest, against brute force and against real gradients."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from datamix.models import Architecture, ScaleNorm, build, count_flops
from datamix.models.collapse import Step, layers_of, least_flops
from datamix.models.layers import Residual, conv3x3
from datamix.models.trace import Reach, trace


def receptive_field(block: nn.Module) -> int:
    """Side of the square of inputs that one output in the middle depends on."""
    with torch.no_grad():
        for part in block.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.fill_(1.0)
    inputs = torch.zeros(1, 1, 192, 192, requires_grad=True)
    output = block.eval()(inputs)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    assert inputs.grad is not None
    rows = inputs.grad[0, 0].abs().sum(1).nonzero().flatten()
    return int(rows.max() - rows.min()) + 1


@settings(max_examples=20, deadline=None)
@given(strides=st.lists(st.integers(1, 2), min_size=1, max_size=4), residual=st.booleans())
def test_a_reach_is_the_receptive_field(strides: list[int], residual: bool) -> None:
    layers: list[nn.Module] = []
    for stride in strides:
        layers += [conv3x3(1, 1, stride), ScaleNorm(1)]
    if residual:
        layers.append(Residual(conv3x3(1, 1), ScaleNorm(1), conv3x3(1, 1)))
    block = nn.Sequential(*layers)
    found = trace(block, (1, 192, 192)).reach
    assert found is not None
    side, stride = receptive_field(block), math.prod(strides)
    assert found.kernel == (side, side)
    assert found.step == (stride, stride)


def test_layers_are_those_of_chains_whose_order_is_known() -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in reversed(list(self)):
                x = part(x)
            return x

    inner, odd, residual = conv3x3(1, 1), Backwards(nn.ReLU()), Residual(conv3x3(1, 1))
    chain = nn.Sequential(nn.Sequential(inner, nn.Sequential(odd)), residual)
    assert layers_of(chain) == [inner, odd, residual]
    assert layers_of(residual) == [residual]


def reach(kernel: int, stride: int) -> Reach:
    """Of a square convolution without padding."""
    return Reach((stride, stride), high=(kernel - 1, kernel - 1))


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


@given(st.data())
def test_the_least_cost_is_that_of_the_best_way_to_part_the_chain(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5))
    shapes = [data.draw(SHAPES) for _ in range(n + 1)]
    steps = [
        Step(
            data.draw(st.integers(0, 3000)),
            data.draw(st.none() | st.builds(reach, st.integers(1, 5), st.integers(1, 2))),
            shapes[i],
            shapes[i + 1],
        )
        for i in range(n)
    ]

    def cost(start: int, end: int) -> int:
        inside = steps[start:end]
        outputs = math.prod(shapes[end])
        ways = [sum(step.flops for step in inside), 2 * math.prod(shapes[start]) * outputs]
        reaches = [step.reach for step in inside]
        known = [one for one in reaches if one is not None]
        if len(known) == len(reaches):
            kernel, stride = 1, 1
            for one in known:
                kernel, stride = kernel + (one.kernel[0] - 1) * stride, stride * one.step[0]
            ways.append(2 * kernel**2 * shapes[start][0] * outputs)
        return min(ways)

    best = min(
        sum(itertools.starmap(cost, itertools.pairwise((0, *cuts, n))))
        for size in range(n)
        for cuts in itertools.combinations(range(1, n), size)
    )
    assert least_flops(steps) == best
    assert least_flops(steps) <= sum(step.flops for step in steps)


def test_one_round_of_three_convolutions_is_cheaper_collapsed() -> None:
    options: dict[str, int | str] = {"rounds": 1, "stem_width": 16, "widths": "64,96,128"}
    with torch.device("meta"):
        model = build(Architecture("bridgenet", options))
    flops = count_flops(model)
    # 16x14x14 -> 64x7x7 -> 96x7x7 -> 128x4x4.
    first = 2 * 9 * 16 * 64 * 49
    second = 2 * 9 * 64 * 96 * 49
    third = 2 * 9 * 96 * 128 * 16
    assert flops.blocks == (first + second + third,)
    # Its first convolution as it is, the other two as one of 5x5 with stride 2.
    joined = first + 2 * 25 * 64 * 128 * 16
    assert flops.collapsed_blocks == (joined,)
    assert joined < sum(flops.blocks)
    assert flops.edge_share_collapsed > flops.edge_share
