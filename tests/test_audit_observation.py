from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from datamix import wire
from datamix.errors import WireError
from edge.audit.observation import (
    Message,
    Observation,
    count_groups,
    from_pictures,
    pictures,
    requests,
    seeds,
    to_pictures,
)
from edge.data import load_sample
from edge.preprocess import preprocessor
from tests.audited import Setting, setting


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(tmp_path_factory.mktemp("audit"))


def messages(request_id: str, block: int, shape: tuple[int, ...], at_s: float) -> list[Message]:
    rows = np.full((4, *shape), block, np.float32)
    up = wire.encode_request(rows, request_id=request_id, block=block, dtype="float32")
    down = wire.encode_response(
        rows, dtype="float32", request_id=request_id, model="small", model_version="1",
        block=block, queue_s=0, compute_s=0, batch_rows=4, close_reason="full",
    )  # fmt: skip
    return [Message("A", "up", at_s, up), Message("A", "down", at_s + 0.5, down)]


def view(small: Setting, found: list[Message]) -> Observation:
    return Observation("mix", "A", tuple(found), small.public)


def test_a_capture_falls_into_its_inferences(small: Setting) -> None:
    capture, truth = small.record(groups=3)
    groups = requests(small.view(capture))
    assert len(groups) == len(truth.victims) == count_groups(small.view(capture)) == 3
    blocks = small.public.manifest.blocks
    for group in groups:
        assert [r.shape[1:] for r in group.rounds] == [b.input_shape for b in blocks]
        assert [a.shape[1:] for a in group.answers] == [b.output_shape for b in blocks]
        assert list(group.at_s) == sorted(group.at_s)
        assert len(set(group.request_ids)) == len(blocks)


def test_rounds_follow_the_inference_that_waited_longest(small: Setting) -> None:
    found = [
        *messages("a0", 0, (1, 2, 2), 0.0),
        *messages("b0", 0, (1, 2, 2), 1.0),
        *messages("a1", 1, (1, 2, 2), 2.0),
        *messages("b1", 1, (1, 2, 2), 3.0),
        *messages("c0", 0, (1, 2, 2), 4.0),  # never goes on
    ]
    groups = requests(view(small, found))
    assert [group.request_ids for group in groups] == [("a0", "a1"), ("b0", "b1")]
    assert groups[1].at_s == (1.0, 3.0)


def test_a_retry_counts_once_and_what_was_not_answered_not_at_all(small: Setting) -> None:
    first, second = messages("a0", 0, (1, 2, 2), 0.0), messages("a1", 1, (1, 2, 2), 1.0)
    groups = requests(view(small, [first[0], *first, *second]))
    assert [group.request_ids for group in groups] == [("a0", "a1")]
    assert requests(view(small, [*first, second[0]])) == ()


def test_what_is_no_message_is_refused(small: Setting) -> None:
    with pytest.raises(WireError):
        requests(view(small, [Message("A", "up", 0.0, b"nothing")]))


def test_operators_of_the_mode_split_see_their_own(small: Setting) -> None:
    capture, _ = small.record("split", groups=2)
    assert capture.operators() == ("A", "B")
    first, second = small.view(capture), small.view(capture, "B")
    assert len(requests(first)) == 2 and seeds(first) == ()
    assert requests(second) == ()
    found = seeds(second)
    assert {item.block for item in found} == {0, 1}
    assert all(item.seeds.shape[1:] == (32,) and item.seeds.dtype == np.uint8 for item in found)
    assert count_groups(second) >= 2  # masks are made ahead


def test_an_observation_is_frozen(small: Setting) -> None:
    observation = view(small, [])
    with pytest.raises(FrozenInstanceError):
        observation.mode = "split"  # type: ignore[misc]
    assert replace(observation, mode="split").mode == "split"


@pytest.mark.parametrize("name", ["fashion-mnist", "speech-commands"])
def test_pictures_and_inputs_are_the_same_but_for_what_is_cut(name: str) -> None:
    data = load_sample(name)
    raw = np.asarray(data.inputs[:8])
    shown = pictures(data.preprocessing, raw)
    low, high = (0, 1) if name == "fashion-mnist" else (-1, 1)
    assert shown.min() >= low and shown.max() <= high
    assert shown.shape == (8, *data.preprocessing.input_shape)
    inside = (shown > low) & (shown < high)
    inputs = preprocessor(data.preprocessing)(raw)
    np.testing.assert_allclose(
        from_pictures(data.preprocessing, shown)[inside], inputs[inside], atol=1e-5
    )
    again = to_pictures(data.preprocessing, from_pictures(data.preprocessing, shown))
    np.testing.assert_allclose(again, shown, atol=1e-6)
    assert inside.mean() > 0.3


def test_image_pictures_are_pixels() -> None:
    data = load_sample("fashion-mnist")
    raw = np.asarray(data.inputs[:4])
    np.testing.assert_allclose(pictures(data.preprocessing, raw), raw / 255, atol=1e-6)


def test_a_module_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, edge.audit.observation, edge.audit.attack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
