"""WebSocket connections that break the protocol, or use its rarest corners.

Each script has a connection of its own, which is all that it may bring down. Frames are written by
hand: no client library would send them.
"""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

from benchmarks.fuzzing.messages import name, request
from benchmarks.fuzzing.mutants import mutate

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
MAX_MESSAGE_BYTES = 16 << 20

Ending = Literal["asks", "shut", "either", "fin", "abort"]


class Script(NamedTuple):
    """What is done on one connection, and how it has to end.

    Attributes:
        kind: of abuse.
        sent: the bytes after the handshake, in pieces.
        messages: that are to be answered; None is a text message.
        pongs: that are to come.
        ending: ``asks`` sends a good message, which is answered, and then says goodbye; ``shut``:
            the server has to close; ``either``: it answers something or closes; with ``fin`` and
            ``abort`` the client leaves at once.
        handshake: headers of the upgrade request, without those that all share.
    """

    kind: str
    sent: tuple[bytes, ...]
    messages: tuple[bytes | None, ...] = ()
    pongs: int = 0
    ending: Ending = "asks"
    handshake: tuple[str, ...] | None = None


def frame(
    kind: int,
    payload: bytes,
    chance: random.Random,
    *,
    fin: bool = True,
    reserved: int = 0,
    masked: bool = True,
) -> bytes:
    """One frame as a client sends it."""
    size = len(payload)
    if size < 126:
        length = bytes((size | masked << 7,))
    elif size < 1 << 16:
        length = struct.pack(">BH", 126 | masked << 7, size)
    else:
        length = struct.pack(">BQ", 127 | masked << 7, size)
    head = bytes((fin << 7 | reserved << 4 | kind,)) + length
    if not masked:
        return head + payload
    mask = chance.randbytes(4)
    whole = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ whole).to_bytes(size, "big")


def handshake(
    *, key: str | None = "", version: str = "13", connection: str = "Upgrade"
) -> tuple[str, ...]:
    """The headers by which a client asks for a WebSocket; key "" is a good one, None none."""
    good = base64.b64encode(bytes(16)).decode()
    lines = ["Upgrade: websocket", f"Connection: {connection}"]
    if version:
        lines.append(f"Sec-WebSocket-Version: {version}")
    if key is not None:
        lines.append(f"Sec-WebSocket-Key: {key or good}")
    return tuple(lines)


def _pieces(body: bytes, count: int, chance: random.Random) -> list[bytes]:
    cuts = sorted(chance.randrange(len(body) + 1) for _ in range(count - 1))
    return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]


# --- allowed, if rare -------------------------------------------------------------------------


def fragments(chance: random.Random) -> Script:
    """A message in several frames, pings and pongs between them."""
    body = mutate(chance).body if chance.random() < 0.5 else request(chance)
    pieces = _pieces(body, chance.choice((2, 3, 10)), chance)
    sent, pongs = [], 0
    for index, piece in enumerate(pieces):
        kind = CONTINUATION if index else BINARY
        sent.append(frame(kind, piece, chance, fin=index == len(pieces) - 1))
        if chance.random() < 0.3:
            pongs += 1
            sent.append(frame(PING, chance.randbytes(chance.randrange(126)), chance))
        if chance.random() < 0.2:
            sent.append(frame(PONG, b"nobody asked", chance))
    return Script("fragments", tuple(sent), (body,), pongs)


def crumbs(chance: random.Random) -> Script:
    """A message a byte or nothing at a time."""
    body = request(chance)[: chance.choice((3, 300, 3000))]
    pieces = [body[at : at + 1] for at in range(len(body))]
    for _ in range(chance.choice((0, 100, 1000))):
        pieces.insert(chance.randrange(len(pieces) + 1), b"")
    last = len(pieces) - 1
    frames = [
        frame(CONTINUATION if at else BINARY, piece, chance, fin=at == last)
        for at, piece in enumerate(pieces)
    ]
    return Script("crumbs", (b"".join(frames),), (body,))


def text(chance: random.Random) -> Script:
    """A text message, which is no request."""
    payload = chance.choice((b"", b"hello", "späť".encode(), b"\xff\xfe", request(chance)))
    return Script("text", (frame(TEXT, payload, chance),), (None,))


def text_fragments(chance: random.Random) -> Script:
    """A text message in two frames."""
    sent = frame(TEXT, b"he", chance, fin=False) + frame(CONTINUATION, b"llo", chance)
    return Script("text fragments", (sent,), (None,))


def empty(chance: random.Random) -> Script:
    """A message of no bytes."""
    return Script("empty", (frame(BINARY, b"", chance),), (b"",))


def pings(chance: random.Random) -> Script:
    """Many pings at once."""
    count = chance.choice((1, 10, 100))
    frames = [frame(PING, chance.randbytes(chance.randrange(126)), chance) for _ in range(count)]
    return Script("pings", (b"".join(frames),), pongs=count)


def oversize(chance: random.Random) -> Script:
    """A message above ``max_request_bytes``, which the WebSocket would still carry."""
    body = request(chance) + bytes((8 << 20) + chance.randrange(1000))
    return Script("oversize", (frame(BINARY, body, chance),), (body,))


def pieces_of_bytes(chance: random.Random) -> Script:
    """Good frames, cut anywhere on their way."""
    body = request(chance)
    return Script("cut anywhere", tuple(_pieces(frame(BINARY, body, chance), 5, chance)), (body,))


