from pathlib import Path

import numpy as np
import pytest
import torch

from datamix.bundle import (
    BACKBONE,
    ArchitectureSpec,
    ImagePreprocessing,
    load_backbone,
    save_bundle,
)
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build
from edge.runtime import TorchDevice
from edge.session import Device, infer_group

OPTIONS: dict[str, int | str] = {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16}


@pytest.fixture(scope="module")
def model() -> SplitModel:
    torch.manual_seed(0)
    model = build(Architecture("convnet", OPTIONS))
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(32, 1, 28, 28))
    return model.eval()


@pytest.fixture(scope="module")
def bundle(model: SplitModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(
        path,
        model,
        name="small",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name="convnet", options=OPTIONS),
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=(1, 28, 28), mean=(0.25,), std=(0.5,)
        ),
        class_names=tuple("abcdefghij"),
        tolerance=0.01,
        metrics={},
    )
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (8, 1, 28, 28), dtype=np.uint8)


def test_a_session_through_the_blocks_gives_the_models_own_logits(
    model: SplitModel, bundle: Path, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    device: Device = TorchDevice(bundle)
    _, blocks = load_backbone(bundle)
    inputs = device.preprocess(images[:4])
    session = infer_group(device, device.stem(inputs))
    logits = None
    rounds = []
    try:
        wanted = next(session)
        while True:
            rounds.append(wanted.block)
            with torch.inference_mode():
                answer = blocks[wanted.block](torch.from_numpy(wanted.features)).numpy()
            wanted = session.send(answer)
    except StopIteration as end:
        logits = end.value
    assert rounds == [0, 1]
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    assert logits is not None
    assert expected.std() > 0.01
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-4)


def test_the_device_needs_no_backbone(model: SplitModel, bundle: Path, tmp_path: Path) -> None:
    for file in bundle.iterdir():
        if file.name != BACKBONE:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    device = TorchDevice(tmp_path)
    inputs = np.zeros((2, 1, 28, 28), np.float32)
    with torch.inference_mode():
        expected = model.stem(torch.from_numpy(inputs)).numpy()
    np.testing.assert_array_equal(device.stem(inputs), expected)


def test_preprocessing_is_the_stated_formula(
    bundle: Path, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    device = TorchDevice(bundle)
    inputs = device.preprocess(images)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs, (images / 255 - 0.25) / 0.5, atol=1e-6)
    same = device.preprocess(images.astype(np.float32) / 255)
    np.testing.assert_allclose(same, inputs, atol=1e-6)
    assert device.preprocess(images[:0]).shape == (0, 1, 28, 28)


def test_read_only_and_strided_arrays_are_fine(
    bundle: Path, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    device = TorchDevice(bundle)
    inputs = device.preprocess(images)
    frozen = inputs.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(device.stem(frozen), device.stem(inputs))
    np.testing.assert_allclose(device.stem(inputs[::2]), device.stem(inputs)[::2], atol=1e-6)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (np.zeros((2, 28, 28), np.uint8), r"shape \(2, 28, 28\), expected \('n', 1, 28, 28\)"),
        (np.zeros((1, 28, 28), np.uint8), "expected"),
        (np.zeros((2, 3, 28, 28), np.uint8), "expected"),
        (np.zeros((2, 1, 28, 28), np.int64), "dtype int64, expected uint8 or float32"),
        (np.full((2, 1, 28, 28), 1.5, np.float32), "outside 0..1"),
        (np.full((2, 1, 28, 28), np.nan, np.float32), "outside 0..1"),
    ],
)
def test_odd_inputs_are_refused(
    bundle: Path, raw: np.ndarray[tuple[int, ...], np.dtype[np.generic]], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TorchDevice(bundle).preprocess(raw)


def test_odd_calls_are_refused(bundle: Path) -> None:
    device = TorchDevice(bundle)
    with pytest.raises(ConfigError, match="bridge 1 asked for, the bundle has 1"):
        device.bridge(1, np.zeros((4, 8, 7, 7), np.float32))
    with pytest.raises(ConfigError, match="features have shape"):
        device.bridge(0, np.zeros((4, 8, 7, 8), np.float32))
    with pytest.raises(ConfigError, match="features have shape"):
        device.head(np.zeros((4, 8, 7), np.float32))
    with pytest.raises(ConfigError, match="threads is 0"):
        TorchDevice(bundle, threads=0)
