"""A bundle and its card from what an experiment kept."""

import dataclasses
from pathlib import Path

import pytest

from datamix.bundle import read_manifest
from datamix.errors import ConfigError
from datamix.models import Architecture
from edge.data import Dataset, load_sample
from edge.experiment import experiment
from edge.presets import Arm, Preset
from edge.promises import promise
from edge.results import read_rows
from edge.settings import TrainConfig
from edge.shipping import ship

SIZES: dict[str, int | str] = {"stem_width": 4, "widths": "6,8", "strides": "2,1", "stem_units": 0}
PRESET = Preset(
    "small",
    "fashion-mnist",
    TrainConfig(architecture=Architecture("bridgenet", SIZES), epochs=1, batch_size=40),
    (
        Arm("unmixed", "unmixed"),
        Arm("edge-only", "edge-only"),
        Arm("linear", "linear", (2, 4)),
        Arm(
            "bounded",
            "bounded",
            (2,),
            sigmas=(0.1, 1.5),
            options={"rounds": 1, "sent_width": 2},
        ),
    ),
)


def part_of(start: int, end: int) -> Dataset:
    data = load_sample()
    return dataclasses.replace(data, inputs=data.inputs[start:end], labels=data.labels[start:end])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment that has run."""
    folder = tmp_path_factory.mktemp("experiment")
    experiment(
        PRESET, part_of(0, 200), part_of(900, 1000), seeds=[0, 1], results=folder / "rows.json",
        runs=folder / "runs", labels=["unmixed", "edge-only", "linear", "bounded"],
        report=lambda _: None,
    )  # fmt: skip
    return folder


def shipped(
    kept: Path, output: Path, label: str = "linear", seed: int = 1, sigma: float | None = None
) -> Path:
    ship(
        PRESET, part_of(0, 200), part_of(900, 1000), output, label=label, seed=seed, group_size=4,
        runs=kept / "runs", results=kept / "rows.json", name="small-mix", version="7",
        noise_sigma=sigma,
    )  # fmt: skip
    return output


def test_the_bundle_is_the_trained_network_and_its_card_says_how_good_it_is(
    kept: Path, tmp_path: Path
) -> None:
    bundle = shipped(kept, tmp_path / "small")
    manifest = read_manifest(bundle)
    assert (manifest.name, manifest.version, manifest.group_size) == ("small-mix", "7", 4)
    assert manifest.metrics["seed"] == 1
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "obfuscation, not protection" in card
    assert "MIT licence" in card
    assert f"{manifest.metrics['accuracy_unmixed']:.2%}" in card
    assert f"{manifest.metrics['accuracy_edge_only']:.2%}" in card
    assert "| Ankle boot |" in card
    assert "datamix experiment small --arms edge-only,linear --seeds 1\n" in card
    assert "datamix bundle small --arm linear --seed 1 --group-size 4" in card
    assert "/" not in card.partition("--output ")[2].splitlines()[0]


def test_a_network_that_was_trained_with_noise_is_shipped_with_it(
    kept: Path, tmp_path: Path
) -> None:
    bundle = shipped(kept, tmp_path / "noisy", label="bounded", sigma=1.5)
    manifest = read_manifest(bundle)
    assert (manifest.mode, manifest.modes, manifest.group_size) == ("bounded", ("bounded",), 4)
    assert manifest.bounded is not None and manifest.bounded.sigma == 1.5
    rows = {row.noise_sigma: row for row in read_rows(kept / "rows.json") if row.seed == 1}
    row = rows[1.5]
    assert promise(manifest).bits_per_input == pytest.approx(row.bits_per_input)
    # The client's own way, and that of experiments: the same but for chance.
    assert manifest.metrics["accuracy_mixed"] == pytest.approx(row.accuracy, abs=0.15)
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "at most" in card and "bits per input" in card and "obfuscation" not in card
    assert "--arm bounded --seed 1 --noise-sigma 1.5 --group-size 4" in card


def test_what_was_not_trained_is_not_shipped(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no training of linear with seed 5, expected what"):
        shipped(kept, tmp_path / "b", seed=5)
    with pytest.raises(ConfigError, match="unmixed has no linear blocks"):
        shipped(kept, tmp_path / "b", label="unmixed")
    with pytest.raises(ConfigError, match="arm is 'nobody'"):
        shipped(kept, tmp_path / "b", label="nobody")
    assert not (tmp_path / "b").exists()
