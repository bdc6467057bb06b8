"""A decoder from features back to pictures, trained on public data with the public stem.

Model inversion by a trained network (Dosovitskiy and Brox, "Inverting visual representations with
convolutional networks", CVPR 2016). The stem is public, so an attacker has as many pairs as there
are public inputs. Pairs are corrupted in training as the attacker's features will be: with the
noise of the mode, or with crumbs of other inputs that separation left.

Against heavy noise a convolution sees too little at each place, so the estimate starts from the
best linear one (Wiener, over the principal parts of public features) and a small network refines it.
"""

from __future__ import annotations

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

    def __init__(self, network: nn.Module, wiener: Wiener | None) -> None:
        """Refine what ``wiener`` estimates, or decode features as they are."""
        self._network = network
        self._wiener = wiener

    def __call__(self, features: Array) -> Floats:
        """Decode."""
        import torch

        clean = self.estimate(features)
        with torch.no_grad():
            decoded: Floats = self._network(torch.from_numpy(_float32(clean))).numpy()
        return decoded

    def estimate(self, features: Array) -> Floats:
        """What the features were before noise, as far as that can be told linearly."""
        return _float32(features if self._wiener is None else self._wiener(features))


class Wiener:
    """The best linear estimate of features from ``features + sigma * noise``.

    N. Wiener, "Extrapolation, interpolation and smoothing of stationary time series", 1949: each
    principal part is weighed with its share of the power.
    """

    def __init__(self, background: Background, sigma: float) -> None:
        """For noise of this deviation in each value.

        Raises:
            ConfigError: ``sigma`` is negative.
        """
        if not sigma >= 0:
            raise ConfigError(f"sigma is {sigma}, expected 0 or more")
        self._basis = background.basis
        self._weight = background.power / (background.power + sigma**2)

    def __call__(self, features: Array) -> Floats:
        """(n, *shape) noisy to (n, *shape) estimated."""
        parts = features.reshape(len(features), -1) @ self._basis.T
        return _float32(((parts * self._weight) @ self._basis).reshape(features.shape))


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
        wiener = Wiener(background_of(features.reshape(len(features), -1)[:1000]), sigma)
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
    _fit(
        network,
        corrupt,
        target,
        rng,
        budget,
        epochs,
        budget.left_s() - min(seconds, budget.left_s()),
    )
    return Decoder(network.eval(), wiener)


def _fit(
    network: nn.Module,
    corrupt: Callable[[npt.NDArray[np.int64]], Tensor],
    target: Tensor,
    rng: np.random.Generator,
    budget: Budget,
    epochs: int,
    spare_s: float,
) -> None:
    """Least squares by AdamW, the rate falling to zero."""
    import torch

    steps = epochs * -(-len(target) // _BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1)
    for _ in range(epochs):
        order = rng.permutation(len(target)).astype(np.int64)
        for start in range(0, len(order), _BATCH):
            if budget.left_s() <= spare_s:
                return
            rows = order[start : start + _BATCH]
            loss = torch.nn.functional.mse_loss(network(corrupt(rows)), target[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()


def _network(shape: tuple[int, ...], picture: tuple[int, ...], width: int) -> nn.Module:
    """Convolutions at the features' resolution, then each place spreads out over its pixels."""
    from torch import nn

    up = max(-(-picture[1] // shape[1]), -(-picture[2] // shape[2]))
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(width, picture[0] * up * up, 3, padding=1), nn.PixelShuffle(up)]
    return nn.Sequential(*layers, _Cut(picture[1], picture[2]))


def _Cut(height: int, width: int) -> nn.Module:  # noqa: N802
    from torch import nn

    class Cut(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps[:, :, :height, :width]

    return Cut()


def _float32(values: Array) -> Floats:
    return np.ascontiguousarray(values, np.float32)
