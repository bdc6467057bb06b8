"""Mixtures, networks of each method, the wire's rounding, the loss."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamix import wire
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build
from edge import mixtures, modes
from edge.laws import LAWS, Law
from edge.loss import Loss
from edge.methods import METHODS
from edge.mixtures import Mixing, apply, logits_of, mixed_logits
from edge.networks import architecture_for, untrained
from edge.wires import Wire, rounded

SMALL = Architecture("convnet", {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16})
BRIDGED = Architecture(
    "bridgenet",
    {"stem_width": 4, "stem_units": 1, "widths": "6,8", "strides": "2,1", "rounds": 1},
)


def model_of(method: str, architecture: Architecture) -> SplitModel:
    model = untrained(method, architecture, 0)
    assert isinstance(model, SplitModel)
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(16, *model.input_shape))
    return model.eval()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("k", [2, 8, 32])
def test_mixing_a_linear_model_changes_nothing(law: Law, k: int) -> None:
    model = model_of("linear", SMALL)
    x = torch.randn(32, 1, 28, 28)
    with torch.inference_mode():
        mixed = mixed_logits(model, x, Mixing(k, law), np.random.default_rng(0))
        torch.testing.assert_close(mixed, model(x), atol=2e-3, rtol=2e-3)


def test_mixing_another_model_changes_something_unless_there_is_none() -> None:
    model = model_of("datamix", BRIDGED)
    x = torch.randn(8, 1, 28, 28)
    with torch.inference_mode():
        plain = model(x)
        mixed = mixed_logits(model, x, Mixing(4), np.random.default_rng(0))
        assert float((mixed - plain).abs().max()) > 1e-2
        still = mixed_logits(model, x, Mixing(4, strength=0), np.random.default_rng(0))
        torch.testing.assert_close(still, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_of(model, x, None, np.random.default_rng(0)), plain)


def test_noise_is_there_and_repeats() -> None:
    model = model_of("bounded", SMALL)
    x = torch.randn(8, 1, 28, 28)
    with torch.inference_mode():
        clear, one, again, other = (
            mixed_logits(model, x, Mixing(4, noise_sigma=sigma), np.random.default_rng(seed))
            for sigma, seed in ((0.0, 1), (0.5, 1), (0.5, 1), (0.5, 2))
        )
    torch.testing.assert_close(one, again, atol=0, rtol=0)
    assert float((one - other).abs().max()) > 1e-2
    assert float((one - clear).abs().max()) > 1e-2


@pytest.mark.parametrize("size", [0.0, 0.2, 5.0])
def test_members_are_clipped_as_a_device_clips_them(size: float) -> None:
    features = size * torch.randn(5, 3, 4, 4)
    features[0] /= 10
    clipped, scale = mixtures.clip(features)
    theirs, their_scale = modes.clip(features.numpy())
    torch.testing.assert_close(clipped, torch.from_numpy(theirs), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scale.flatten(), torch.from_numpy(their_scale), rtol=1e-5, atol=0)
    leaf = features.clone().requires_grad_()
    clipped, scale = mixtures.clip(leaf)
    torch.autograd.backward(clipped.sum() + scale.sum())
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        assert mixtures.clip(features.bfloat16())[0].dtype == torch.float32


def test_noise_meets_clipped_members_and_the_answer_is_unclipped() -> None:
    model = model_of("bounded", BRIDGED)
    model.stem = torch.nn.Sequential(model.stem, Times(3.0))  # more than 1 in the mean
    x = torch.randn(8, 1, 28, 28)
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        plain = model(x)
        noisy = mixed_logits(model, x, Mixing(4, noise_sigma=1e-6), np.random.default_rng(0))
    torch.testing.assert_close(noisy, plain, rtol=1e-3, atol=1e-3)
    free, protected = (float(part.square().mean()) for part in seen)
    assert free > 1.5
    assert protected <= 1 + 1e-5


class Times(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_gradients_reach_every_parameter_through_the_mixing() -> None:
    model = model_of("datamix", BRIDGED).train()
    x = torch.randn(8, 1, 28, 28)
    logits = mixed_logits(model, x, Mixing(4), np.random.default_rng(0))
    torch.autograd.backward(logits.square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_mixed_within_their_group_in_any_layout(layout: Any) -> None:
    rows = torch.randn(6, 3, 4, 5).contiguous(memory_format=layout)
    a = torch.randn(2, 3, 3)
    mixed = apply(a, rows)
    expected = torch.einsum("gij,gjchw->gichw", a, rows.reshape(2, 3, 3, 4, 5)).flatten(0, 1)
    torch.testing.assert_close(mixed, expected)
    assert mixed.is_contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(apply(a, rows), expected)


@given(seed=st.integers(0, 2**32), scale=st.floats(1e-3, 1e3))
def test_rounding_is_the_wires(seed: int, scale: float) -> None:
    rows = (np.random.default_rng(seed).standard_normal((4, 2, 3)) * scale).astype(np.float32)
    for dtype in ("float32", "float16", "int8"):
        values, factors = wire.quantise(rows, dtype)
        expected = values.astype(np.float32)
        if factors is not None:
            expected *= factors.reshape(-1, 1, 1)
        found = rounded(torch.from_numpy(rows), dtype).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_rounding_zeros_gives_zeros(kind: Wire) -> None:
    assert not rounded(torch.zeros(2, 3), kind).any()


def test_each_method_builds_what_it_needs() -> None:
    for name, method in METHODS.items():
        part = untrained(name, BRIDGED, 0)
        assert isinstance(part, SplitModel) == method.offloads
        if isinstance(part, SplitModel):
            assert part.linear == (method.cloud == "linear")
    stems = [untrained(name, BRIDGED, 0).state_dict() for name in ("edge-only", "linear")]
    assert stems[0]["0.0.weight"].shape == stems[1]["stem.0.weight"].shape
    again = untrained("linear", BRIDGED, 0).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stems[1].items())
    other = untrained("linear", BRIDGED, 1).state_dict()
    assert not torch.equal(other["stem.0.weight"], stems[1]["stem.0.weight"])


def test_a_cloud_that_is_given_stays_and_a_wrong_one_is_refused() -> None:
    prelu = dataclasses.replace(BRIDGED, options={**BRIDGED.options, "cloud": "prelu"})
    assert architecture_for("datamix", prelu).options["cloud"] == "prelu"
    assert architecture_for("datamix", BRIDGED).options["cloud"] == "relu"
    with pytest.raises(ConfigError, match="blocks of bridgenet are non-linear, expected the other"):
        architecture_for("linear", prelu)
    linear = dataclasses.replace(BRIDGED, options={**BRIDGED.options, "cloud": "linear"})
    with pytest.raises(ConfigError, match="blocks of bridgenet are linear"):
        architecture_for("nonlinear", linear)
    with pytest.raises(ConfigError, match="unknown option 'wheels'"):
        architecture_for("linear", Architecture("bridgenet", {"wheels": 4}))


def test_the_loss_is_the_labels_and_the_teachers() -> None:
    logits, teacher = torch.randn(5, 3), torch.randn(5, 3)
    labels = torch.tensor([0, 1, 2, 0, 1])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(Loss()(logits, labels, teacher), plain)
    torch.testing.assert_close(Loss(teacher_weight=0.5)(logits, labels, None), plain)
    t = 3.0
    p, q = (teacher / t).softmax(1), (logits / t).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.7 * plain + 0.3 * t * t * divergence
    torch.testing.assert_close(Loss(0.0, 0.3, t)(logits, labels, teacher), expected)
    nothing = Loss(0.0, 1.0, t)(teacher, labels, teacher)
    torch.testing.assert_close(nothing, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_several_labels_are_several_questions() -> None:
    logits, labels = torch.randn(5, 3), (torch.rand(5, 3) > 0.5).float()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(Loss()(logits, labels, None), plain)
    eased = Loss(0.2)(logits, labels, None)
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1)
    torch.testing.assert_close(eased, by_hand)
    learnt = logits.clone().requires_grad_()
    torch.autograd.backward(Loss(0.0, 1.0, 2.0)(learnt, labels, logits))
    assert learnt.grad is not None
    torch.testing.assert_close(learnt.grad, torch.zeros(5, 3), atol=1e-6, rtol=0)


def test_an_architecture_without_the_option_is_taken_as_it_is() -> None:
    resnet = Architecture("resnet18", {"cut": 3})
    with torch.device("meta"):
        assert not build(architecture_for("datamix", resnet)).linear
