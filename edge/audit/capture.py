"""What crossed the wire, recorded and in one file that is safe to read from strangers.

    magic      16 bytes, DATAMIX-CAPTURE1
    header     u32 length, then JSON: mode, model, model_version, group_size
    messages   each: operator (A or B), direction (u or d), f64 seconds, u32 length, the exact bytes
    end        the byte E, u64 count of messages; nothing follows

Integers and floats are little-endian. The truth (which inputs were sent) is never in here:
:mod:`edge.audit.truth`.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from datamix import wire
from datamix.bundle import Mode
from datamix.errors import AnswerError, ConfigError, TooLarge, WireError
from datamix.schema import Strict
from edge.audit.observation import Direction, Message, Operator
from edge.transport import Transport

MAGIC = b"DATAMIX-CAPTURE1"
MAX_HEADER_BYTES = 1 << 12
MAX_MESSAGE_BYTES = 1 << 26
MAX_MESSAGES = 1 << 20
MAX_FILE_BYTES = 1 << 34

_LENGTH = struct.Struct("<I")
_FRAME = struct.Struct("<ccdI")
_COUNT = struct.Struct("<Q")
_OPERATORS: dict[bytes, Operator] = {b"A": "A", b"B": "B"}
_DIRECTIONS: dict[bytes, Direction] = {b"u": "up", b"d": "down"}


class Header(Strict):
    """What a capture says about itself; none of it is secret.

    Attributes:
        mode: of the device.
        model: name of the bundle.
        model_version: of the bundle.
        group_size: K.
    """

    mode: Mode
    model: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    model_version: Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,32}$")]
    group_size: Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True, slots=True)
class Capture:
    """Everything that crossed the wire, of all operators.

    Attributes:
        header: what it is of.
        messages: in the order in which they were recorded.
    """

    header: Header
    messages: tuple[Message, ...]

    def operators(self) -> tuple[Operator, ...]:
        """Those of whom there are messages."""
        found = {message.operator for message in self.messages}
        return tuple(operator for operator in _OPERATORS.values() if operator in found)

    def of(self, operator: Operator) -> tuple[Message, ...]:
        """One operator's messages."""
        return tuple(message for message in self.messages if message.operator == operator)

    def digest(self) -> str:
        """sha256 of the file's bytes, hexadecimal."""
        found = hashlib.sha256()
        for piece in _pieces(self):
            found.update(piece)
        return found.hexdigest()


# ------------------------------------------------------------------ recording


class Tape:
    """Where the recording transports of one capture put messages.

    Attributes:
        messages: so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now, on a monotonic clock in seconds."""
        self._clock = clock
        self._begin_s = clock()
        self.messages: list[Message] = []

    def put(self, operator: Operator, direction: Direction, body: bytes) -> None:
        """Record one message at this moment."""
        at_s = self._clock() - self._begin_s
        self.messages.append(Message(operator, direction, at_s, body))


class RecordingTransport:
    """Any transport, with a tape running: what is sent and what is answered, to the byte."""

    def __init__(self, inner: Transport, tape: Tape, operator: Operator = "A") -> None:
        """Record what ``inner`` sends to ``operator`` and gets back."""
        self._inner = inner
        self._tape = tape
        self._operator = operator

    async def send(self, message: bytes, request_id: str, timeout_s: float) -> wire.Response:
        """See :class:`edge.transport.Transport`.

        Raises:
            AnswerError: also where the bytes of an answer can no longer be had.
        """
        self._tape.put(self._operator, "up", bytes(message))
        response = await self._inner.send(message, request_id, timeout_s)
        if response.status == 200:  # an error has no rows, and nothing to attack
            self._tape.put(self._operator, "down", body_of(response))
        return response

    async def close(self) -> None:
        """See :class:`edge.transport.Transport`."""
        await self._inner.close()


