"""A decoder from features back to pictures, trained on public data with the public stem.

Model inversion by a trained network (Dosovitskiy and Brox, "Inverting visual representations with
convolutional networks", CVPR 2016). The stem is public, so an attacker has as many pairs as there
are public inputs. Pairs are corrupted in training as the attacker's features will be: with the
noise of the mode, or with crumbs of other inputs that separation left.

Against heavy noise a convolution sees too little at each place, so the estimate starts from the
best linear one (Wiener, over the principal parts of public features); a small network refines it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from edge.audit.separation import Background, background_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edge.audit.attack import Budget

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_BATCH = 64
_RATE = 3e-3


class Decoder:
    """Features (n, C, H, W) to pictures (n, c, h, w), both float32."""

    def __init__(self, network: nn.Module, wiener: Wiener | None, picture: tuple[int, ...]) -> None:
        """Refine what ``wiener`` estimates, or decode features as they are.

        The network's pictures are cut to (c, h, w), ``picture``.
        """
        self._network = network
        self._wiener = wiener
        _, self._height, self._width = picture

    def __call__(self, features: Array) -> Floats:
        """Decode."""
        import torch

        clean = self.estimate(features)
        with torch.no_grad():
            decoded: Floats = self._network(torch.from_numpy(_float32(clean))).numpy()
        return decoded[:, :, : self._height, : self._width]

    def estimate(self, features: Array) -> Floats:
        """What the features were before noise, as far as that can be told linearly."""
        return _float32(features if self._wiener is None else self._wiener(features))


class Wiener:
    """The best linear estimate of features from ``features + sigma * noise``.

    N. Wiener, "Extrapolation, interpolation and smoothing of stationary time series", 1949: each
    principal part is weighed with its share of the power, and so is what lies beside them.
    """

    def __init__(self, background: Background, sigma: float, rest: float = 0.0) -> None:
        """For noise of this deviation in each value, and features of power ``rest`` beside.

        Raises:
            ConfigError: ``sigma`` is negative.
        """
        if not sigma >= 0:
            raise ConfigError(f"sigma is {sigma}, expected 0 or more")
        self._basis = background.basis
        self._weight = background.power / (background.power + sigma**2)
        self._rest = rest / (rest + sigma**2) if rest > 0 else 0.0

    def __call__(self, features: Array) -> Floats:
        """(n, *shape) noisy to (n, *shape) estimated."""
        flat = features.reshape(len(features), -1)
        parts = (flat @ self._basis.T) * (self._weight - self._rest)
        return _float32((self._rest * flat + parts @ self._basis).reshape(features.shape))


def beside(background: Background, rows: Array) -> float:
    """Mean square of rows (n, d) in each direction that the principal parts do not cover.

    Rows that the parts were made of have nothing there: take others.
    """
    free = rows.shape[1] - len(background.basis)
    if not len(rows) or free < 1:
        return 0.0
    inside = rows @ background.basis.T
    return max(0.0, float((np.sum(rows**2) - np.sum(inside**2)) / (len(rows) * free)))


def train_decoder(
    features: Array,
    pictures: Array,
    budget: Budget,
    *,
    epochs: int = 6,
    width: int = 32,
    sigma: float = 0.0,
    crumbs: float = 0.0,
    seconds: float = 60.0,
) -> Decoder:
    """Train one on public pairs.

    Args:
        features: (n, C, H, W) of the public inputs.
        pictures: (n, c, h, w) of the same.
        budget: ends training early where its time is over; its seed seeds all.
        epochs: passes over the pairs.
        width: channels of the network.
        sigma: deviation of Gaussian noise that the features to decode will carry.
        crumbs: amplitude of one other input's features in them, drawn anew from 0 up to this.
        seconds: at most so long.

    Raises:
        ConfigError: no pairs, or not as many pictures as features.
    """
    import torch

    if len(features) != len(pictures) or not len(features):
        raise ConfigError(f"got {len(features)} features and {len(pictures)} pictures, not pairs")
    rng = budget.rng()
    wiener = None
    if sigma > 0:
        flat = features.reshape(len(features), -1)
        parts = min(1000, len(flat) // 2 + 1)
        background = background_of(flat[:parts])
        wiener = Wiener(background, sigma, beside(background, flat[parts:]))
    with torch.random.fork_rng():
        torch.manual_seed(budget.seed)
        network = _network(features.shape[1:], pictures.shape[1:], width)

    def corrupt(rows: npt.NDArray[np.int64]) -> Tensor:
        clean = features[rows].astype(np.float32)
        if crumbs > 0:
            share = rng.uniform(-crumbs, crumbs, (len(rows), 1, 1, 1))
            clean = clean + share * features[rng.permutation(rows)]
        if wiener is not None:
            clean = wiener(clean + sigma * rng.standard_normal(clean.shape, np.float32))
        return torch.from_numpy(_float32(clean))

    target = torch.from_numpy(_float32(pictures))
    _fit(network, corrupt, target, rng, budget, epochs, min(seconds, budget.left_s()))
    return Decoder(network.eval(), wiener, pictures.shape[1:])


def _fit(
    network: nn.Module,
    corrupt: Callable[[npt.NDArray[np.int64]], Tensor],
    target: Tensor,
    rng: np.random.Generator,
    budget: Budget,
    epochs: int,
    seconds: float,
) -> None:
    """Least absolute error, for sharp edges, by AdamW; the rate falls to zero towards the end."""
    import torch

    steps = epochs * -(-len(target) // _BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE)
    begun_s, step = budget.left_s(), 0
    for _ in range(epochs):
        order = rng.permutation(len(target)).astype(np.int64)
        for start in range(0, len(order), _BATCH):
            done = max(step / steps, (begun_s - budget.left_s()) / max(seconds, 1e-9))
            if done >= 1 or budget.expired():
                return
            warm = min(1.0, (step + 1) / 20)
            optimiser.param_groups[0]["lr"] = _RATE * warm * 0.5 * (1 + math.cos(math.pi * done))
            step += 1
            rows = order[start : start + _BATCH]
            decoded = network(corrupt(rows))[:, :, : target.shape[2], : target.shape[3]]
            loss = torch.nn.functional.l1_loss(decoded, target[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def _network(shape: tuple[int, ...], picture: tuple[int, ...], width: int) -> nn.Module:
    """Convolutions at the features' resolution, then each place spreads out over its pixels."""
    from torch import nn

    up = max(-(-picture[1] // shape[1]), -(-picture[2] // shape[2]))
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(width, picture[0] * up * up, 3, padding=1), nn.PixelShuffle(up)]
    return nn.Sequential(*layers)


def _float32(values: Array) -> Floats:
    return np.ascontiguousarray(values, np.float32)
