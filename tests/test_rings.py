"""Linear blocks on shares in a ring: exact for all weights and masks, and no share tells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.modular import two_operators
from benchmarks.rings import EXACT, Block, Ring, integer_block, proved
from datamix.errors import ConfigError

SHAPE = (2, 5, 5)


def convolution(seed: int = 0, outputs: int = 3) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(2, outputs, 3, stride=2, padding=1, bias=False)


def direct(weights: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> list[list[int]]:
    """The products of a 1x1 convolution in Python's integers, which have no end."""
    flat = rows.reshape(len(rows), rows.shape[1], -1)
    return [
        [
            sum(int(w) * int(x) for w, x in zip(out, row[:, at], strict=True))
            for out in weights
            for at in range(row.shape[1])
        ]
        for row in flat
    ]


@given(
    bits=st.integers(8, 40),
    largest=st.integers(1, 1 << 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_shares_give_the_product_of_integers_exactly(bits: int, largest: int, seed: int) -> None:
    chance, ring = np.random.default_rng(seed), Ring(bits)
    weights = chance.integers(-largest, largest, (3, 2, 1, 1), endpoint=True)
    layers = ((torch.from_numpy(weights).double(), 1, 0),)
    block = Block(ring, layers, 1.0, np.ones((3, 1, 1)))
    features = chance.integers(-9, 9, (2, 2, 2, 2), endpoint=True)
    masks = np.stack([ring.mask(chance.bytes(32), (2, 2, 2)) for _ in range(2)])
    shared = block.share(features, masks)
    answers = block.evaluate(shared), block.evaluate(masks)
    got = ring.reduced(answers[0] - answers[1]).reshape(2, -1)
    expected = direct(weights[:, :, 0, 0], features)
    size = 1 << bits
    assert [[int(v) % size for v in row] for row in got] == [
        [v % size for v in row] for row in expected
    ]
    if max(abs(v) for row in expected for v in row) < ring.half:
        assert got.tolist() == expected


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bits", [24, 28, 32])
def test_a_block_of_integers_is_close_to_its_floats(layers: int, bits: int) -> None:
    block = nn.Sequential(convolution())
    if layers == 2:
        block.append(nn.Conv2d(3, 4, 3, padding=1, bias=False))
    features = torch.randn(4, *SHAPE).clamp(-4, 4)
    made = integer_block(block, Ring(bits), features, proved(block, 4.0), range(2, 15))
    with torch.inference_mode():
        exact = block(features).numpy()
    found = two_operators(made, features.numpy())
    assert np.abs(found - exact).max() < {24: 0.2, 28: 0.1, 32: 0.02}[bits]
    again = two_operators(made, features.numpy())  # other masks, the same bits
    assert np.array_equal(found, again)


def test_a_proved_range_holds_for_the_worst_input() -> None:
    block = nn.Conv2d(2, 3, 1, bias=False)
    weights = block.weight.detach()
    worst = 4 * weights[1].sign().reshape(1, 2, 1, 1)
    with torch.inference_mode():
        assert float(block(worst)[0, 1]) == pytest.approx(float(proved(block, 4.0)[1]), rel=1e-6)


@pytest.mark.parametrize("value", [-100, 0, 100])
def test_a_share_is_uniform_whatever_is_in_it(value: int) -> None:
    ring = Ring(8)
    masks = ring.mask(bytes(range(32)), (1 << 16,))
    shared = ring.reduced(masks + value)
    counts = np.bincount(shared + ring.half, minlength=256)
    assert len(counts) == 256
    # Chi squared of 255 degrees has a deviation of 22.6.
    assert abs(float(((counts - 256) ** 2 / 256).sum()) - 255) < 5 * 22.6


def test_what_float64_cannot_hold_is_refused() -> None:
    weights = torch.full((1, 2, 1, 1), 2.0**13, dtype=torch.float64)
    assert Ring(40).half * float(weights.sum()) == EXACT
    with pytest.raises(ConfigError, match=r"sums reach 2\^53.0 in the ring of 40 bits"):
        Block(Ring(40), ((weights, 1, 0),), 1.0, np.ones((1, 1, 1)))
    Block(Ring(39), ((weights, 1, 0),), 1.0, np.ones((1, 1, 1)))


@pytest.mark.parametrize("bits", [7, 41])
def test_a_ring_of_another_size_is_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="bits of the ring"):
        Ring(bits)


def test_other_blocks_and_too_few_bits_are_refused() -> None:
    features = torch.randn(2, *SHAPE)
    for other in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv2d(2, 2, 1))):
        with pytest.raises(ConfigError, match="expected plain convolutions only"):
            integer_block(other, Ring(16), features, np.ones(2), [4])
    with pytest.raises(ConfigError, match="no split of 40 bits fits"):
        integer_block(convolution(), Ring(40), features, np.full(3, 1e-3), [2])