def goodbye(chance: random.Random) -> Script:
    """A close frame, good or bad, and perhaps more behind it."""
    codes = (1000, 1001, 1007, 3000, 4999, 0, 999, 1004, 1005, 1006, 1015, 2999, 65535)
    code = struct.pack(">H", chance.choice(codes))
    payload = chance.choice((b"", b"\x03", code, code + b"bye", code + b"\xff", code + bytes(123)))
    more = chance.choice((b"", frame(BINARY, request(chance), chance), chance.randbytes(50)))
    return Script("goodbye", (frame(CLOSE, payload, chance) + more,), ending="shut")


# --- not allowed ------------------------------------------------------------------------------


def huge(chance: random.Random) -> Script:
    """A frame that declares more than anybody would take."""
    sizes = (MAX_MESSAGE_BYTES + 1, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63)
    head = struct.pack(">BBQ", 0x82, 0xFF, chance.choice((*sizes, (1 << 64) - 1)))
    return Script("huge frame", (head + chance.randbytes(100),), ending="shut")


def unmasked(chance: random.Random) -> Script:
    """A frame without a mask, as only servers send them."""
    sent = frame(BINARY, request(chance), chance, masked=False)
    return Script("unmasked", (sent,), ending="shut")


def opcode(chance: random.Random) -> Script:
    """A kind of frame that does not exist."""
    kind = chance.choice((3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF))
    return Script("unknown opcode", (frame(kind, b"what", chance),), ending="shut")


def long_length(chance: random.Random) -> Script:
    """A length in more bytes than it needs."""
    head = chance.choice((struct.pack(">BBH", 0x82, 0xFE, 5), struct.pack(">BBQ", 0x82, 0xFF, 300)))
    return Script("long length", (head + bytes(304),), ending="shut")


def control(chance: random.Random) -> Script:
    """A ping or close that is too long, or in fragments."""
    kind = chance.choice((PING, PONG, CLOSE))
    sent = chance.choice(
        (frame(kind, bytes(126), chance), frame(kind, b"\x03\xe8", chance, fin=False))
    )
    return Script("bad control frame", (sent,), ending="shut")


def reserved(chance: random.Random) -> Script:
    """Reserved bits, which only an extension could give a meaning."""
    sent = frame(BINARY, request(chance), chance, reserved=chance.randrange(1, 8))
    return Script("reserved bits", (sent,), ending="either")


def orphan(chance: random.Random) -> Script:
    """A continuation of nothing."""
    return Script("orphan", (frame(CONTINUATION, request(chance), chance),), ending="either")


def interrupted(chance: random.Random) -> Script:
    """A new message before the last one has ended."""
    sent = frame(BINARY, request(chance)[:50], chance, fin=False)
    sent += frame(chance.choice((BINARY, TEXT)), request(chance), chance)
    return Script("interrupted", (sent,), ending="either")


def noise(chance: random.Random) -> Script:
    """Bytes that were never meant to be frames."""
    return Script("noise", (chance.randbytes(chance.choice((1, 10, 1000))),), ending="fin")


def half(chance: random.Random) -> Script:
    """Half a frame, or half a message, and then the client is gone."""
    whole = frame(BINARY, request(chance), chance, fin=chance.random() < 0.5)
    sent = whole[: chance.choice((1, 2, 3, 5, 100, len(whole)))]
    if chance.random() < 0.2:  # says that 16 MiB are to come
        sent = struct.pack(">BBQ", 0x82, 0xFF, MAX_MESSAGE_BYTES) + chance.randbytes(60_000)
    return Script("half", (sent,), ending=chance.choice(("fin", "abort")))


def deserted(chance: random.Random) -> Script:
    """Many good requests, and nobody who waits for their answers."""
    frames = [frame(BINARY, request(chance), chance) for _ in range(40)]
    return Script("deserted", (b"".join(frames),), ending=chance.choice(("fin", "abort")))


def bad_handshake(chance: random.Random) -> Script:
    """A request for a WebSocket that is none."""
    bad = (
        handshake(key=None),
        handshake(key="short"),
        handshake(key="=" * 24),
        handshake(key=base64.b64encode(bytes(15)).decode()),
        handshake(key="é" * 12),
        handshake(version=""),
        handshake(version="12"),
        handshake(version="13, 8"),
        handshake(connection="keep-alive, Upgrade"),
        handshake(connection="close, Upgrade"),
        (*handshake(), *(f"x-{index}: {name(chance)}" for index in range(90))),
        (*handshake(), "x-long: " + "x" * 9000),
        (*handshake(), "Content-Length: 5"),
        (*handshake(), "Sec-WebSocket-Extensions: permessage-deflate; x=\xff"),
        (*handshake(), "Sec-WebSocket-Protocol: " + "a," * 500),
    )
    return Script("bad handshake", (), ending="either", handshake=chance.choice(bad))


SCRIPTS: dict[Callable[[random.Random], Script], float] = {
    **{fragments: 10, crumbs: 2, text: 3, text_fragments: 1, empty: 1, pings: 3, oversize: 0.1},
    **{pieces_of_bytes: 3, goodbye: 5, huge: 4, unmasked: 3, opcode: 3, long_length: 3},
    **{control: 3, reserved: 3, orphan: 3, interrupted: 3, noise: 5, half: 6, deserted: 3},
    **{bad_handshake: 6},
}


def script(chance: random.Random) -> Script:
    """Any of them."""
    (make,) = chance.choices(list(SCRIPTS), list(SCRIPTS.values()))
    return make(chance)
