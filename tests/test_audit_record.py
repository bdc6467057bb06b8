from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from datamix import wire
from datamix.errors import ConfigError, Unavailable
from edge.audit.capture import RecordingTransport, Tape
from edge.audit.observation import requests, seeds
from edge.audit.record import BlocksCloud, Ends, open_model, open_sized, record
from edge.client import Client, ClientConfig
from edge.preprocess import preprocessor
from edge.transport import InProcessTransport, StreamTransport
from tests.audited import Setting, setting
from tests.fake_cloud import SHAPE, FakeCloud

IMPATIENT = ClientConfig(timeout_s=0.2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(tmp_path_factory.mktemp("audit"))


def test_both_sides_make_one_model(small: Setting) -> None:
    """The cloud of a capture computes what the model that attackers know computes."""
    raw = small.material.gallery[:4]
    model = open_model(small.bundle)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    inputs = preprocessor(small.public.manifest.preprocessing)(raw)
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    cloud = BlocksCloud(small.public.manifest, model.blocks)

    async def infer() -> np.ndarray:
        async with Client(InProcessTransport(cloud.answer), small.device) as client:
            return await client.infer(raw)

    np.testing.assert_allclose(asyncio.run(infer()), expected, atol=0.05)


@pytest.mark.parametrize("mode", ["mix", "bounded", "split"])
def test_a_capture_has_every_inference_and_the_right_victims(small: Setting, mode: str) -> None:
    capture, truth = small.record(mode, groups=3)
    assert capture.header.mode == mode and truth.victims.shape == (3, 4)
    assert truth.gallery_sha256 == small.material.digest()
    groups = requests(small.view(capture))
    assert len(groups) == 3
    first = preprocessor(small.public.manifest.preprocessing)
    for group, members in zip(groups, truth.victims, strict=True):
        features = small.device.stem(first(small.material.gallery[members])).reshape(4, -1)
        sent = group.rounds[0].reshape(4, -1)
        if mode == "mix":  # the mixtures span what the members span, and nothing else
            left = sent - sent @ np.linalg.pinv(features) @ features
            assert np.abs(left).max() < 0.02 * np.abs(sent).max()
        else:
            assert np.std(sent) > (0.4 if mode == "bounded" else 150)
    if mode == "split":
        assert {item.block for item in seeds(small.view(capture, "B"))} == {0, 1}


def test_the_truth_is_not_in_a_capture(small: Setting) -> None:
    """Two captures of the same victims share no row of what the device sent."""
    (first, _), (second, _) = small.record(groups=1), small.record(groups=1)
    rows = [requests(small.view(capture))[0].rounds[0] for capture in (first, second)]
    assert not any(np.array_equal(a, b) for a in rows[0] for b in rows[1])


def test_groups_of_another_size(small: Setting) -> None:
    device = open_sized(small.bundle, 8)
    capture, truth = record(small.bundle, device, None, small.material, 2)
    assert truth.victims.shape == (2, 8) and capture.header.group_size == 8
    with pytest.raises(ConfigError):
        record(small.bundle, open_sized(small.bundle, 41), None, small.material, 1)


def test_a_cloud_in_this_process_answers_nonsense_with_an_error(small: Setting) -> None:
    cloud = BlocksCloud(small.public.manifest, open_model(small.bundle).blocks)

    def status(message: bytes) -> int:
        return wire.decode_response(asyncio.run(cloud.answer(message))).status

    assert status(b"nothing") == 400
    rows = np.zeros((1, *small.public.manifest.blocks[0].input_shape), np.float32)
    assert status(wire.encode_request(rows, request_id="a", block=7)) == 404
    assert status(wire.encode_request(rows, request_id="a")) == 200


def test_a_cloud_that_is_not_there(small: Setting) -> None:
    ends = Ends("http://127.0.0.1:9", None)
    with pytest.raises(Unavailable):
        record(small.bundle, small.device, "mix", small.material, 1, ends=ends, config=IMPATIENT)


def test_a_stream_is_recorded_to_the_byte() -> None:
    rows = np.ones((2, *SHAPE), np.float32)
    messages = [wire.encode_request(rows * n, request_id=f"r{n}") for n in (1, 2)]

    async def talk() -> Tape:
        tape = Tape()
        cloud = FakeCloud()
        async with cloud.serve():
            transport = RecordingTransport(StreamTransport(cloud.url, "echo"), tape)
            for n, message in enumerate(messages, start=1):
                response = await transport.send(message, f"r{n}", 5.0)
                assert (response.values() == rows * n).all()
            await transport.close()
        return tape

    found = asyncio.run(talk()).messages
    assert [m.body for m in found if m.direction == "up"] == messages
    answers = [wire.decode_response(m.body) for m in found if m.direction == "down"]
    assert [answer.request_id for answer in answers] == ["r1", "r2"]
    assert all(answer.close_reason == "engine_free" for answer in answers)
