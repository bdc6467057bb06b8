from __future__ import annotations

import asyncio
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix import wire
from datamix.errors import AnswerError, ConfigError
from edge.audit import capture as module
from edge.audit.capture import (
    Capture,
    Header,
    RecordingTransport,
    Tape,
    body_of,
    capture_of,
    read_capture,
    write_capture,
)
from edge.audit.observation import Message
from edge.audit.truth import Truth, read_truth, truth_path, write_truth
from edge.transport import InProcessTransport

HEADER = Header(mode="split", model="small", model_version="1", group_size=4)
SOME = Capture(
    HEADER,
    (
        Message("A", "up", 0.0, b"one"),
        Message("B", "down", 0.25, b""),
        Message("A", "down", 1.0, b"3"),
    ),
)
MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["A", "B"]),
        st.sampled_from(["up", "down"]),
        st.floats(0, 1e9),
        st.binary(max_size=50),
    ),
    max_size=8,
)


def whole(capture: Capture = SOME) -> bytes:
    return b"".join(module._pieces(capture))


@given(MESSAGES)
def test_what_is_written_is_read(messages: list[Message]) -> None:
    capture = Capture(HEADER, tuple(messages))
    assert module._read(io.BytesIO(whole(capture)), "a") == capture


def test_a_file_goes_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a.capture"
    write_capture(path, SOME)
    found = read_capture(path)
    assert found == SOME and found.digest() == SOME.digest()
    assert [m.body for m in found.of("A")] == [b"one", b"3"]
    assert found.operators() == ("A", "B")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", range(len(whole())))
def test_a_file_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(ConfigError):
        module._read(io.BytesIO(whole()[:cut]), "a")


@given(st.binary(max_size=200))
def test_bytes_of_strangers_are_refused(body: bytes) -> None:
    for stream in (body, module.MAGIC + body):
        with pytest.raises(ConfigError):
            module._read(io.BytesIO(stream), "a")


@given(st.integers(0, len(whole()) - 1), st.integers(1, 255))
def test_one_changed_byte_raises_nothing_unexpected(at: int, change: int) -> None:
    body = bytearray(whole())
    body[at] ^= change
    try:
        found = module._read(io.BytesIO(bytes(body)), "a")
    except ConfigError:
        return
    assert found.digest() != SOME.digest()


def _frame(
    operator: bytes = b"A", direction: bytes = b"u", at_s: float = 0, length: int = 0
) -> bytes:  # noqa: E501
    header = HEADER.model_dump_json().encode()
    begin = module.MAGIC + struct.pack("<I", len(header)) + header
    return begin + struct.pack("<ccdI", operator, direction, at_s, length)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"PK\x03\x04" + bytes(40), "not a capture"),
        (module.MAGIC + struct.pack("<I", 1 << 31), "header of 2147483648 bytes"),
        (module.MAGIC + struct.pack("<I", 2) + b"{}", "header"),
        (_frame(length=(1 << 26) + 1), "67108865 bytes"),
        (_frame(length=1 << 20), "ends early"),
        (_frame(operator=b"C"), "unknown sender"),
        (_frame(direction=b"x"), "unknown sender"),
        (_frame(at_s=float("nan")), "the time nan"),
        (_frame(at_s=-1.0), "the time -1"),
        (whole() + b"x", "goes on"),
        (whole()[:-8] + bytes(8), "says 0 messages"),
    ],
)
def test_hostile_files(body: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        module._read(io.BytesIO(body), "a")


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_capture(path, SOME)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="expected 10 at most"):
        read_capture(path)


def test_too_many_messages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MESSAGES", 2)
    with pytest.raises(ConfigError, match="more than 2"):
        module._read(io.BytesIO(whole()), "a")
    with pytest.raises(ConfigError, match="too large"):
        capture_of(HEADER, SOME.messages)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_capture(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_capture(tmp_path / "no" / "folder", SOME)


# ------------------------------------------------------------------ recording


def answer_of(request_id: str, status: int = 200) -> bytes:
    if status != 200:
        return wire.encode_error(request_id, status, "no")
    rows = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    return wire.encode_response(
        rows, dtype="float16", request_id=request_id, model="m", model_version="1", block=0,
        queue_s=0, compute_s=0, batch_rows=2, close_reason="full",
    )  # fmt: skip


@pytest.mark.parametrize("again", [0, 1])
def test_a_recording_is_exact(again: int) -> None:
    """The first message of a layout is read by pyarrow, later ones by a faster way."""
    wire.responses.forget()
    if again:
        wire.decode_response(answer_of("x"))
    now = iter([10.0, 10.5, 11.0])
    tape = Tape(lambda: next(now))

    async def answer(message: bytes) -> bytes:
        return answer_of("x")

    transport = RecordingTransport(InProcessTransport(answer), tape, "B")
    response = asyncio.run(transport.send(b"message", "x", 1.0))
    assert response.request_id == "x"
    assert tape.messages == [
        Message("B", "up", 0.5, b"message"),
        Message("B", "down", 1.0, answer_of("x")),
    ]


def test_an_error_leaves_the_question_only() -> None:
    tape = Tape()

    async def answer(message: bytes) -> bytes:
        return answer_of("x", 429)

    transport = RecordingTransport(InProcessTransport(answer), tape)
    assert asyncio.run(transport.send(b"message", "x", 1.0)).status == 429
    assert [message.direction for message in tape.messages] == ["up"]


def test_an_answer_without_its_bytes_is_refused() -> None:
    made_up = wire.Response(np.zeros((1, 1, 1, 1), np.float32), None, "x")
    with pytest.raises(AnswerError):
        body_of(made_up)
    other = wire.decode_response(answer_of("x"))._replace(request_id="y")
    with pytest.raises(AnswerError, match="another answer"):
        body_of(other)


# ------------------------------------------------------------------ truth

TRUTH = Truth(np.array([[0, 1], [2, 0]]), "ab" * 32, 7)


def test_truth_goes_there_and_back(tmp_path: Path) -> None:
    path = truth_path(tmp_path / "a.capture")
    assert path.name == "a.capture.truth.npz"
    write_truth(path, TRUTH)
    found = read_truth(path)
    assert (found.victims == TRUTH.victims).all()
    assert (found.gallery_sha256, found.seed) == (TRUTH.gallery_sha256, 7)


def test_hostile_truth(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    good = {"victims": TRUTH.victims, "gallery_sha256": np.asarray("ab"), "seed": np.asarray(7)}
    bad: list[dict[str, object]] = [
        {"victims": np.array([[object()]], dtype=object)},
        {"victims": np.array([[-1]])},
        {"victims": np.zeros((1, 1))},
        {"victims": np.zeros((0, 2), np.int64)},
        {"seed": np.asarray("x")},
        {"gallery_sha256": np.asarray(1)},
    ]
    for change in bad:
        np.savez(path, **(good | change))  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            read_truth(path)
    for body in (b"", b"nothing", b"PK\x03\x04"):
        path.write_bytes(body)
        with pytest.raises(ConfigError):
            read_truth(path)
    with pytest.raises(ConfigError):
        read_truth(tmp_path / "none")
