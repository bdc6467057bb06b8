"""`datamix train|experiment|results`: the flags are the settings, and reach them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster import cli
from datamix.errors import ConfigError
from datamix.models import Architecture
from edge.augment import Augmentation
from edge.data import load_sample
from edge.results import put_rows
from edge.settings import TrainConfig
from tests.test_fit import part_of
from tests.test_results import both, row


def options(command: str) -> dict[str, Any]:
    commands: Any = typer.main.get_command(cli.app)
    return {
        flag: option
        for option in commands.commands[command].params
        for flag in (*option.opts, *option.secondary_opts)
    }


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_every_setting_has_a_flag_that_explains_itself() -> None:
    train, experiment = options("train"), options("experiment")
    for field in dataclasses.fields(TrainConfig):
        if field.name in ("architecture", "augmentation"):
            continue
        flag = "--model-version" if field.name == "version" else f"--{field.name.replace('_', '-')}"
        assert len(train[flag].help) > 10, flag
        if field.default not in (None, dataclasses.MISSING):
            assert f"(default {field.default})" in train[flag].help
    assert {"--architecture", "--option", "--augment", "--no-channels-last"} <= train.keys()
    for flag in ("--seed", "--method", "--group-size", "--teacher"):
        assert flag not in experiment
    assert {"--seeds", "--arms", "--budget-cpu-s", "--threads"} <= experiment.keys()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, str]]:
    """What `train` was asked for, instead of training."""
    asked: list[tuple[TrainConfig, str]] = []
    sample = part_of(load_sample(), 0, 10)

    def load(name: str, split: str, folder: Path | None) -> Any:
        return dataclasses.replace(sample, name=name)

    def train(config: TrainConfig, training: Any, *_: Any, **__: Any) -> None:
        asked.append((config, training.name))

    monkeypatch.setattr("edge.data.load_dataset", load)
    monkeypatch.setattr("edge.train.train", train)
    return asked


def test_no_flag_is_the_recipe_of_the_shipped_bundle(
    trained: list[tuple[TrainConfig, str]],
) -> None:
    assert run("train", "--output", "x", "--epochs", "12", "--seed", "0", "--threads", "1") == 0
    assert trained == [(TrainConfig(), "fashion-mnist")]


def test_flags_reach_the_settings(trained: list[tuple[TrainConfig, str]]) -> None:
    words = (
        "--method bounded --noise-sigma 0.5 --group-size 8 --budget-cpu-s 60 --optimizer sgd"
        " --schedule cosine --channels-last --ema-decay 0.99 --law dirichlet --rounds 3"
        " --option stem_width=8 --augment shift=2 --augment flip=false --augment padding=reflect"
    )
    assert run("train", "--output", "x", *words.split()) == 0
    (config, _), *_ = trained
    assert config == TrainConfig(
        architecture=Architecture("convnet", {"n_blocks": 3, "stem_width": 8}),
        augmentation=Augmentation(shift=2, flip=False, padding="reflect"),
        method="bounded", noise_sigma=0.5, group_size=8, budget_cpu_s=60.0, optimizer="sgd",
        schedule="cosine", channels_last=True, ema_decay=0.99, law="dirichlet",
    )  # fmt: skip


def test_a_preset_is_where_flags_start_from(trained: list[tuple[TrainConfig, str]]) -> None:
    from edge.presets import PRESETS

    assert run("train", "--output", "x", "--preset", "cifar10", "--seed", "4") == 0
    base = PRESETS["cifar10"].config
    assert trained == [(dataclasses.replace(base, seed=4), "cifar10")]
    assert run("train", "--output", "x", "--preset", "cifar10", "--rounds", "1") == 0
    options_ = trained[-1][0].architecture.options
    assert options_ == {**base.architecture.options, "rounds": 1}
    # Another network starts from its own defaults.
    more = ("--architecture", "resnet18", "--method", "datamix")
    assert run("train", "--output", "x", "--preset", "cifar10", *more) == 0
    assert trained[-1][0].architecture == Architecture("resnet18", {})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--method magic", "method is 'magic', expected one of linear, datamix"),
        ("--option depth", "got 'depth', expected KEY=VALUE"),
        ("--augment size=3", "augment has 'size', expected one of shift"),
        ("--augment shift=far", "augment shift is 'far'"),
        ("--augment flip=perhaps", "augment flip is 'perhaps'"),
        ("--preset x", "preset is 'x'"),
        ("--method nonlinear", "the method nonlinear has no teacher"),
        ("--method bounded", "noise_sigma is 0.0, expected more than 0"),
        ("--noise-sigma 1", "noise_sigma is 1.0, expected 0 for the method linear"),
        ("--precision float16", "precision is 'float16' on the device 'cpu'"),
        ("--group-size 33", "group_size is 33, expected 1 to 32"),
        ("--epochs 0", "epochs is 0"),
        ("--budget-cpu-s -1", "budget_cpu_s is -1.0"),
        ("--workers 0", "workers is 0, expected at least 2"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    trained: list[tuple[TrainConfig, str]],
    capsys: pytest.CaptureFixture[str],
    words: str,
    sentence: str,
) -> None:
    assert run("train", "--output", "x", *words.split()) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not trained


def test_experiments_are_run_and_their_page_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def experiment(preset: Any, *_: Any, **how: Any) -> None:
        asked.update(how, preset=preset.name)

    monkeypatch.setattr("edge.data.load_dataset", lambda *_: load_sample())
    monkeypatch.setattr("edge.experiment.experiment", experiment)
    words = "experiment cifar10 --seeds 3,4 --arms linear,datamix --budget-cpu-s 60 --threads 2"
    assert run(*words.split(), "--results", str(tmp_path / "r.json")) == 0
    assert asked["preset"] == "cifar10"
    assert asked["seeds"] == (3, 4)
    assert asked["labels"] == ("linear", "datamix")
    assert (asked["budget_cpu_s"], asked["threads"]) == (60.0, 2)
    assert "epochs" not in asked
    assert run("experiment", "cifar10", "--seeds", "one") == 2
    put_rows(tmp_path / "r.json", [row(), *both()])
    page = tmp_path / "page.md"
    assert run("results", "--json", str(tmp_path / "r.json"), "--markdown", str(page)) == 0
    assert "## cifar10" in page.read_text()
    assert (tmp_path / "page" / "cifar10.svg").is_file()


def test_weights_of_a_baseline_are_a_teacher(tmp_path: Path) -> None:
    """Through `train` itself: no bundle, but a file that a student can learn from."""
    from edge.train import train
    from edge.weights import load

    sample = part_of(load_sample(), 0, 64)
    small = Architecture(
        "bridgenet",
        {"stem_width": 4, "stem_units": 1, "widths": "6,8", "strides": "2,1", "rounds": 1},
    )
    config = TrainConfig(architecture=small, method="unmixed", epochs=1, batch_size=32)
    lines: list[str] = []
    assert train(config, sample, sample, tmp_path / "t", report=lines.append) is None
    assert lines[-1].startswith("accuracy ")
    assert load(tmp_path / "t" / "weights.pt").get_parameter("stem.0.weight").shape[0] == 4
    student = dataclasses.replace(
        config, method="nonlinear", teacher=str(tmp_path / "t" / "weights.pt")
    )
    manifest = train(student, sample, sample, tmp_path / "s", report=lines.append)
    assert manifest is not None
    assert manifest.architecture.options["cloud"] == "prelu"
    # A bundle teaches as well.
    again = dataclasses.replace(student, teacher=str(tmp_path / "s"))
    assert train(again, sample, sample, tmp_path / "u", report=lines.append) is not None
    with pytest.raises(ConfigError, match="nowhere"):
        train(dataclasses.replace(student, teacher="nowhere"), sample, sample, tmp_path / "v")


def test_figures_go_to_tensorboards_files(tmp_path: Path) -> None:
    from cluster.training_cli import _scalars

    with _scalars(None) as nothing:
        assert nothing is None
    with _scalars(tmp_path / "board") as scalars:
        scalars.add_scalar("loss/step", 0.5, 20)
    (file,) = (tmp_path / "board").iterdir()
    assert b"loss/step" in file.read_bytes()
