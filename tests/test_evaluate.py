import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli import main
from datamix.bundle import ArchitectureSpec, LogMelPreprocessing, read_manifest, save_bundle
from datamix.errors import ConfigError
from datamix.models import Architecture, SplitModel, build, count_flops
from edge.data import Dataset, load_sample
from edge.evaluate import Evaluation, evaluate, table
from edge.logmel import LogMel

OPTIONS: dict[str, int | str] = {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16}


def save(
    path: Path,
    model: SplitModel,
    data: Dataset,
    options: dict[str, int | str] = OPTIONS,
    **metrics: float,
) -> Path:
    save_bundle(
        path,
        model,
        name="small",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name="convnet", options=options),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        tolerance=0.01,
        metrics=metrics,
    )
    return path


@pytest.fixture(scope="module")
def model() -> SplitModel:
    torch.manual_seed(0)
    model = build(Architecture("convnet", OPTIONS))
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 1, 28, 28))
    return model.eval()


@pytest.fixture(scope="module")
def relabelled(model: SplitModel) -> Dataset:
    """Images whose labels are what the model says, but for every tenth: 90% right by design."""
    data = load_sample()
    data = dataclasses.replace(data, inputs=data.inputs[:101], labels=data.labels[:101])
    spec = data.preprocessing
    pixels = (data.inputs[:] / np.float32(255) - np.float32(spec.mean[0])) / np.float32(spec.std[0])
    with torch.inference_mode():
        logits = model(torch.from_numpy(pixels.astype(np.float32)))
    top = logits.topk(2).values
    labels = logits.argmax(1).numpy()
    labels[::10] = (labels[::10] + 1) % 10
    # Keep images that float16 cannot push over the border between two classes.
    clear = ((top[:, 0] - top[:, 1]) > 0.01).numpy()
    assert clear.sum() > 60
    return dataclasses.replace(data, inputs=data.inputs[clear], labels=labels[clear])


def test_it_counts_right_answers_on_both_ways(
    tmp_path: Path, model: SplitModel, relabelled: Dataset
) -> None:
    with torch.inference_mode():
        spec = relabelled.preprocessing
        pixels = torch.from_numpy(relabelled.inputs[:].astype(np.float32) / np.float32(255))
        logits = model((pixels - spec.mean[0]) / spec.std[0])
    expected = float((logits.argmax(1).numpy() == relabelled.labels).mean())
    assert 0.8 < expected < 0.97
    # Odd counts: the last group is filled up, and the fill is not counted.
    for n in (1, 3, len(relabelled)):
        data = dataclasses.replace(
            relabelled, inputs=relabelled.inputs[-n:], labels=relabelled.labels[-n:]
        )
        right = float((logits.argmax(1).numpy()[-n:] == data.labels).mean())
        found = evaluate(save(tmp_path / str(n), model, data, accuracy_edge_only=0.25), data)
        assert found.accuracy_unmixed == pytest.approx(right)
        assert found.accuracy_mixed == pytest.approx(right)
        by_class = found.accuracy_by_class
        names = [data.class_names[label] for label in data.labels]
        assert set(by_class) == set(names)
        assert np.mean([by_class[name] for name in names]) == pytest.approx(right)
        assert (found.n, found.group_size, found.rounds, found.mode) == (n, 4, 2, "mix")
        assert found.accuracy_edge_only == 0.25
        flops = count_flops(model, group_size=4)
        assert found.edge_flops_share == flops.edge_share
        assert found.edge_flops_share_collapsed == flops.edge_share_collapsed


