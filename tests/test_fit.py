"""The loop: it repeats, survives what kills it, keeps to its budget and tells what it does."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from datamix.errors import ConfigError
from datamix.models import Architecture
from edge.accuracy import accuracy
from edge.augment import Augmentation
from edge.data import Dataset, load_sample
from edge.fit import TRIAL_STEPS, Fitted
from edge.learner import Learner
from edge.runs import fit_method
from edge.settings import TrainConfig
from edge.weights import digest, keep, load
from edge.workers import Alone

TINY = Architecture(
    "bridgenet", {"stem_width": 4, "stem_units": 1, "widths": "6,8", "strides": "2,1"}
)
CONFIG = TrainConfig(
    architecture=TINY,
    epochs=2,
    batch_size=32,
    seed=3,
    ema_decay=0.9,
    clip_norm=1.0,
    label_smoothing=0.1,
)


def part_of(data: Dataset, start: int, end: int) -> Dataset:
    return dataclasses.replace(data, inputs=data.inputs[start:end], labels=data.labels[start:end])


@pytest.fixture(scope="module")
def data() -> Dataset:
    return part_of(load_sample(), 0, 200)


def quiet(_: str) -> None:
    return None


def weights(part: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def fitted(config: TrainConfig, data: Dataset, path: Path, **how: Any) -> tuple[nn.Module, Fitted]:
    return fit_method(config, data, path, **{"report": quiet, "stop": lambda: False, **how})


VARIANTS = [
    {"optimizer": "muon", "schedule": "triangle"},
    {"optimizer": "sgd", "peak_rate": 0.05, "schedule": "cosine", "warm_up": 0.1},
    {"precision": "bfloat16", "channels_last": True},
    {"method": "datamix", "group_size": 8, "law": "gaussian", "curriculum": 0.5},
    {"method": "bounded", "noise_sigma": 0.5, "deterministic": True},
    {"method": "edge-only", "validate": 0.1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, data: Dataset, changes: dict[str, Any]
) -> None:
    if changes.get("method") == "datamix":
        changes = {
            **changes,
            "architecture": dataclasses.replace(TINY, options={**TINY.options, "rounds": 1}),
        }
    config = dataclasses.replace(CONFIG, **changes)
    straight, whole = fitted(config, data, tmp_path / "a.pt")
    asked = iter([False] * 3 + [True])
    with pytest.raises(KeyboardInterrupt):
        fitted(config, data, tmp_path / "b.pt", stop=lambda: next(asked))
    torch.manual_seed(99)
    resumed, again = fitted(config, data, tmp_path / "b.pt")
    assert same(weights(straight), weights(resumed))
    assert not resumed.training
    assert (again.steps, again.epochs) == (whole.steps, whole.epochs)
    assert [e.accuracy for e in again.history] == [e.accuracy for e in whole.history]
    assert len(whole.history) == 2
    assert (whole.history[0].accuracy is not None) == ("validate" in changes)
    first, last = whole.history[0], whole.history[-1]
    assert last.loss < first.loss or "curriculum" in changes  # mixing made it harder


SCRIPT = """
import sys
from pathlib import Path
import tests.test_fit as here
config = here.dataclasses.replace(here.CONFIG, epochs=30, optimizer="muon")
data = here.part_of(here.load_sample(), 0, 200)
part, _ = here.fitted(config, data, Path(sys.argv[1]), report=print)
here.keep(Path(sys.argv[2]), part, config.method, config.architecture)
"""


def run(*arguments: Path) -> "subprocess.Popen[bytes]":
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = run(tmp_path / "a.pt", tmp_path / "a.weights")
    assert straight.wait(120) == 0
    rng = np.random.default_rng()  # another moment each time: there must be no bad one
    checkpoint = tmp_path / "b.pt"
    kills = 0
    for _ in range(3):
        process = run(checkpoint, tmp_path / "b.weights")
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and not (
            checkpoint.exists() and checkpoint.stat().st_mtime_ns > before
        ):
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.3)))  # somewhere within the steps that follow
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    assert run(checkpoint, tmp_path / "b.weights").wait(120) == 0
    pair = [load(tmp_path / name).state_dict() for name in ("a.weights", "b.weights")]
    assert same(*pair)


def test_the_average_of_weights_is_what_is_kept(tmp_path: Path, data: Dataset) -> None:
    config = dataclasses.replace(CONFIG, ema_decay=0.5)
    averaged, _ = fitted(config, data, tmp_path / "a.pt")
    plain, _ = fitted(dataclasses.replace(config, ema_decay=0.0), data, tmp_path / "b.pt")
    assert not same(weights(averaged), weights(plain))
    # By hand, on the weights of a few steps.
    part = nn.Linear(2, 1)
    learner = Learner(part, dataclasses.replace(config, clip_norm=0.0), Alone())
    expected = part.weight.detach().clone()
    for step in range(5):
        learner.learn(step, 5, lambda: part(torch.ones(1, 2)).square().sum())
        keep_ = min(0.5, (1 + step) / (10 + step))
        expected = keep_ * expected + (1 - keep_) * part.weight.detach()
    raw = part.weight.detach().clone()
    with learner.averaged() as now:
        torch.testing.assert_close(now.get_parameter("weight").detach(), expected)
        assert not now.training
    assert torch.equal(part.weight.detach(), raw)
    assert part.training
    learner.finish()
    torch.testing.assert_close(part.weight.detach(), expected)


def test_gradients_are_clipped() -> None:
    part = nn.Linear(2, 1, bias=False)
    config = dataclasses.replace(
        CONFIG, optimizer="sgd", peak_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-3,
        schedule="constant", warm_up=0.0,
    )  # fmt: skip
    before = part.weight.detach().clone()
    Learner(part, config, Alone()).learn(0, 1, lambda: 1e6 * part(torch.ones(1, 2)).sum())
    assert float((part.weight.detach() - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_budget_of_processor_time_is_kept_and_frozen(tmp_path: Path, data: Dataset) -> None:
    config = dataclasses.replace(CONFIG, budget_cpu_s=4.0)
    lines: list[str] = []
    asked = iter([False] * 5 + [True])
    with pytest.raises(KeyboardInterrupt):
        fitted(config, data, tmp_path / "a.pt", report=lines.append, stop=lambda: next(asked))
    planned = int(lines[0].split()[0])
    assert lines[0] == f"{planned} steps fit into 4 CPU s"
    assert planned > TRIAL_STEPS
    _, found = fitted(config, data, tmp_path / "a.pt", report=lines.append)
    assert f"going on from step 6 of {planned}" in lines
    assert found.steps == planned
    assert found.epochs == pytest.approx(planned / 6, abs=1e-3)
    assert 1.5 < found.cpu_seconds < 8  # other processes slow each step down or speed it up
    with pytest.raises(ConfigError, match=f"but {TRIAL_STEPS} steps alone took"):
        fitted(dataclasses.replace(config, budget_cpu_s=0.01), data, tmp_path / "b.pt")


def test_a_teacher_is_learnt_from(tmp_path: Path, data: Dataset) -> None:
    one_round = dataclasses.replace(TINY, options={**TINY.options, "rounds": 1})
    config = dataclasses.replace(CONFIG, architecture=one_round, ema_decay=0.0)
    teacher, _ = fitted(dataclasses.replace(config, method="unmixed"), data, tmp_path / "t.pt")
    path = tmp_path / "teacher.pt"
    keep(path, teacher, "unmixed", one_round)
    assert same(weights(load(path)), weights(teacher))
    student = dataclasses.replace(
        config, method="nonlinear", teacher=str(path), teacher_weight=1.0, epochs=4
    )
    taught, _ = fitted(student, data, tmp_path / "a.pt")
    # From the teacher alone: the labels are all wrong, and yet it learns.
    wrong = dataclasses.replace(data, labels=np.zeros_like(data.labels))
    blind, _ = fitted(student, wrong, tmp_path / "b.pt")
    assert same(weights(taught), weights(blind))
    heeding = dataclasses.replace(student, teacher_weight=0.5)
    assert not same(weights(fitted(heeding, wrong, tmp_path / "c.pt")[0]), weights(taught))
    # Another teacher under the same name does not go on with the run.
    asked = iter([True])
    with pytest.raises(KeyboardInterrupt):
        fitted(student, data, tmp_path / "d.pt", stop=lambda: next(asked))
    mark = digest(path)
    keep(path, load(tmp_path / "teacher.pt"), "unmixed", one_round)
    assert digest(path) == mark
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    keep(path, teacher, "unmixed", one_round)
    assert digest(path) != mark
    with pytest.raises(ConfigError, match="other settings or data"):
        fitted(student, data, tmp_path / "d.pt")
    for bad in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(ConfigError, match="nor weights that training kept"):
            load(bad)


class Noted:
    def __init__(self) -> None:
        self.figures: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        self.figures.append((tag, value, step))


def test_figures_are_told_as_they_come(tmp_path: Path) -> None:
    noted = Noted()
    config = dataclasses.replace(CONFIG, validate=0.1)
    _, found = fitted(config, part_of(load_sample(), 0, 400), tmp_path / "a.pt", scalars=noted)
    steps = {
        tag: [at for name, _, at in noted.figures if name == tag] for tag, _, _ in noted.figures
    }
    assert steps["loss/step"] == steps["rate"] == [20]
    for tag in ("speed/images_per_s", "loss/epoch", "accuracy/held_out"):
        assert steps[tag] == [11, 22]
    held_out = [value for tag, value, _ in noted.figures if tag == "accuracy/held_out"]
    assert held_out == [epoch.accuracy for epoch in found.history]


def test_held_out_inputs_are_not_learnt_from(tmp_path: Path, data: Dataset) -> None:
    from edge.batches import held_out

    learnt, aside = held_out(data, 0.1)
    assert aside is not None
    assert (len(learnt), len(aside)) == (180, 20)
    rows = [image.tobytes() for image in data.inputs[:]]
    kept = {image.tobytes() for image in learnt.inputs[:]}
    kept_aside = {image.tobytes() for image in aside.inputs[np.arange(20)]}
    assert kept | kept_aside == set(rows)
    assert not kept & kept_aside
    config = dataclasses.replace(CONFIG, validate=0.1, ema_decay=0.0)
    changed = dataclasses.replace(data, labels=data.labels.copy())
    places = [rows.index(image.tobytes()) for image in aside.inputs[:]]
    changed.labels[places] = 0
    one, _ = fitted(config, data, tmp_path / "a.pt")
    other, _ = fitted(config, changed, tmp_path / "b.pt")
    assert same(weights(one), weights(other))
    with pytest.raises(ConfigError, match="validate is 0.001"):
        held_out(data, 0.001)


def test_speech_is_trained_with_masks(tmp_path: Path) -> None:
    speech = load_sample("speech-commands")
    speech = dataclasses.replace(
        speech, inputs=speech.inputs[:64], labels=speech.labels[:64], attributes={}
    )
    network = Architecture("bridgenet", {**TINY.options, "input": "1,40,61", "classes": 11})
    how = Augmentation(time_shift_ms=50, noise=0.01, mask_mels=8, mask_frames=8)
    config = dataclasses.replace(CONFIG, architecture=network, augmentation=how)
    part, _ = fitted(config, speech, tmp_path / "a.pt")
    bare = dataclasses.replace(how, mask_mels=0, mask_frames=0)
    other, _ = fitted(dataclasses.replace(config, augmentation=bare), speech, tmp_path / "b.pt")
    assert not same(weights(part), weights(other))
    assert 0 <= accuracy(part, speech, config, None) <= 1


def test_accuracy_counts_each_input_once(data: Dataset) -> None:
    from edge.mixtures import Mixing
    from edge.networks import untrained

    part = untrained("linear", TINY, 0).eval()
    odd = part_of(data, 0, 37)
    with torch.inference_mode():
        from edge.preprocess import preprocessor

        guesses = part(torch.from_numpy(preprocessor(odd.preprocessing)(odd.inputs[:]))).argmax(1)
    sure = dataclasses.replace(odd, labels=guesses.numpy())
    for mixing in (None, Mixing(8), Mixing(32, wire="float32")):
        assert accuracy(part, sure, CONFIG, mixing) >= 36 / 37
    wrong = dataclasses.replace(odd, labels=(guesses.numpy() + 1) % 10)
    assert accuracy(part, wrong, CONFIG, Mixing(8)) <= 1 / 37


def test_cuda_is_asked_for_in_vain(tmp_path: Path, data: Dataset) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="device is 'cuda', but torch finds no CUDA device"):
        fitted(dataclasses.replace(CONFIG, device="cuda"), data, tmp_path / "a.pt")
