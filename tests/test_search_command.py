"""The command as a user runs it, on a tiny data set of real files."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.cli import main
from cluster.search_cli import as_search
from datamix.errors import ConfigError
from edge.augment import Augmentation
from edge.data import load_sample
from edge.search.costs import cost
from edge.search.space import Candidate
from edge.search.training import HeldOutTrainer
from edge.search.trial import Trial
from edge.settings import TrainConfig

TINY: dict[str, int | str] = {
    "classes": 10,
    "input": "1,28,28",
    "stem_width": 4,
    "strides": 2,
    "widths": 8,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Fashion-MNIST's training files with 400 images; test files that nobody may read."""
    folder = tmp_path / "data"
    folder.mkdir()
    sample = load_sample()
    for kind, values in (("images-idx3", sample.inputs[:][:, 0]), ("labels-idx1", sample.labels)):
        part = values[:400].astype(np.uint8)
        header = bytes((0, 0, 8, part.ndim)) + struct.pack(f">{part.ndim}I", *part.shape)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + part.tobytes()))
        (folder / f"t10k-{kind}-ubyte.gz").write_bytes(b"whoever reads this fails")
    return folder


def run(*arguments: object, command: tuple[str, ...] = ("search",)) -> int:
    with pytest.raises(SystemExit) as end:
        main([*command, *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


GRID = ("--vary", "stem_width=4,6,64", "--option", "widths=8", "--option", "strides=2")
BUDGET = ("--max-bytes", 4000, "--group-size", 4, "--batch-size", 32, "--seconds", 0.5)


def test_a_search_from_files_to_a_picture_and_on_from_its_trials(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    arguments = ["--output", output, "--data", data, *GRID, *BUDGET, "--rungs", 2, "--jobs", 2]
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "refused: stem_width=64: bytes_per_inference 25,872, expected at most 4,000" in said
    assert "rung 2/2, 1 CPU s each: 1 of 1 trained, best" in said
    assert "share  collapsed" in said

    found: dict[str, Any] = json.loads((output / "search.json").read_text())
    assert [entry["rung"] for entry in found["trained"]] == [2, 1]
    assert found["front"] == [found["chosen"]]
    assert found["chosen"]["held_out_inputs"] == 40
    assert len(found["refused"]) == 1
    assert found["train_command"] in said
    assert "<svg" in (output / "search.svg").read_text()
    options: dict[str, int | str] = found["chosen"]["options"]
    candidate = Candidate("bridgenet", tuple(sorted(options.items())))
    costs = cost(candidate, group_size=4, wire_dtype="float16", input_shape=(1, 28, 28), classes=10)
    assert found["chosen"]["edge_flops_share_collapsed"] == costs.edge_flops_share_collapsed

    trials = (output / "trials.jsonl").read_text().splitlines()
    assert len(trials) == 4
    assert run(*arguments) == 0
    assert (output / "trials.jsonl").read_text().splitlines() == trials
    again = json.loads((output / "search.json").read_text())
    assert {**again, "command": ""} == {**found, "command": ""}
    assert run(*arguments[:-2], "--held-out", 0.2) == 2
    assert "other settings (held_out)" in capsys.readouterr().err


def test_train_with_search_is_the_search_and_nothing_else_is() -> None:
    assert as_search(["train", "--jobs", "2", "--search"]) == ["search", "--jobs", "2"]
    for other in ([], ["train"], ["--search"], ["evaluate", "--search"]):
        assert as_search(other) == other


def test_costs_only_trains_and_writes_nothing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    arguments = ["--output", output, "--data", data, *GRID, *BUDGET, "--costs-only"]
    assert run(*arguments, command=("train", "--search")) == 0
    said = capsys.readouterr().out
    assert "2 within the budget, 1 refused; 2 would be trained" in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*GRID, "--max-bytes", 1], "none of 3 architectures can be used"),
        (["--max-edge-share", 0], "edge_flops_share is 0.0"),
        (["--seconds", 0], "seconds is 0.0"),
        (["--jobs", 0], "jobs is 0"),
        (["--candidates", -1], "candidates is -1"),
        (["--seed", -1], "seed is -1"),
        (["--held-out", 1], "held_out is 1.0"),
        (["--batch-size", 6, "--method", "datamix"], "batch_size is 6, expected a multiple"),
        (["--method", "magic"], "method is 'magic', expected one of"),
        (["--preset", "none"], "preset is 'none', expected one of"),
        (["--dataset", "mnist"], "data set is 'mnist'"),
        (["--vary", "nothing=1,2"], "unknown option 'nothing'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    sentence: str,
) -> None:
    assert run("--output", tmp_path / "found", "--data", data, *arguments) == 2
    assert sentence in capsys.readouterr().err


# ------------------------------------------------------------------ the real trainer


def trainer(load: Callable[[], Any], **settings: Any) -> HeldOutTrainer:
    config = TrainConfig(group_size=4, augmentation=Augmentation(), **settings)
    return HeldOutTrainer(load, config, 0.3)


def trial(**options: int | str) -> Trial:
    merged = {**TINY, **options}
    return Trial(Candidate("bridgenet", tuple(sorted(merged.items()))), 2.0, 0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("cloud", ["linear", "prelu"])
def test_a_trained_network_knows_more_than_chance(cloud: str) -> None:
    method = "linear" if cloud == "linear" else "datamix"
    found = trainer(load_sample, batch_size=32, method=method)(
        trial(cloud=cloud, stem_width=8, widths="16")
    )
    assert found.n == 300
    assert found.accuracy > 0.3  # guessing gives 0.1


def test_speech_is_trained_too() -> None:
    found = trainer(_speech, batch_size=16)(trial(input="1,40,61", classes=11))
    assert 50 <= found.n <= 80  # whole speakers
    assert 0 < found.accuracy < 1  # 120 clips teach little


def _speech() -> Any:
    return load_sample("speech-commands")


def test_what_cannot_be_trained_is_refused() -> None:
    speech = trial(input="1,40,61", classes=11)
    with pytest.raises(ConfigError, match="fewer than one batch"):
        trainer(_speech, batch_size=1024)(speech)
    with pytest.raises(ConfigError, match="expects"):
        trainer(load_sample, batch_size=32)(speech)
    with pytest.raises(ConfigError, match="the others for the method"):
        trainer(load_sample, batch_size=32, method="datamix")(trial(cloud="linear"))
