"""Linear blocks on shares in a ring of integers: exact, and each share uniform, so it says nothing.

    device        u = rint(2^b features), R uniform from a seed; A gets u + R mod 2^k, B the seed
    operators     each multiplies by the same integer weights W, mod 2^k
    device        W(u + R) - W R = W u mod 2^k, which is W u where that is below 2^(k-1)

Whatever u is, u + R is uniform: operator A learns nothing at all, and so does B, as long as the two
do not tell each other. The price: weights and features are rounded to integers, and the product
must fit into k bits. Products are summed in float64, which is exact below 2^53.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from datamix.errors import ConfigError

Integers = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

EXACT = 2**53  # below it, float64 holds every integer


@dataclass(frozen=True, slots=True)
class Ring:
    """Integers mod 2^bits, as int64 from -2^(bits-1) up.

    Attributes:
        bits: 8 to 40.
    """

    bits: int

    def __post_init__(self) -> None:
        """Refuse what float64 cannot multiply."""
        if not 8 <= self.bits <= 40:
            raise ConfigError(f"bits of the ring is {self.bits}, expected 8 to 40")

    @property
    def half(self) -> int:
        """The first integer that is too large."""
        return 1 << (self.bits - 1)

    def reduced(self, values: Integers) -> Integers:
        """Each value's representative."""
        found: Integers = ((values + self.half) & (2 * self.half - 1)) - self.half
        return found

    def mask(self, seed: bytes, shape: tuple[int, ...]) -> Integers:
        """Uniform integers from a seed of 32 bytes: ChaCha20's keystream, 8 bytes for each."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
        words = np.frombuffer(stream.update(bytes(8 * math.prod(shape))), "<u8")
        return (words >> np.uint64(64 - self.bits)).astype(np.int64).reshape(shape) - self.half


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block of integers.

    Attributes:
        ring: where it computes.
        layers: (integer weights as float64, stride, padding) of each convolution.
        features_scale: features are multiplied by it and rounded.
        outputs_scale: (C, 1, 1) float64; what comes out is divided by it.
    """

    ring: Ring
    layers: tuple[tuple[Tensor, Any, Any], ...]
    features_scale: float
    outputs_scale: Array

    def __post_init__(self) -> None:
        """Refuse weights whose sums float64 could not hold.

        Raises:
            ConfigError: they are too large for this ring.
        """
        for weights, _, _ in self.layers:
            largest = self.ring.half * float(weights.abs().sum(dim=(1, 2, 3)).max())
            if largest >= EXACT:
                raise ConfigError(
                    f"sums reach 2^{math.log2(largest):.1f} in the ring of {self.ring.bits} bits,"
                    " expected less than 2^53"
                )

    def integers(self, features: Array) -> Integers:
        """Features (n, C, H, W) as the integers that are shared."""
        return np.rint(features.astype(np.float64) * self.features_scale).astype(np.int64)

    def share(self, features: Array, mask: Integers) -> Integers:
        """What operator A gets."""
        return self.ring.reduced(self.integers(features) + mask)

    def evaluate(self, rows: Integers) -> Integers:
        """What an operator computes, (n, C, H, W) to (n, C', H', W'), exactly."""
        for weights, stride, padding in self.layers:
            inputs = torch.from_numpy(rows.astype(np.float64))
            sums = functional.conv2d(inputs, weights, stride=stride, padding=padding)
            rows = self.ring.reduced(sums.numpy().astype(np.int64))
        return rows

    def restore(self, answer: Integers, other: Integers) -> npt.NDArray[np.float32]:
        """The two operators' answers to the block's output."""
        difference = self.ring.reduced(answer - other)
        found: npt.NDArray[np.float32] = (difference / self.outputs_scale).astype(np.float32)
        return found


def integer_block(
    block: nn.Module, ring: Ring, features: Tensor, largest: Array, splits: Sequence[int]
) -> Block:
    """A chain of convolutions in integers, with the split of the ring's bits that errs least.

    Args:
        block: a Sequential of convolutions without bias.
        ring: where to compute.
        features: (n, C, H, W) to measure errors with.
        largest: (C',) what the outputs of each channel are to be held of.
        splits: bits for the features to try; the weights get the rest.

    Raises:
        ConfigError: another kind of block, or no split fits.
    """
    convolutions = list(block) if isinstance(block, nn.Sequential) else [block]
    for one in convolutions:
        if not isinstance(one, nn.Conv2d) or one.bias is not None or one.groups != 1:
            raise ConfigError(f"block holds {type(one).__name__}, expected plain convolutions only")
    with torch.inference_mode():
        exact = block(features).numpy()
    best: tuple[float, Block] | None = None
    for bits in splits:
        try:
            made = _made(convolutions, ring, float(2**bits), largest)
        except ConfigError:
            continue
        answer = made.evaluate(made.integers(features.numpy()))
        error = float(np.square(made.restore(answer, np.zeros_like(answer)) - exact).mean())
        if best is None or error < best[0]:
            best = error, made
    if best is None:
        raise ConfigError(f"no split of {ring.bits} bits fits, expected a larger ring")
    return best[1]


def _made(convolutions: Sequence[Any], ring: Ring, features_scale: float, largest: Array) -> Block:
    # What is left for the weights of all layers, the last one's by channel.
    room = (ring.half - 1) / largest / features_scale
    each = float(room.min()) ** (1 / len(convolutions))
    scales = [np.float64(each)] * (len(convolutions) - 1)
    scales.append(room / each ** (len(convolutions) - 1))
    layers = []
    for one, scale in zip(convolutions, scales, strict=True):
        factor = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1, 1, 1)
        weights = torch.round(one.weight.detach().double() * factor)
        layers.append((weights, one.stride, one.padding))
    outputs = features_scale * room.reshape(-1, 1, 1)
    return Block(ring, tuple(layers), features_scale, outputs)


def proved(block: nn.Module, most: float) -> Array:
    """Outputs of each channel for features up to ``most``, whatever these are: (C',) float64."""
    convolutions = list(block) if isinstance(block, nn.Sequential) else [block]
    reach = torch.tensor(most, dtype=torch.float64)
    for one in convolutions:
        assert isinstance(one, nn.Conv2d)
        by_input = one.weight.detach().double().abs().sum(dim=(2, 3))
        reach = by_input @ reach.expand(by_input.shape[1])
    found: Array = reach.numpy()
    return found
