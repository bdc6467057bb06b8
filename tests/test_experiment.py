"""Experiments: which trainings there are, what is left out, what the rows say."""

import dataclasses
import fcntl
import math
from pathlib import Path

import pytest

from cluster.cli import main
from datamix.errors import ConfigError
from edge.data import Dataset, load_sample
from edge.experiment import experiment, jobs, trained
from edge.methods import METHODS
from edge.presets import PRESETS, Arm, Preset, check_preset, preset
from edge.results import read_rows
from tests.test_fit import CONFIG, part_of

TINY = Preset(
    "tiny",
    "fashion-mnist",
    dataclasses.replace(CONFIG, epochs=1),
    (
        Arm("unmixed", "unmixed", options={"rounds": 1}),
        Arm("edge-only", "edge-only"),
        Arm("linear", "linear", (2, 8)),
        Arm("laws", "linear", (4,), ("dirichlet",)),
        Arm("datamix", "datamix", (2, 4), options={"rounds": 1}),
        Arm("nonlinear", "nonlinear", (4,), options={"rounds": 1}, teacher="unmixed"),
        Arm("bounded", "bounded", (4,), sigmas=(0.5, 2.0), options={"rounds": 1, "sent_width": 2}),
    ),
)


@pytest.fixture(scope="module")
def training() -> Dataset:
    return part_of(load_sample(), 0, 128)


@pytest.fixture(scope="module")
def test() -> Dataset:
    return part_of(load_sample(), 900, 1000)


def test_a_method_that_is_trained_unmixed_is_trained_once() -> None:
    found = jobs(TINY, (0, 1))
    per_seed = [job.name.rsplit("-", 1)[0] for job in found if job.config.seed == 0]
    assert per_seed == [
        "unmixed-seed0", "edge-only-seed0", "linear-seed0", "linear-seed0", "datamix-k2-seed0",
        "datamix-k4-seed0", "nonlinear-k4-seed0", "bounded-k4-sigma0.5-seed0",
        "bounded-k4-sigma2-seed0",
    ]  # fmt: skip
    assert len(found) == 2 * len(per_seed)
    assert found[2].name == found[3].name  # the same settings, so the same training
    assert [point.group_size for point in found[2].points] == [2, 8]
    labels = [job.arm.label for job in jobs(TINY, (0,), ("nonlinear",))]
    assert labels == ["unmixed", "nonlinear"]


def test_an_experiment_makes_rows_once(tmp_path: Path, training: Dataset, test: Dataset) -> None:
    results, runs = tmp_path / "r.json", tmp_path / "runs"
    lines: list[str] = []

    def go(*labels: str) -> int:
        lines.clear()
        return len(
            experiment(
                TINY,
                training,
                test,
                seeds=(0,),
                results=results,
                runs=runs,
                labels=labels,
                report=lines.append,
            )
        )

    assert go("linear") == 2
    assert go() == 8  # all but the two
    assert go() == 0
    assert len(lines) == 9
    assert all("rows are there already" in line for line in lines)
    kept = read_rows(results)
    assert len(kept) == 10
    rows = {(row.label, row.group_size): row for row in kept}
    for row in rows.values():
        assert row.accuracy_unmixed == rows["unmixed", 1].accuracy
        assert row.accuracy_edge_only == rows["edge-only", 1].accuracy
        assert row.command.startswith("datamix experiment tiny --arms ")
        assert row.steps == 4
        assert row.inputs == (128, 100)
    linear = rows["linear", 8]
    assert linear.accuracy_float32 == linear.accuracy_same_weights
    assert abs(linear.accuracy - rows["linear", 2].accuracy) <= 0.01
    assert (linear.rounds, linear.round_trips) == (2, 2)
    # (4 x 14 x 14 in, 6 x 7 x 7 out, then the same 6 in and 8 out) in float16
    assert linear.bytes_per_inference == 2 * (784 + 294 + 294 + 392)
    assert linear.edge_flops_share > rows["linear", 2].edge_flops_share
    assert rows["laws", 4].law == "dirichlet"
    edge = rows["edge-only", 1]
    assert (edge.rounds, edge.bytes_per_inference, edge.edge_flops_share) == (0, 0, 1.0)
    half, two = sorted((r for r in kept if r.label == "bounded"), key=lambda r: r.noise_sigma)
    assert (half.noise_sigma, two.noise_sigma) == (0.5, 2.0)
    # Two channels of 14 x 14 leave, once; the bound is that of as many Gaussian channels.
    assert half.bits_per_input == pytest.approx(2 * 14 * 14 / 2 * math.log2(1 + 1 / 0.5**2))
    assert two.bits_per_input == pytest.approx(2 * 14 * 14 / 2 * math.log2(1 + 1 / 2**2))
    assert all(row.bits_per_input is None for row in kept if row.label != "bounded")
    noisy = trained(TINY, "bounded", 0, runs, noise_sigma=2.0)
    assert noisy.config.noise_sigma == 2.0
    with pytest.raises(ConfigError, match="noise_sigma is 3.0, but bounded is trained at 0.5, 2"):
        trained(TINY, "bounded", 0, runs, noise_sigma=3.0)
    # Rows that were lost are measured again from the weights that were kept.
    results.unlink()
    assert go("linear") == 2
    assert not any("images/s" in line for line in lines)


