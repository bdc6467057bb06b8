import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.errors import ConfigError
from datamix.models import (
    Architecture,
    SplitModel,
    block_shapes,
    build,
    count_flops,
)


def make(name: str = "convnet", *, on: str = "cpu", **options: int | str) -> SplitModel:
    torch.manual_seed(0)
    with torch.device(on):
        return build(Architecture(name, options))


@pytest.fixture(scope="module")
def trained() -> SplitModel:
    """A convnet whose norms have seen data, so that eval statistics differ from their start."""
    model = make(n_blocks=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(25):
            model(torch.randn(32, 1, 28, 28, generator=generator))
    return model.eval()


def haar(rng: np.random.Generator, k: int) -> torch.Tensor:
    q, r = np.linalg.qr(rng.standard_normal((k, k)))
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))


@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, 16), seed=st.integers(0, 2**32 - 1), index=st.integers(0, 2))
def test_mixing_commutes_with_every_linear_block(
    trained: SplitModel, k: int, seed: int, index: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = block_shapes(trained)[index][0]
    features = torch.from_numpy(rng.standard_normal((k, *shape)).astype(np.float32))
    a = haar(rng, k)
    with torch.inference_mode():
        expected = trained.blocks[index](features)
        mixtures = trained.blocks[index](torch.einsum("ij,jchw->ichw", a, features))
        demixed = torch.einsum("ji,jchw->ichw", a, mixtures)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(demixed, expected, atol=2e-5, rtol=2e-5)


def test_a_linear_block_has_no_offset(trained: SplitModel) -> None:
    for block, (shape, _) in zip(trained.blocks, block_shapes(trained), strict=True):
        assert float(block(torch.zeros(1, *shape)).detach().abs().max()) == 0.0


@settings(deadline=None, max_examples=10)
@given(k=st.integers(2, 16), seed=st.integers(0, 2**32 - 1))
def test_device_parts_treat_members_on_their_own(trained: SplitModel, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for part, shape in (
        (trained.stem, (1, 28, 28)),
        (trained.bridges[0], (64, 7, 7)),
        (trained.head, (64, 7, 7)),
    ):
        inputs = torch.from_numpy(rng.standard_normal((k, *shape)).astype(np.float32))
        with torch.inference_mode():
            together = part(inputs)
            alone = torch.cat([part(one[None]) for one in inputs])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_features_are_near_unit_variance_on_both_sides(trained: SplitModel) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        sent = trained.stem(torch.randn(256, 1, 28, 28, generator=generator))
        back = trained.blocks[0](sent)
        again = trained.bridges[0](back)
    for features in (sent, back, again):
        assert 0.5 < float(features.square().mean().sqrt()) < 1.6
    assert float(sent.abs().max()) <= 4.0
    assert float(again.abs().max()) <= 4.0


def test_float16_on_the_wire_barely_moves_the_logits(trained: SplitModel) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(64, 1, 28, 28, generator=generator)
    a = haar(np.random.default_rng(4), 4)
    with torch.inference_mode():
        expected = trained(inputs)
        features = trained.stem(inputs)
        for index, block in enumerate(trained.blocks):
            if index:
                features = trained.bridges[index - 1](features)
            groups = features.unflatten(0, (-1, 4))
            mixtures = torch.einsum("ij,gjchw->gichw", a, groups).half().float()
            answer = block(mixtures.flatten(0, 1)).half().float().unflatten(0, (-1, 4))
            features = torch.einsum("ji,gjchw->gichw", a, answer).flatten(0, 1)
        logits = trained.head(features)
    error = float((logits - expected).abs().max())
    assert 0 < error < 0.02 * float(expected.std())


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4])
def test_convnet_shapes_follow_the_number_of_blocks(n_blocks: int) -> None:
    model = make(n_blocks=n_blocks)
    shapes = block_shapes(model)
    assert len(shapes) == n_blocks == len(model.bridges) + 1
    assert shapes[0] == ((16, 14, 14), (64, 7, 7))
    assert all(pair == ((64, 7, 7), (64, 7, 7)) for pair in shapes[1:])
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert model.edge_head()(model.stem(torch.zeros(2, 1, 28, 28))).shape == (2, 10)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize(("image_size", "classes"), [(32, 10), (224, 1000)])
def test_resnet18_has_the_known_number_of_parameters(
    cut: int, image_size: int, classes: int
) -> None:
    model = make("resnet18", on="meta", cut=cut, image_size=image_size, classes=classes)
    # torchvision's resnet18 for 1000 classes; the usual CIFAR variant (3x3 entry) for 10.
    known = {32: 11_173_962, 224: 11_689_512}[image_size]
    assert sum(p.numel() for p in model.parameters()) == known
    (shapes,) = block_shapes(model)
    channels = (64, 64, 128, 256)[cut]
    side = {32: (32, 32, 16, 8), 224: (56, 56, 28, 14)}[image_size][cut]
    assert shapes == ((channels, side, side), (512, 1, 1))


