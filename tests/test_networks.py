"""The published networks: their known sizes, every cut, rounds, clouds, mixing and folding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, block_shapes, build, count_flops
from datamix.models.layers import PReLU, ScaleNorm
from deployments.cpu import CpuEngine
from deployments.engine import ROUNDING, Block, Rows
from deployments.fuse import fuse
from tests.test_fuse import count, scattered

RESNETS = ("resnet18", "resnet34", "resnet50")
PICTURES = (*RESNETS, "vgg16", "mobilenetv2")
NETWORKS = (*PICTURES, "audionet")
# resnet34 is made like resnet18, only longer: what takes time is left to the others.
SHORT = tuple(name for name in NETWORKS if name != "resnet34")
UNITS = dict(zip(NETWORKS, (8, 16, 16, 12, 18, 6), strict=True))
CLOUDS = ("relu", "linear", "prelu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are small: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, *, on: str = "cpu", **options: Any) -> SplitModel:
    torch.manual_seed(0)
    with torch.device(on):
        return build(Architecture(name, options))


def tiny(name: str, **options: Any) -> SplitModel:
    """A narrow model whose norms do something."""
    small: dict[str, Any] = {"width": 6, "image_size": 32}
    if name == "audionet":
        small = {"width": 12, "mels": 16, "frames": 21}
    model = make(name, **small, **options)
    scattered(model)
    return model


@cache
def ready(name: str, cloud: str, rounds: int) -> SplitModel:
    """The same one for all tests that only run it."""
    return tiny(name, cloud=cloud, rounds=rounds)


def inputs_for(model: SplitModel, rows: int) -> torch.Tensor:
    return torch.randn(rows, *model.input_shape, generator=torch.Generator().manual_seed(5))


def mixed(model: SplitModel, inputs: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """One group through the cloud as mixtures, a fresh sign of the coefficients per round."""
    features = model.stem(inputs)
    for index, block in enumerate(model.blocks):
        if index:
            features, a = model.bridges[index - 1](features), -a.T.contiguous()
        answer = block(torch.einsum("ij,jchw->ichw", a, features))
        features = torch.einsum("ji,jchw->ichw", a, answer)
    logits: torch.Tensor = model.head(features)
    return logits


# --- what is known of them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [  # torchvision's parameters; multiply-adds as published, in convolutions and matrix products
        ("resnet18", 11_689_512, 1.82e9),
        ("resnet34", 21_797_672, 3.67e9),
        ("resnet50", 25_557_032, 4.1e9),
        ("vgg16", 138_365_992, 15.5e9),
        ("mobilenetv2", 3_504_872, 0.305e9),
    ],
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_published_sizes(name: str, parameters: int, multiply_adds: float, rounds: int) -> None:
    model = make(name, on="meta", image_size=224, classes=1000, rounds=rounds)
    assert sum(p.numel() for p in model.parameters()) == parameters
    flops = count_flops(model)
    assert (flops.edge + flops.cloud) / 2 == pytest.approx(multiply_adds, rel=0.01)
    assert not model.linear and set(flops.collapsed_blocks) == {None}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_count_is_that_of_a_public_counter(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles with what torch has deprecated
        from fvcore.nn import FlopCountAnalysis, parameter_count

        model = tiny(name, rounds=2)
        analysis = FlopCountAnalysis(model, inputs_for(model, 1))
        found = analysis.unsupported_ops_warnings(False).by_operator()
    flops = count_flops(model)
    # It counts a multiply-add as one, and two per value of a batch norm.
    expected = 2 * (found["conv"] + found["linear"]) + found["batch_norm"]
    assert flops.edge + flops.cloud == expected > 0
    assert parameter_count(model)[""] == sum(p.numel() for p in model.parameters())


def test_a_resnet18_bundle_of_old_still_fits() -> None:
    """Names of tensors as they have been since the first bundle."""
    names = set(make("resnet18", on="meta", cut=2).state_dict())
    assert {
        "stem.0.weight",
        "stem.1.running_mean",
        "stem.3.0.inner.0.weight",
        "stem.4.1.inner.4.bias",
        "stem.4.0.shortcut.1.weight",
        "blocks.0.0.0.shortcut.0.weight",
        "blocks.0.1.1.inner.3.weight",
        "head.1.bias",
    } <= names
    assert len(names) == 122


def test_a_narrow_network_has_fewer_channels() -> None:
    (whole,), (half,) = (
        block_shapes(make("resnet18", on="meta", width=width)) for width in (100, 50)
    )
    assert whole == ((64, 32, 32), (512, 1, 1))
    assert half == ((32, 32, 32), (256, 1, 1))
    narrow = make("mobilenetv2", on="meta", width=1)
    assert block_shapes(narrow)[0][0][0] == 4  # the least


@pytest.mark.parametrize("mels", [40, 64])
@pytest.mark.parametrize("frames", [98, 101])
def test_audionet_takes_any_spectrogram(mels: int, frames: int) -> None:
    model = make("audionet", on="meta", mels=mels, frames=frames, classes=12)
    assert model.input_shape == (1, mels, frames)
    assert model(torch.empty(2, 1, mels, frames, device="meta")).shape == (2, 12)
    # A bundle of it in float32 stays below 3 MB.
    assert 4 * sum(p.numel() for p in model.parameters()) < 3e6


# --- cuts and rounds ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_cut_and_number_of_rounds_gives_the_same_network(name: str) -> None:
    whole = make(name, on="meta", cut=0, cut_by="unit")
    parameters = sum(p.numel() for p in whole.parameters())
    units = UNITS[name]
    for cut, rounds in [(0, units), (units - 1, 1), (units // 2, 2), (1, units // 2)]:
        model = make(name, on="meta", cut=cut, cut_by="unit", rounds=rounds)
        assert sum(p.numel() for p in model.parameters()) == parameters
        shapes = block_shapes(model)
        assert len(shapes) == rounds == len(model.bridges) + 1
        for (_, before), (after, _) in zip(shapes, shapes[1:], strict=False):
            assert before == after  # published networks have empty bridges
    with pytest.raises(ConfigError, match=f"cut is {units}, expected an integer from 0 to"):
        make(name, on="meta", cut=units, cut_by="unit")
    with pytest.raises(ConfigError, match=f"rounds is {units + 1}, expected an integer from 1 to"):
        make(name, on="meta", cut=0, rounds=units + 1)


@pytest.mark.parametrize("name", SHORT)
def test_where_a_published_network_is_cut_changes_no_value(name: str) -> None:
    whole = tiny(name, cut=0)
    inputs = inputs_for(whole, 2)
    with torch.inference_mode():
        expected = whole(inputs)
        for options in ({"cut": 2, "cut_by": "stage"}, {"cut": 1, "rounds": 3}):
            cut = tiny(name, **options)
            weights = whole.state_dict().values()
            assert len(weights) == len(cut.state_dict())
            # The same tensors in the same order, by other names.
            cut.load_state_dict(dict(zip(cut.state_dict(), weights, strict=True)))
            torch.testing.assert_close(cut(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_it_trains(name: str, cloud: str) -> None:
    model = tiny(name, cloud=cloud, rounds=2).train()
    inputs = inputs_for(model, 4)
    logits = model(inputs)
    assert logits.shape == (4, model.classes)
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert model.edge_head()(model.eval().stem(inputs)).shape == (4, model.classes)


@pytest.mark.parametrize("name", SHORT)
def test_a_cloud_is_made_over_as_asked(name: str) -> None:
    blocks = {cloud: ready(name, cloud, 2).blocks for cloud in CLOUDS}
    for kind in (nn.ReLU, nn.ReLU6, nn.BatchNorm2d, nn.MaxPool2d):
        assert count(blocks["linear"], kind) == 0
    assert count(blocks["relu"], ScaleNorm) == count(blocks["relu"], PReLU) == 0
    assert count(blocks["linear"], ScaleNorm) == count(blocks["relu"], nn.BatchNorm2d) > 0
    assert count(blocks["prelu"], ScaleNorm) == count(blocks["relu"], nn.BatchNorm2d)
    activations = count(blocks["relu"], nn.ReLU) + count(blocks["relu"], nn.ReLU6)
    assert count(blocks["prelu"], PReLU) == activations > 0
    model = ready(name, "linear", 2)
    with torch.inference_mode():
        sent = model.stem(inputs_for(model, 8))
        again = model.bridges[0](model.blocks[0](sent))
    assert float(sent.abs().max()) <= 4.0 and float(again.abs().max()) <= 4.0


# --- mixing ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([2, 4, 8, 32]))
@pytest.mark.parametrize("name", SHORT)
def test_linear_clouds_de_mix_exactly(name: str, seed: int, k: int) -> None:
    model = ready(name, "linear", 3)
    assert model.linear
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((k, k)))
    a = torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))
    inputs = inputs_for(model, k)
    with torch.inference_mode():
        expected = model(inputs)
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(mixed(model, inputs, a), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("cloud", ["relu", "prelu"])
def test_other_clouds_do_not(name: str, cloud: str) -> None:
    model = ready(name, cloud, 2)
    assert not model.linear
    inputs = inputs_for(model, 4)
    a = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    with torch.inference_mode():
        plain = model(inputs)
        assert float((mixed(model, inputs, a) - plain).abs().max()) > 1e-3 * float(plain.std())


# --- the cloud's engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_folded_and_plain_blocks_are_the_same_function(name: str, cloud: str) -> None:
    model = ready(name, cloud, 2)
    for block, (shape, _) in zip(model.blocks, block_shapes(model), strict=True):
        features = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
        fused = fuse(block)
        # Each of these norms follows a convolution.
        assert count(fused, nn.BatchNorm2d) == count(fused, ScaleNorm) == 0
        with torch.inference_mode():
            expected = block(features)
            atol = 1e-5 * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(fused(features), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", SHORT)
def test_the_engine_runs_every_block(name: str) -> None:
    model = ready(name, "linear", 2)
    shapes = [Block(*pair) for pair in block_shapes(model)]
    engine = CpuEngine(model.blocks, shapes, max_batch_rows=4, threads=1)
    for index, (block, pair) in enumerate(zip(model.blocks, shapes, strict=True)):
        rows = torch.randn(3, *pair.input_shape, generator=torch.Generator().manual_seed(2))
        (output,) = engine.run(index, [Rows(rows.numpy(), None)])
        with torch.inference_mode():
            expected = block(rows).numpy()
        error = np.abs(output - expected).max() / max(1.0, float(np.abs(expected).max()))
        assert output.shape == (3, *pair.output_shape) and error < 10 * ROUNDING["float32"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vgg16", {"image_size": 28}, "image_size is 28, expected an integer from 32 to 512"),
        ("resnet50", {"cut": 4}, "cut is 4, expected an integer from 0 to 3"),
        ("mobilenetv2", {"cloud": "gelu"}, "cloud is 'gelu', expected one of"),
        ("mobilenetv2", {"cut_by": "layer"}, "cut_by is 'layer', expected one of"),
        ("audionet", {"mels": 7}, "mels is 7, expected an integer from 8 to 256"),
        ("audionet", {"image_size": 32}, "unknown option 'image_size'"),
        ("resnet34", {"width": 0}, "width is 0, expected an integer from 1 to 400"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(name, on="meta", **options)