def test_another_process_is_not_disturbed(tmp_path: Path, training: Dataset, test: Dataset) -> None:
    (job,) = jobs(TINY, (0,), ("edge-only",))
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    lines: list[str] = []
    with open(folder / f"{job.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = experiment(
            TINY,
            training,
            test,
            seeds=(0,),
            results=tmp_path / "r.json",
            runs=tmp_path / "runs",
            labels=("edge-only",),
            report=lines.append,
        )
    assert rows == []
    assert lines == [f"[1/1] edge-only, {job.name}: another process is at it"]


def test_changed_settings_are_other_runs(tmp_path: Path) -> None:
    names = {job.name for change in (1, 2) for job in jobs(TINY, (0,), epochs=change)}
    assert len(names) == 2 * (len(jobs(TINY, (0,))) - 1)


def test_presets_can_work() -> None:
    for name, found in PRESETS.items():
        check_preset(found)
        assert found.name == name
        assert {job.config.method for job in jobs(found, (0,))} >= {
            "linear", "datamix", "nonlinear", "unmixed", "edge-only",
        }  # fmt: skip
        papers = [job for job in jobs(found, (0,)) if job.config.method == "datamix"]
        assert sorted(job.config.group_size for job in papers) == [2, 4, 8]
        (linear,) = [job for job in jobs(found, (0,)) if job.arm.label == "linear"]
        assert [point.group_size for point in linear.points] == [2, 4, 8, 16, 32]
        assert METHODS[linear.config.method].mixed


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ((Arm("a", "linear"), Arm("a", "datamix")), "labelled 'a'"),
        ((Arm("a", "magic"),), "method of a is 'magic'"),
        ((Arm("a", "linear", sigmas=(1.0,)),), "a has sigmas, expected none: linear adds no noise"),
        ((Arm("a", "nonlinear", teacher="b"), Arm("b", "unmixed")), "a learns from 'b'"),
        (
            (Arm("b", "datamix"), Arm("a", "nonlinear", teacher="b")),
            "a learns from 'b', expected one without mixing",
        ),
    ],
)
def test_arms_that_cannot_work_are_refused(arms: tuple[Arm, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_preset(dataclasses.replace(TINY, arms=arms))


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="preset is 'x', expected one of fashion-mnist"):
        preset("x")
    with pytest.raises(ConfigError, match="arm is 'x', expected one of unmixed"):
        jobs(TINY, (0,), ("x",))
    with pytest.raises(SystemExit) as end:
        main(["experiment", "nothing"])
    assert end.value.code == 2
    assert "preset is 'nothing'" in capsys.readouterr().err
