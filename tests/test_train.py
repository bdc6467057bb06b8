import dataclasses
import gzip
import itertools
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.cli import main
from datamix.bundle import load_backbone, load_device, read_manifest
from datamix.errors import ConfigError
from datamix.models import Architecture, build
from edge.data import Dataset, load_sample
from edge.fit import stop_on_interrupt
from edge.settings import TrainConfig
from edge.train import measure_tolerance, train

SMALL = Architecture("convnet", {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16})
CONFIG = TrainConfig(architecture=SMALL, epochs=2, batch_size=32, seed=3)


def part_of(data: Dataset, start: int, end: int) -> Dataset:
    return dataclasses.replace(data, inputs=data.inputs[start:end], labels=data.labels[start:end])


@pytest.fixture(scope="module")
def training() -> Dataset:
    return part_of(load_sample(), 0, 200)


@pytest.fixture(scope="module")
def test() -> Dataset:
    return part_of(load_sample(), 900, 1000)


def after(steps: int) -> Callable[[], bool]:
    """A stop that is true from the n-th question on."""
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


def files(bundle: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in bundle.iterdir() if f.suffix == ".safetensors"}


def quiet(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, training: Dataset, test: Dataset
) -> dict[str, bytes]:
    """The weights of a run that nobody interrupted."""
    path = tmp_path_factory.mktemp("straight") / "bundle"
    train(CONFIG, training, test, path, report=quiet)
    return files(path)


# Six steps per epoch, twelve per phase: at once and within an epoch, at an epoch's end, within the
# baseline.
@pytest.mark.parametrize("steps", [[1, 4], [6], [12, 5]])
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path,
    training: Dataset,
    test: Dataset,
    straight: dict[str, bytes],
    steps: list[int],
) -> None:
    assert continued(CONFIG, training, test, tmp_path / "cut", steps) == straight
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_run_that_mixes_goes_on_bit_for_bit_too(
    tmp_path: Path, training: Dataset, test: Dataset, straight: dict[str, bytes]
) -> None:
    config = dataclasses.replace(CONFIG, method="bounded", noise_sigma=0.3)
    train(config, training, test, tmp_path / "straight", report=quiet)
    mixed = continued(config, training, test, tmp_path / "cut", [4])
    assert mixed == files(tmp_path / "straight")
    assert mixed != straight


def continued(
    config: TrainConfig, training: Dataset, test: Dataset, output: Path, steps: list[int]
) -> dict[str, bytes]:
    """Weights of a run that is stopped after so many steps, each time, and then finished."""
    lines: list[str] = []
    for count in steps:
        with pytest.raises(KeyboardInterrupt):
            train(config, training, test, output, report=lines.append, stop=after(count))
        assert "run the same command again" in lines[-1]
        torch.manual_seed(99)  # whatever the process did in between
    train(config, training, test, output, report=lines.append)
    assert any("going on from step" in line for line in lines)
    return files(output)


def test_a_checkpoint_lost_in_writing_leaves_the_one_before(
    tmp_path: Path,
    training: Dataset,
    test: Dataset,
    straight: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(CONFIG, training, test, tmp_path / "cut", report=quiet)
    lines: list[str] = []
    train(CONFIG, training, test, tmp_path / "cut", report=lines.append)
    assert lines[0] == "through-the-cloud: going on from step 6 of 12"
    assert files(tmp_path / "cut") == straight


def test_seeds_decide_and_differ(tmp_path: Path, training: Dataset, test: Dataset) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = dataclasses.replace(CONFIG, seed=seed, epochs=1)
        train(config, training, test, tmp_path / name, report=quiet)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_other_settings_do_not_continue_a_run(
    tmp_path: Path, training: Dataset, test: Dataset
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, training, test, tmp_path / "b", report=quiet, stop=lambda: True)
    other = dataclasses.replace(CONFIG, epochs=3)
    with pytest.raises(ConfigError, match="other settings or data"):
        train(other, training, test, tmp_path / "b", report=quiet)
    checkpoint = tmp_path / "b.training" / "through-the-cloud.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read"):
        train(CONFIG, training, test, tmp_path / "b", report=quiet)