def test_a_broken_mixing_would_show(
    tmp_path: Path, model: SplitModel, relabelled: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = save(tmp_path / "b", model, relabelled)
    monkeypatch.setattr("edge.modes.demix", lambda mixtures, coefficients: mixtures)
    found = evaluate(bundle, relabelled)
    assert found.accuracy_mixed < found.accuracy_unmixed - 0.2


def test_other_classes_are_refused(tmp_path: Path, model: SplitModel, relabelled: Dataset) -> None:
    bundle = save(tmp_path / "b", model, relabelled)
    other = dataclasses.replace(relabelled, class_names=tuple("abcdefghij"))
    several = np.eye(10, dtype=np.float32)[relabelled.labels]
    with pytest.raises(ConfigError, match="fashion-mnist has several labels per input"):
        evaluate(bundle, dataclasses.replace(relabelled, labels=several))
    with pytest.raises(ConfigError, match="the classes of fashion-mnist are not those of small"):
        evaluate(bundle, other)


def test_json_and_table_name_every_figure() -> None:
    found = Evaluation(0.9, 0.89, None, 0.129, 0.2, 1000, 4, 2, "mix", {"Coat": 0.77})
    fields = json.loads(json.dumps(found.to_json()))
    assert fields.keys() >= {
        "accuracy_unmixed", "accuracy_mixed", "accuracy_edge_only", "edge_flops_share"
    }  # fmt: skip
    text = table(found)
    for figure in (
        "90.00%",
        "89.00%",
        "not recorded",
        "12.9%",
        "20.0%",
        "mix, 4, 2",
        "Coat",
        "77.00%",
    ):
        assert figure in text
    assert "recorded at training" in text


def test_the_command_prints_and_writes(
    tmp_path: Path, model: SplitModel, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = save(tmp_path / "b", model, load_sample(), accuracy_edge_only=0.25)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--bundle", str(bundle), "--json", str(tmp_path / "found.json")])
    assert end.value.code == 0
    assert "25.00%" in capsys.readouterr().out
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["n"] == 1000
    assert abs(written["accuracy_mixed"] - written["accuracy_unmixed"]) < 0.01
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--bundle", str(tmp_path / "none")])
    assert end.value.code == 1
    assert "no manifest.json in bundle" in capsys.readouterr().err


def test_a_speech_bundle_is_measured_on_the_speech_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = load_sample("speech-commands")
    # Frames that make the convnet's 28 x 28 of the sample's 16,000 samples.
    changes = {"n_mels": 28, "n_fft": 640, "hop": 568, "input_shape": (1, 28, 28)}
    spec = LogMelPreprocessing.model_validate(sample.preprocessing.model_dump() | changes)
    options = OPTIONS | {"classes": 11}
    torch.manual_seed(0)
    model = build(Architecture("convnet", options)).eval()
    with torch.inference_mode():
        classes = model(LogMel(spec)(torch.from_numpy(sample.inputs[:]))).argmax(1).numpy()
    data = dataclasses.replace(sample, preprocessing=spec)
    bundle = save(tmp_path / "b", model, data, options)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--bundle", str(bundle), "--json", str(tmp_path / "found.json")])
    assert end.value.code == 0
    assert "176" in capsys.readouterr().out
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["n"] == 176
    right = float((classes == sample.labels).mean())
    assert abs(written["accuracy_unmixed"] - right) < 0.02
    # With the model's own classes for labels all is right, but for what lies between two classes.
    found = evaluate(bundle, dataclasses.replace(data, labels=classes))
    assert found.accuracy_unmixed > 0.98


SHIPPED = Path(__file__).parent.parent / "bundles" / "fashion-mnist-mix"


def test_the_shipped_bundle_keeps_its_promise() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3_000_000
    found = evaluate(SHIPPED, load_sample())
    assert (found.mode, found.group_size) == ("mix", 4)
    assert found.accuracy_mixed >= 0.91
    assert abs(found.accuracy_mixed - found.accuracy_unmixed) <= 0.003
    assert found.accuracy_edge_only is not None
    assert found.edge_flops_share < 0.2
    assert found.edge_flops_share_collapsed < 0.2
    metrics = read_manifest(SHIPPED).metrics
    assert metrics["accuracy_mixed"] >= 0.91
    assert metrics["test_images"] == 10_000
    # A thousand images tell an accuracy to about two points.
    assert abs(found.accuracy_mixed - metrics["accuracy_mixed"]) < 0.02


@pytest.mark.parametrize(
    ("name", "dataset", "rounds", "least"),
    [
        ("fashion-mnist-one-round", "fashion-mnist", 1, 0.91),
        ("speech-commands-mix", "speech-commands", 3, 0.85),
    ],
)
def test_the_other_shipped_bundles_keep_theirs(
    name: str, dataset: str, rounds: int, least: float
) -> None:
    bundle = SHIPPED.parent / name
    assert sum(file.stat().st_size for file in bundle.iterdir()) < 3_000_000
    sample = load_sample(dataset)
    found = evaluate(bundle, sample)
    assert (found.mode, found.group_size, found.rounds) == ("mix", 4, rounds)
    assert found.accuracy_mixed >= least
    assert abs(found.accuracy_mixed - found.accuracy_unmixed) <= 0.01
    assert found.edge_flops_share_collapsed < 0.2
    card = (bundle / "MODEL_CARD.md").read_text()
    assert f"{read_manifest(bundle).metrics['accuracy_mixed']:.2%}" in card
    assert all(name in card for name in sample.class_names)
