"""Folded norms give the same function, and nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from datamix.models import Architecture, ScaleNorm, build
from datamix.models.convnet import LinearBlock
from datamix.models.resnet import BasicBlock
from deployments.fuse import Factor, fuse


def scattered(module: nn.Module) -> nn.Module:
    """The module with norms that do something: statistics and gains as after training."""
    generator = torch.Generator().manual_seed(3)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.uniform_(low, high, generator=generator)

    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            draw(part.running_mean, -0.5, 0.5)
            draw(part.running_var, 0.5, 2.0)
            if part.affine:
                draw(part.weight, 0.5, 1.5)
                draw(part.bias, -0.5, 0.5)
        elif isinstance(part, ScaleNorm):
            draw(part.square, 0.5, 2.0)
            draw(part.gain, 0.5, 1.5)
    return module.eval()


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(part, kind) for part in module.modules())


@pytest.mark.parametrize(
    ("module", "channels"),
    [
        (nn.Sequential(nn.Conv2d(3, 5, 3, bias=True), nn.BatchNorm2d(5)), 3),
        (nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()), 3),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), 3),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), ScaleNorm(4), nn.BatchNorm2d(4)), 4),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), ScaleNorm(5))), 3),
        (LinearBlock(3, 8, 2, 2), 3),
        (BasicBlock(3, 6, 2), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_function_stays_the_same(module: nn.Module, channels: int) -> None:
    torch.manual_seed(0)
    module = scattered(copy.deepcopy(module))
    fused = fuse(module)
    assert count(fused, nn.BatchNorm2d) == count(fused, ScaleNorm) == 0
    x = torch.randn(4, channels, 8, 8)
    torch.testing.assert_close(fused(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"cut": 1}, {"cut": 3}, {"image_size": 224, "cut": 2}])
def test_every_norm_of_resnet_is_folded(options: dict[str, int | str]) -> None:
    with torch.device("meta"):
        block = build(Architecture("resnet18", options)).blocks[0]
    assert count(block, nn.BatchNorm2d) > 0
    assert count(fuse(block), nn.BatchNorm2d) == 0


def test_what_is_given_is_not_changed() -> None:
    module = scattered(LinearBlock(3, 8, 2, 1))
    before = copy.deepcopy(module.state_dict())
    fuse(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_norm_without_a_convolution_before_it_becomes_a_factor() -> None:
    module = scattered(nn.Sequential(nn.ReLU(), ScaleNorm(3), nn.BatchNorm2d(3)))
    fused = fuse(module)
    assert [type(part) for part in fused.children()] == [nn.ReLU, Factor, nn.BatchNorm2d]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fused(x), module(x))


def test_a_convolution_in_two_places_keeps_its_weights() -> None:
    shared = nn.Conv2d(3, 3, 1)
    module = scattered(nn.Sequential(shared, nn.BatchNorm2d(3), shared))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fuse(module)(x), module(x))


def test_a_chain_with_a_forward_of_its_own_is_left_alone() -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in reversed(list(self)):
                x = part(x)
            return x

    module = scattered(Backwards(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fuse(module)(x), module(x))
