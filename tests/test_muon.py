import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from datamix.errors import ConfigError
from edge.muon import Muon, is_hidden_kernel, orthogonalise


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_directions_keep_the_singular_vectors_and_have_values_near_one(
    rows: int, columns: int, seed: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=chance), full_matrices=False)
    values = 1 + torch.rand(min(rows, columns), generator=chance)
    found = orthogonalise(u @ torch.diag(values) @ vt)
    inner = u.T @ found @ vt.T
    assert float((inner - torch.diag(torch.diagonal(inner))).abs().max()) < 1e-3
    assert float(torch.diagonal(inner).min()) > 0.6
    assert float(torch.diagonal(inner).max()) < 1.3


def test_a_step_goes_downhill_and_keeps_the_norm() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, bias=False)
    kernel = torch.randn(8, 3, 3, 3)
    inputs = torch.randn(64, 3, 8, 8)
    wanted = nn.functional.conv2d(inputs, kernel * 8**0.5 / kernel.norm())
    optimizer = Muon(convolution.parameters(), lr=0.1)
    losses = []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 60)
        loss = (convolution(inputs) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        assert 6 < float(convolution.weight.detach().norm()) ** 2 < 10
    assert losses[-1] < 0.1 * losses[0]


def test_it_is_for_kernels_that_mix_channels() -> None:
    assert is_hidden_kernel(nn.Conv2d(3, 8, 3).weight)
    assert not is_hidden_kernel(nn.Conv2d(8, 8, 3, groups=8).weight)
    assert not is_hidden_kernel(nn.Linear(3, 4).weight)


def test_a_closure_is_refused() -> None:
    optimizer = Muon(nn.Conv2d(3, 8, 3, bias=False).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="expected none"):
        optimizer.step(lambda: 0.0)
