"""Workloads without a network: right answers pass, any other is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix import wire
from datamix.bundle import (
    ArchitectureSpec,
    ImagePreprocessing,
    LogMelPreprocessing,
    Preprocessing,
    load_backbone,
    save_bundle,
)
from datamix.errors import AnswerError, ConfigError
from datamix.models import Architecture, build
from edge.data import load_sample
from edge.data.speech_commands import SPEECH_COMMANDS_PREPROCESSING
from edge.fleet.config import FleetConfig
from edge.fleet.inputs import bundle_workload
from edge.fleet.workload import EchoWorkload, Outcome, Question, Sealed, Workload


def respond(question: Question, values: Any) -> wire.Response:
    """Take values through the wire, as a cloud would answer ``question``."""
    return wire.decode_response(
        wire.encode_response(
            values,
            dtype="float16",
            request_id="a",
            model="m",
            model_version="1",
            block=question.block,
            queue_s=0,
            compute_s=0,
            batch_rows=1,
            close_reason="full",
        )
    )


def complete(workload: Workload, index: int, cloud: Any) -> Outcome:
    """Drive one inference against ``cloud``: (block, mixtures) -> output."""
    inference = workload.start(index)
    question = next(inference)
    while True:
        sent = question.features.astype(np.float16).astype(np.float32)
        if isinstance(question, Sealed):
            question.seal("a", 1.0)
        try:
            question = inference.send(respond(question, cloud(question.block, sent)))
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome


def test_echo_accepts_the_rows_it_sent_and_nothing_else() -> None:
    workload = EchoWorkload((2, 3), rows=3, seed=0, verify=True)
    assert complete(workload, 5, lambda block, rows: rows) == Outcome()
    assert complete(workload, 5, lambda block, rows: rows[::-1]).wrong
    with pytest.raises(AnswerError):
        complete(workload, 5, lambda block, rows: rows[:, :, :2])


@given(st.integers(0, 2**30 - 1), st.integers(0, 2**30 - 1))
@settings(max_examples=50, deadline=None)
def test_no_two_echo_messages_are_alike(first: int, second: int) -> None:
    workload = EchoWorkload((2, 3), rows=2, seed=0, verify=True)
    one, two = (next(workload.start(index)).features for index in (first, second))
    assert np.array_equal(one, two) == (
        first % 2**30 == second % 2**30 and first % 64 == second % 64
    )


class Bench:
    """A small bundle with random weights, its inputs, and its cloud."""

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        tolerance: float,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        torch.manual_seed(0)
        model = build(architecture).eval()
        shape = model.input_shape
        save_bundle(
            folder / "bundle",
            model,
            name="small",
            version="1",
            mode="mix",
            group_size=3,
            architecture=ArchitectureSpec(
                name=architecture.name, options=dict(architecture.options)
            ),
            preprocessing=preprocessing
            or ImagePreprocessing(
                kind="image", input_shape=shape, mean=(0.5,) * shape[0], std=(0.5,) * shape[0]
            ),
            class_names=tuple(map(str, range(model.classes))),
            tolerance=tolerance,
            metrics={},
        )
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (10, *shape), np.uint8)
        np.savez(folder / "inputs.npz", images=images, labels=np.arange(10) % 10)
        self.config = FleetConfig(
            url="http://cloud", bundle=str(folder / "bundle"), inputs=str(folder / "inputs.npz")
        )
        self.blocks = load_backbone(folder / "bundle")[1]

    def cloud(self, block: int, mixtures: Any) -> Any:
        with torch.inference_mode():
            return self.blocks[block](torch.from_numpy(mixtures)).numpy()


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    options = {"n_blocks": 2, "stem_width": 4, "width": 8}
    return Bench(tmp_path_factory.mktemp("linear"), Architecture("convnet", options), 0.02)


@pytest.fixture(scope="module")
def bent(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bent"), Architecture("resnet18", {"cut": 3}), 1e-3)


@pytest.mark.parametrize("name", ["linear", "bent"])
def test_the_bundles_own_answers_are_right_and_a_neighbours_are_not(
    name: str, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(name)
    workload = bundle_workload(bench.config, inferences=8)
    assert workload.rows == 3 and workload.rounds == len(bench.blocks)
    outcomes = [complete(workload, index, bench.cloud) for index in range(8)]
    assert not any(outcome.wrong for outcome in outcomes)
    if name == "linear":  # de-mixing is exact: the same classes as without a cloud
        assert [o.correct for o in outcomes] == [o.correct_local for o in outcomes]

    def of_a_neighbour(block: int, mixtures: Any) -> Any:
        return bench.cloud(block, mixtures[[1, 0, 2]])

    assert complete(workload, 0, of_a_neighbour).wrong


def test_a_tolerance_that_would_see_no_mix_up_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Architecture("convnet", {"n_blocks": 1}), tolerance=1.0)
    with pytest.raises(ConfigError, match="nothing would be verified"):
        bundle_workload(bench.config, inferences=1)


def test_without_verification_nothing_is_compared(linear: Bench) -> None:
    workload = bundle_workload(replace(linear.config, verify=False), inferences=2)
    outcome = complete(workload, 0, lambda block, rows: linear.cloud(block, rows) * 2)
    assert not outcome.wrong and outcome.correct_local == 0


def test_the_shipped_sample_is_the_default(linear: Bench) -> None:
    workload = bundle_workload(replace(linear.config, inputs=None), inferences=300)
    outcomes = [complete(workload, index, linear.cloud) for index in range(0, 300, 50)]
    assert not any(outcome.wrong for outcome in outcomes)


def test_a_speech_bundle_takes_the_speech_sample_and_pcm(tmp_path: Path) -> None:
    # Frames that make the convnet's 28 x 28 of the sample's 16,000 samples.
    changes = {"n_mels": 28, "n_fft": 640, "hop": 568, "input_shape": (1, 28, 28)}
    speech = LogMelPreprocessing.model_validate(
        SPEECH_COMMANDS_PREPROCESSING.model_dump() | changes
    )
    options = {"n_blocks": 2, "stem_width": 4, "width": 8, "classes": 11}
    bench = Bench(tmp_path, Architecture("convnet", options), 0.02, speech)
    sample = load_sample("speech-commands")
    np.savez(tmp_path / "own.npz", pcm=sample.inputs[:30], labels=sample.labels[:30])
    for inputs in (None, str(tmp_path / "own.npz")):
        workload = bundle_workload(replace(bench.config, inputs=inputs), inferences=6)
        outcomes = [complete(workload, index, bench.cloud) for index in range(6)]
        assert not any(outcome.wrong for outcome in outcomes)
        assert [o.correct for o in outcomes] == [o.correct_local for o in outcomes]
    with pytest.raises(ConfigError, match="no .npz file with pcm and labels"):
        bundle_workload(bench.config, 1)  # images, which this bundle does not take
    np.savez(tmp_path / "own.npz", pcm=sample.inputs[:30] / 2, labels=sample.labels[:30])
    with pytest.raises(ConfigError, match=r"pcm \(30, 16000\) float64, expected \(n, 16000\) int"):
        bundle_workload(replace(bench.config, inputs=str(tmp_path / "own.npz")), 1)


def test_inputs_that_do_not_fit_are_refused(linear: Bench, tmp_path: Path) -> None:
    for arrays in (
        {"images": np.zeros((2, 1, 28, 27), np.uint8), "labels": np.zeros(2)},
        {"images": np.zeros((2, 1, 28, 28), np.float32), "labels": np.zeros(2)},
        {"images": np.zeros((2, 1, 28, 28), np.uint8), "labels": np.zeros(3)},
        {"labels": np.zeros(3)},
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ConfigError):
            bundle_workload(replace(linear.config, inputs=str(tmp_path / "bad.npz")), 1)
