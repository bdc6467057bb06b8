import numpy as np
import pytest
import torch

from datamix.errors import ConfigError
from edge.audit.attack import Budget
from edge.audit.decoder import Wiener, train_decoder
from edge.audit.separation import background_of


def pairs(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures (n, 1, 8, 10), and features (n, 4, 4, 5) that hold each pixel once."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 3, 8)[:, None] * rng.uniform(0.5, 2, (count, 1, 1)))
    shown = (waves * np.cos(np.linspace(0, 2, 10) * rng.uniform(0.5, 2, (count, 1, 1))))[:, None]
    features = shown.reshape(count, 4, 2, 5, 2).transpose(0, 2, 4, 1, 3).reshape(count, 4, 4, 5)
    return features.astype(np.float32), shown.astype(np.float32)


def error(decoded: np.ndarray, shown: np.ndarray) -> float:
    """Mean squared error in units of the pictures' variance."""
    return float(np.mean((decoded - shown) ** 2) / np.var(shown - shown.mean(axis=0)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_pictures_come_back() -> None:
    features, shown = pairs()
    decoder = train_decoder(features, shown, Budget(60), epochs=20, width=16)
    decoded = decoder(features)
    assert decoded.shape == shown.shape and decoded.dtype == np.float32
    assert error(decoded, shown) < 0.1


def test_pictures_come_back_from_features_with_noise() -> None:
    features, shown = pairs()
    noisy = features + 0.3 * np.random.default_rng(1).standard_normal(features.shape)
    decoder = train_decoder(features, shown, Budget(60), epochs=20, width=16, sigma=0.3)
    assert error(decoder(noisy), shown) < 0.4


def test_nothing_comes_back_from_noise_alone() -> None:
    features, shown = pairs()
    decoder = train_decoder(features, shown, Budget(60), epochs=3, width=16, sigma=1000.0)
    noisy = 1000 * np.random.default_rng(1).standard_normal(features.shape)
    assert error(decoder(noisy), shown) > 0.8


def test_an_odd_picture_is_cut_to_size() -> None:
    features, shown = pairs(64)
    decoder = train_decoder(features, shown[..., :9], Budget(60), epochs=1, width=4)
    assert decoder(features).shape == (64, 1, 8, 9)


def test_training_ends_with_its_budget() -> None:
    now = iter(range(10_000))
    budget = Budget(5, clock=lambda: float(next(now)))
    features, shown = pairs()
    train_decoder(features, shown, budget, epochs=1000, width=4)
    assert next(now) < 50


def test_the_same_seed_trains_the_same_decoder() -> None:
    features, shown = pairs(64)
    first, second = (
        train_decoder(features, shown, Budget(60, seed=3), epochs=1, width=4, crumbs=0.3)(features)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_wiener_is_the_best_linear_estimate() -> None:
    features, _ = pairs()
    flat = features.reshape(len(features), -1)
    noisy = flat + 0.5 * np.random.default_rng(2).standard_normal(flat.shape)
    found = [
        np.mean((Wiener(background_of(flat), sigma)(noisy) - flat) ** 2) for sigma in (0.05, 0.5, 5)
    ]
    assert found[1] == min(found) < np.mean((noisy - flat) ** 2) / 2


def test_hostile_arguments_are_refused() -> None:
    features, shown = pairs(8)
    with pytest.raises(ConfigError, match="pairs"):
        train_decoder(features, shown[:4], Budget(1))
    with pytest.raises(ConfigError, match="sigma"):
        Wiener(background_of(features.reshape(8, -1)), float("nan"))