def body_of(response: wire.Response) -> bytes:
    """The bytes that a response was decoded from; its arrays are views of them.

    Raises:
        AnswerError: they are not: a compressed answer, or a response made by hand.
    """
    owner: Any = response.features
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    while (parent := getattr(owner, "parent", None)) is not None:  # a slice, as pyarrow cuts them
        owner = parent
    try:
        body = bytes(memoryview(owner))
        found = wire.decode_response(body)
    except (TypeError, WireError, TooLarge):
        raise AnswerError(
            "the answer's bytes cannot be had, expected an uncompressed one"
        ) from None
    if found.request_id != response.request_id:
        raise AnswerError("the answer's bytes are those of another answer")
    return body


# ------------------------------------------------------------------ file


def write_capture(path: Path, capture: Capture) -> None:
    """Write a capture to a file; one that is there is replaced when the new one is whole.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as stream:
            for piece in _pieces(capture):
                stream.write(piece)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be written: {error.strerror}") from None


def read_capture(path: Path) -> Capture:
    """Read a file, of whoever; what it needs in memory is what it has on disk.

    Raises:
        ConfigError: missing, cut off, too large, or not a capture.
    """
    try:
        with open(path, "rb") as stream:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise ConfigError(
                    f"{path.name} has {size} bytes, expected {MAX_FILE_BYTES} at most"
                )
            return _read(stream, path.name)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from None


def _pieces(capture: Capture) -> Iterator[bytes]:
    header = capture.header.model_dump_json().encode()
    yield MAGIC + _LENGTH.pack(len(header)) + header
    for message in capture.messages:
        operator, direction = message.operator.encode(), message.direction[:1].encode()
        yield _FRAME.pack(operator, direction, message.at_s, len(message.body))
        yield message.body
    yield b"E" + _COUNT.pack(len(capture.messages))


def _read(stream: BinaryIO, name: str) -> Capture:
    def take(count: int) -> bytes:
        body = stream.read(count)
        if len(body) != count:
            raise ConfigError(f"{name} ends early, expected a whole capture")
        return body

    if stream.read(len(MAGIC)) != MAGIC:
        raise ConfigError(f"{name} is not a capture")
    (length,) = _LENGTH.unpack(take(_LENGTH.size))
    if length > MAX_HEADER_BYTES:
        raise ConfigError(f"{name}: header of {length} bytes, expected {MAX_HEADER_BYTES} at most")
    try:
        header = Header.model_validate_json(take(length))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{name}: header: {first['msg'][:200]}") from None
    messages: list[Message] = []
    while (kind := take(1)) != b"E":
        if len(messages) == MAX_MESSAGES:
            raise ConfigError(f"{name} has more than {MAX_MESSAGES} messages")
        _, direction, at_s, length = _FRAME.unpack(kind + take(_FRAME.size - 1))
        if kind not in _OPERATORS or direction not in _DIRECTIONS:
            raise ConfigError(f"{name}: message {len(messages)} has an unknown sender")
        if not 0 <= at_s < math.inf:
            raise ConfigError(f"{name}: message {len(messages)} has the time {at_s}")
        if length > MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"{name}: message {len(messages)} has {length} bytes,"
                f" expected {MAX_MESSAGE_BYTES} at most"
            )
        body = take(length)
        messages.append(Message(_OPERATORS[kind], _DIRECTIONS[direction], at_s, body))
    (count,) = _COUNT.unpack(take(_COUNT.size))
    if count != len(messages) or stream.read(1):
        raise ConfigError(f"{name} says {count} messages, or goes on; it has {len(messages)}")
    return Capture(header, tuple(messages))


def capture_of(header: Header, messages: Sequence[Message]) -> Capture:
    """Messages in the order of time.

    Raises:
        ConfigError: more of them, or larger ones, than a file may hold.
    """
    if len(messages) > MAX_MESSAGES or any(len(m.body) > MAX_MESSAGE_BYTES for m in messages):
        raise ConfigError(f"capture of {len(messages)} messages is too large")
    return Capture(header, tuple(sorted(messages, key=lambda message: message.at_s)))