def test_the_model_learns_and_the_manifest_tells(tmp_path: Path) -> None:
    training, test = part_of(load_sample(), 0, 800), part_of(load_sample(), 800, 1000)
    config = dataclasses.replace(CONFIG, epochs=6, peak_rate=1e-2)
    lines: list[str] = []
    manifest = train(config, training, test, tmp_path / "b", report=lines.append)
    assert manifest == read_manifest(tmp_path / "b")
    load_device(tmp_path / "b")
    load_backbone(tmp_path / "b")
    for kind in ("unmixed", "mixed", "edge_only"):
        assert manifest.metrics[f"accuracy_{kind}"] > 0.5  # guessing gives 0.1
    assert abs(manifest.metrics["accuracy_mixed"] - manifest.metrics["accuracy_unmixed"]) <= 0.01
    assert manifest.metrics["test_images"] == 200
    assert 1e-6 < manifest.tolerance < 0.05
    assert lines[-1].startswith("edge-only: epoch 6/6, step 150/150, loss ")
    assert "images/s" in lines[-1]
    assert "left" in lines[-1]


def test_tolerance_covers_what_float16_does(training: Dataset) -> None:
    torch.manual_seed(0)
    model = build(SMALL)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 1, 28, 28))
    tolerance = measure_tolerance(model.eval(), training, 4, seed=0)
    assert 2 * 2**-12 < tolerance < 0.02
    other = measure_tolerance(model, training, 4, seed=1)
    assert other / 2 < tolerance  # another draw's worst error stays below


def test_ctrl_c_asks_first_and_insists_later() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0, expected 1 to "),
        ({"group_size": 0}, "group_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"peak_rate": float("nan")}, "peak_rate is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"method": "datamix", "batch_size": 6}, "batch_size is 6, expected a multiple"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(**changes)


def test_unfit_data_and_folders_are_refused(
    tmp_path: Path, training: Dataset, test: Dataset
) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        train(CONFIG, training, test, tmp_path, report=quiet)
    few = part_of(training, 0, 20)
    with pytest.raises(ConfigError, match="20 inputs are fewer than one batch of 32"):
        train(CONFIG, few, test, tmp_path / "a", report=quiet)
    resnet = dataclasses.replace(CONFIG, architecture=Architecture("resnet18"), method="datamix")
    with pytest.raises(ConfigError, match="fashion-mnist has inputs of"):
        train(resnet, training, test, tmp_path / "b", report=quiet)
    assert not (tmp_path / "b.training").exists()


def test_the_command_trains_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = load_sample()
    images = sample.inputs[:]
    for stem, start, end in (("train", 0, 128), ("t10k", 900, 1000)):
        for kind, values in (("images-idx3", images[:, 0]), ("labels-idx1", sample.labels)):
            part = values[start:end].astype(np.uint8)
            header = bytes((0, 0, 8, part.ndim)) + struct.pack(f">{part.ndim}I", *part.shape)
            body = gzip.compress(header + part.tobytes())
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(body)
    monkeypatch.setenv("DATAMIX_DATA", str(tmp_path))
    arguments = ["train", "--output", str(tmp_path / "b"), "--epochs", "1", "--rounds", "1"]
    with pytest.raises(SystemExit) as end_:
        main([*arguments, "--batch-size", "32", "--name", "tiny", "--model-version", "7"])
    assert end_.value.code == 0
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.name, manifest.version, len(manifest.blocks)) == ("tiny", "7", 1)
    assert "epoch 1/1, step 4/4" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end_:
        main(arguments)
    assert end_.value.code == 2
    assert "exists already" in capsys.readouterr().err