def test_resnet18_runs_and_its_cost_is_the_known_one() -> None:
    model = make("resnet18", cut=1).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    flops = count_flops(make("resnet18", on="meta", cut=1, image_size=224, classes=1000))
    # 1.81 G multiply-adds in convolutions and the last layer (torchvision's model card),
    # and the batch norms, which are counted too.
    assert (flops.edge + flops.cloud) / 2 == pytest.approx(1.81e9, rel=0.01)
    assert flops.collapsed_blocks == (None,)
    assert flops.edge_share_collapsed == flops.edge_share


def test_flops_agree_with_hand_arithmetic() -> None:
    flops = count_flops(make(n_blocks=2))
    # Entry 3x3, 16 -> 64 channels, then two 3x3, 64 -> 64, all on 7x7 pixels.
    assert flops.blocks[0] == 2 * 9 * 49 * (16 * 64 + 2 * 64 * 64)
    # Three 3x3, 64 -> 64, on 7x7 pixels.
    assert flops.blocks[1] == 2 * 9 * 49 * 3 * 64 * 64
    # Two batch norms on 64x7x7, one multiply-add per value.
    assert flops.bridges == (2 * 2 * 64 * 49,)
    # 3x3, 1 -> 16, and two 16 -> 16, four batch norms, on 14x14 pixels.
    assert flops.stem == 196 * (2 * 9 * (16 + 2 * 16 * 16) + 4 * 2 * 16)
    assert flops.head == 2 * 64 * 49 + 2 * (64 * 49 * 128 + 128 * 10)
    assert flops.edge == flops.stem + sum(flops.bridges) + flops.head
    assert flops.edge_share == flops.edge / (flops.edge + sum(flops.blocks))


def test_mixing_is_counted_for_the_group() -> None:
    plain, grouped = count_flops(make()), count_flops(make(), group_size=4)
    # Four times 3136 values cross the wire per input; K multiply-adds each.
    assert grouped.mixing == 2 * 4 * 4 * 3136
    assert grouped.edge == plain.edge + grouped.mixing


def test_convnet_keeps_the_device_small_and_honest() -> None:
    flops = count_flops(make(), group_size=4)
    assert flops.edge_share < 0.2
    assert max(flops.blocks) <= 15e6
    # The blocks are no cheaper collapsed, so the share is not flattered.
    assert flops.collapsed_blocks == flops.blocks


def test_a_deep_cascade_is_collapsed_in_the_honest_count() -> None:
    flops = count_flops(make(n_blocks=2, depth=4))
    dense = 2 * 3136 * 3136
    assert flops.blocks[1] > dense
    assert flops.collapsed_blocks == (dense, dense)
    assert flops.edge_share_collapsed > flops.edge_share
    # One 3x3 entry alone is cheapest as it is.
    shallow = count_flops(make(n_blocks=1, depth=0))
    assert shallow.collapsed_blocks == shallow.blocks == (2 * 9 * 49 * 16 * 64,)


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        (Architecture("vgg"), "architecture is 'vgg', expected one of 'audionet', 'bridgenet'"),
        (Architecture("convnet", {"n_blocks": 5}), "n_blocks is 5, expected an integer from 1"),
        (Architecture("convnet", {"width": 10**12}), "width is 1000000000000, expected"),
        (Architecture("convnet", {"width": "64"}), "width is '64', expected an integer"),
        (Architecture("convnet", {"width": True}), "width is True, expected an integer"),
        (Architecture("convnet", {"colour": 1}), "unknown option 'colour'"),
        (Architecture("resnet18", {"cut": 4}), "cut is 4, expected an integer from 0 to 3"),
        (
            Architecture("resnet18", {"image_size": 8}),
            "image_size is 8, expected an integer from 16",
        ),
    ],
)
def test_bad_architectures_are_refused(architecture: Architecture, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(architecture)
