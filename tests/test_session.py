"""One inference as a generator: exact, fresh coefficients each round, and suspicious of answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import AnswerError
from edge.session import Round, check_answer, infer_group
from tests.fake_device import GROUP, SHAPES, FakeDevice, compute, raw_inputs

Array = npt.NDArray[Any]


def drive(device: FakeDevice, features: Array) -> tuple[Array, list[Round]]:
    """Run a session against the cloud's own blocks; outputs, and what the cloud saw."""
    session, seen = infer_group(device, features), []
    step = next(session)
    while True:
        seen.append(step)
        try:
            step = session.send(compute(step.block, step.features))
        except StopIteration as end:
            return end.value, seen


def stem_of(device: FakeDevice, raw: Array) -> Array:
    return device.stem(device.preprocess(raw))


@given(size=st.integers(1, 16), rounds=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_the_cloud_changes_nothing(size: int, rounds: int, seed: int) -> None:
    device = FakeDevice(group_size=size, rounds=rounds)
    raw = raw_inputs(size, seed)
    outputs, seen = drive(device, stem_of(device, raw))
    assert outputs.shape == (size, 5)
    assert np.abs(outputs - device.local(raw)).max() < 1e-5
    assert [step.block for step in seen] == list(range(rounds))
    assert [step.features.shape for step in seen] == [(size, *a) for a, _ in SHAPES[:rounds]]
    assert all(step.features.dtype == np.float32 for step in seen)
    assert len(device.bridged) == rounds - 1


def test_the_bridge_sees_features_that_are_mixed_no_more() -> None:
    device, raw = FakeDevice(), raw_inputs(GROUP)
    features = stem_of(device, raw)
    drive(device, features)
    assert np.allclose(device.bridged[0], compute(0, features), atol=1e-5)


def matrix_of(mixtures: Array, features: Array) -> Array:
    """The coefficients, as somebody who knows the features can solve for them."""
    flat = features.reshape(len(features), -1).astype(np.float64)
    solved: Array = np.linalg.lstsq(flat.T, mixtures.reshape(len(mixtures), -1).T)[0].T
    return solved


def test_every_round_and_every_inference_draws_fresh_coefficients() -> None:
    # Two equal draws among four have a chance below 1e-25; nearly equal ones below 1e-12.
    device, raw = FakeDevice(), raw_inputs(GROUP)
    features = stem_of(device, raw)
    second = device.bridge(0, compute(0, features))
    matrices = []
    for _ in range(2):
        _, seen = drive(device, features)
        matrices += [
            matrix_of(seen[0].features, features),
            matrix_of(seen[1].features, second),
        ]
    for matrix in matrices:
        assert np.abs(matrix @ matrix.T - np.eye(GROUP)).max() < 1e-3
    for i in range(4):
        for j in range(i):
            assert np.abs(matrices[i] - matrices[j]).max() > 1e-2


def test_what_leaves_is_no_row_of_the_group() -> None:
    # A Haar row within 1e-3 of a unit vector has a chance below 1e-7 at K = 4.
    device = FakeDevice()
    features = stem_of(device, raw_inputs(GROUP))
    step = next(infer_group(device, features))
    for mixture in step.features:
        for row in features:
            assert np.abs(mixture - row).max() > 1e-3
            assert np.abs(mixture + row).max() > 1e-3


def test_an_error_of_the_cloud_is_not_amplified() -> None:
    device = FakeDevice(rounds=1)
    features = stem_of(device, raw_inputs(GROUP))
    session = infer_group(device, features)
    step = next(session)
    answer = compute(0, step.features)
    error = np.float32(1e-2) * np.random.default_rng(0).standard_normal(answer.shape)
    with pytest.raises(StopIteration):
        session.send(answer + error.astype(np.float32))
    off = device.headed[0] - compute(0, features)
    assert np.linalg.norm(off) == pytest.approx(np.linalg.norm(error), rel=1e-3)


WRONG_SHAPES: list[tuple[int, ...]] = [
    (GROUP - 1, 3, 2, 2),
    (GROUP + 1, 3, 2, 2),
    (0, 3, 2, 2),
    (3, GROUP, 2, 2),
    (GROUP, 12),
    (GROUP, 3, 2, 2, 1),
    (GROUP, 2, 3, 3),
    (GROUP * 12,),
    (),
]


@pytest.mark.parametrize("shape", WRONG_SHAPES)
def test_an_answer_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    device = FakeDevice()
    session = infer_group(device, stem_of(device, raw_inputs(GROUP)))
    next(session)
    with pytest.raises(AnswerError, match="shape"):
        session.send(np.zeros(shape, np.float32))
    assert device.bridged == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bad_round", [0, 1])
def test_an_answer_that_is_not_finite_is_refused(bad_round: int, value: float) -> None:
    device = FakeDevice()
    session = infer_group(device, stem_of(device, raw_inputs(GROUP)))
    step = next(session)
    if bad_round == 1:
        step = session.send(compute(0, step.features))
    answer = compute(step.block, step.features)
    answer[-1, -1, -1, -1] = value
    with pytest.raises(AnswerError, match="NaN or Inf") as caught:
        session.send(answer)
    assert not caught.value.retryable
    with pytest.raises(StopIteration):  # it is over; nothing further leaves the device
        session.send(compute(step.block, step.features))


def test_the_answer_of_the_other_block_is_refused() -> None:
    device = FakeDevice()
    session = infer_group(device, stem_of(device, raw_inputs(GROUP)))
    next(session)
    with pytest.raises(AnswerError):
        session.send(compute(1, np.zeros((GROUP, *SHAPES[1][0]), np.float32)))


def test_a_good_answer_passes_whatever_its_memory_looks_like() -> None:
    check_answer(np.zeros((2, 3), np.float32), 2, (3,))
    check_answer(np.zeros((3, 2), np.float32).T, 2, (3,))
    check_answer(np.zeros((2, 6), np.float32)[:, ::2], 2, (3,))


def test_a_round_shows_nothing_of_the_coefficients() -> None:
    device = FakeDevice()
    session = infer_group(device, stem_of(device, raw_inputs(GROUP)))
    step = next(session)
    assert set(Round.__slots__) == {"block", "features", "step"}
    assert step.step is None  # it follows from sigma, which is public, where there is one
    assert "Coefficients" not in repr(step)
