"""HTTP requests with something wrong in them: bodies, headers, and what HTTP itself forbids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.fuzzing import messages, mutants, structures
from benchmarks.fuzzing.frames import handshake
from benchmarks.fuzzing.messages import name, request
from benchmarks.fuzzing.oracle import Post
from datamix import wire

PATH = "/v2/models/echo/infer"
_PATHS = (
    *(PATH + "/", "/v2/models/echo/versions/1/infer", "/v2/models/echo/versions/2/infer", "/v2"),
    *("/v2/models/other/infer", "/v2/models/echo", "/v2/models//infer", "/", "//", "/nowhere"),
    *("/v2/models/%2e%2e/infer", "/v2/models/ech%6F/infer", "/v2/models/%ff%00/infer?a=b"),
    *("/v2/models/echo/stream", "/v2/models/echo/versions/1", "/v2/stats", "/v2/health/live"),
    "/v2/models/" + "x" * 3000 + "/infer",
)
_TYPES = (
    *("", "text/plain", "application/json", "application/octet-stream", "APPLICATION/JSON; a=b"),
    *(wire.MEDIA_TYPE + "; charset=utf-8", wire.MEDIA_TYPE.upper(), " ;", "x" * 3000, "späť"),
    *("application/vnd.apache.arrow.file", "multipart/form-data; boundary=x", '"', "%s%n", "a/b"),
)
_LENGTHS = ("0", "1", "-1", "+1", "1e3", "0x10", "9" * 12, "9" * 13, "9" * 5000, "nan", "²", "1, 2")
_ENCODINGS = ("gzip", "identity", "br", "zstd", "identity, gzip", "x" * 300, "späť")
# Missing here: values that are not UTF-8 in the headers that Ray Serve reads itself, such as
# x-request-id, since Ray 2.60 answers those with 500 without asking our application; and "expect:
# 100-continue" with the body at once, since HAProxy 2.8 cuts off one in 1,000 errors that follow.
_ODD = (
    *(("accept", "text/html"), ("accept-encoding", "gzip, br"), ("pragma", "no-cache")),
    *(("x-request-disconnect-disabled", "?1"), ("x-request-disconnect-disabled", "yes")),
    *(("authorization", "Bearer \xff"), ("authorization", ""), ("cookie", "a=b; " * 300)),
    *(("x-forwarded-for", "1.2.3.4, " * 50), ("x-http-method-override", "PUT")),
    *(("range", "bytes=0-1"), ("if-none-match", "*"), ("content-md5", "x"), ("te", "trailers")),
    *(("content-disposition", 'form-data; name="features"'), ("x-request-id", "a" * 2000)),
)


class Named(NamedTuple):
    """A request and what was done to it."""

    kind: str
    post: Post


class Rough(NamedTuple):
    """Bytes that are hardly a request; ``leaves``: the client sends no more, and says so."""

    kind: str
    sent: bytes
    leaves: bool = False


def raw(post: Post, method: str = "POST", chunk: int = 0) -> bytes:
    """A request as it travels; with ``chunk``, its body in chunks of that size at most."""
    lines = [f"{method} {post.path} HTTP/1.1", "host: x"]
    lines += [f"{key}: {value}" for key, value in post.headers]
    body = post.body
    if chunk:
        lines.append("transfer-encoding: chunked")
        pieces = [body[at : at + chunk] for at in range(0, len(body), chunk)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


# --- requests that HTTP allows ----------------------------------------------------------------


def arrow(chance: random.Random) -> Named:
    """A mutant in Arrow."""
    kind, body = mutants.mutate(chance)
    return Named(f"Arrow: {kind}", Post(PATH, (("content-type", wire.MEDIA_TYPE),), body))


def odd(chance: random.Random) -> Named:
    """A good body under odd headers, or at an odd path."""
    found = chance.choice((arrow(chance), good_json(chance)))
    path, headers = PATH, list(found.post.headers)
    kind = chance.randrange(6)
    if kind == 0:
        path = chance.choice(_PATHS)
    elif kind == 1:
        headers = [("content-type", chance.choice(_TYPES)), *headers[chance.randrange(2) :]]
    elif kind == 2:
        headers.insert(0, ("inference-header-content-length", chance.choice(_LENGTHS)))
    elif kind == 3:
        headers.insert(chance.randrange(2), ("content-encoding", chance.choice(_ENCODINGS)))
    elif kind == 4:
        headers += [(f"x-{name(chance)}", name(chance)) for _ in range(chance.choice((1, 60)))]
    headers += chance.sample(_ODD, chance.choice((0, 0, 1, 3)))
    return Named("odd headers", Post(path, tuple(headers), found.post.body))


def good_json(chance: random.Random) -> Named:
    """A request of the Open Inference Protocol, as it should be."""
    features = messages.features_of(chance, chance.randrange(1, messages.MAX_ROWS + 1))
    tensor = {"name": "features", "shape": features.shape, "datatype": "FP32"}
    message = {"id": name(chance), "inputs": [tensor | {"data": features.ravel().tolist()}]}
    return _oip("JSON", json.dumps(message).encode(), None)


def broken_json(chance: random.Random) -> Named:
    """JSON with something wrong in its bytes."""
    body = good_json(chance).post.body
    for _ in range(chance.choice((1, 1, 2))):
        if body:
            body = chance.choice((mutants.flip, mutants.insert, mutants.delete))(body, chance)
    if chance.random() < 0.1:
        body = chance.choice((b"[" * 9999, b'{"a":' * 5000, b"1" * 9999, b'"' + b"\\" * 999, b""))
    return _oip("JSON: bytes", body, None)


def broken_binary(chance: random.Random) -> Named:
    """JSON and binary data with something wrong in their bytes, or in the header between them."""
    features = messages.features_of(chance, 2).astype("<f2")
    tensor = {"name": "features", "shape": features.shape, "datatype": "FP16"}
    message = {"inputs": [tensor | {"parameters": {"binary_data_size": features.nbytes}}]}
    text = json.dumps(message).encode()
    length, body = len(text), text + features.tobytes()
    if chance.random() < 0.5:
        length += chance.choice((-100, -2, -1, 1, 2, 100, 1 << 31))
    else:
        body = chance.choice((mutants.flip, mutants.insert, mutants.delete))(body, chance)
    return _oip("binary: bytes", body, length)


def _oip(kind: str, body: bytes, length: int | None) -> Named:
    if length is None:
        return Named(kind, Post(PATH, (("content-type", "application/json"),), body))
    return Named(kind, Post(PATH, (("inference-header-content-length", str(length)),), body))


POSTS: dict[Callable[[random.Random], Named], int] = {
    **{arrow: 10, odd: 8, good_json: 1, broken_json: 5, broken_binary: 4}
}


def endless(seed: str) -> Iterator[Named]:
    """Requests without end; the same for the same seed."""
    chance = random.Random(seed)
    while True:
        (make,) = chance.choices(list(POSTS), list(POSTS.values()))
        yield make(chance)


def structured(seed: str) -> Iterator[Named]:
    """Requests of the Open Inference Protocol that hypothesis makes up."""
    found = structures.endless(structures.oip(), seed)
    return (_oip("OIP structure", body, length) for body, length in found)


# --- requests that it does not ----------------------------------------------------------------

_HEAD = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {wire.MEDIA_TYPE}\r\n".encode()
_METHODS = ("HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "post", "CONNECT", "X" * 99, "")
_LINES = (
    *(f"{method} {PATH} HTTP/1.1" for method in _METHODS),
    *(f"POST {PATH} HTTP/{version}" for version in ("0.9", "1.0", "1.2", "2.0", "9.9", "11", "x")),
    *(f"POST {path} HTTP/1.1" for path in (*_PATHS, "*", "é", f"http://x:1{PATH}", PATH + "\0")),
    *(f"GET {path} HTTP/1.1" for path in (PATH, *_PATHS)),
    *(f"POST {PATH}", f"POST  {PATH}  HTTP/1.1", f"POST {PATH}?{'a' * 9000} HTTP/1.1"),
)
_HEADERS = (
    *(b"no colon", b": no name", b"a b: c", b"x: a\0b", b"x: a\x7fb", b"x:\r\n folded", b"x: \xff"),
    *(b"x-request-id: ", b"x-request-timeout-seconds: nan", b"x-request-timeout-seconds: -1"),
    *(b"serve_multiplexed_model_id: x", b"x: " + b"y" * 70_000, b"x" * 20_000 + b": y"),
    *(b"\r\n".join(b"x-%d: y" % index for index in range(500)), "\r\n".join(handshake()).encode()),
    *(b"connection: close, upgrade\r\nupgrade: h2c\r\nhttp2-settings: AA", b"expect: nonsense"),
    *(b"connection: upgrade\r\nupgrade: nonsense", b"host: y", b"host: a b", b"te: gzip"),
    b"expect: 100-continue",
)
_FRAMINGS = (
    *(b"content-length: %d\r\ncontent-length: 5", b"content-length: %d\r\ncontent-length: %d"),
    *(b"content-length: %d\r\ntransfer-encoding: chunked", b"transfer-encoding: gzip"),
    *(b"transfer-encoding: chunked, chunked", b"transfer-encoding: identity", b"x: no length"),
    *(b"transfer-encoding: \x0bchunked", b"content-length: -1", b"content-length: +%d"),
    *(b"content-length: 5x", b"content-length: ", b"content-length: 0x10", b"content-length: %d"),
    *(b"content-length: 18446744073709551617", b"content-length: 9223372036854775807"),
    *(b"content-length: 8388609", b"content-length: %d, %d", b"content-length: %d.0"),
)
_CHUNK_SIZES = (
    *(b"-1", b"zz", b"", b"f" * 16, b"f" * 17, b"8" + b"0" * 15, b"5;" + b"x" * 9000, b"0x5"),
    *(b"5 ", b" 5", b"05", b"4", b"6", b"\0", b"+5"),
)
_STRANGERS = (
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"\x16\x03\x01\x02\x00\x01" + bytes(500)),
    *(b"SSH-2.0-x\r\n", b"\0" * 100, b"\r\n" * 100, b"GET /\n\n", b"POST", b"\x80" * 9, b"{}"),
)


def rough(chance: random.Random) -> Rough:
    """Bytes that a server has to survive."""
    make = chance.choice((_line, _header, _framing, _chunks, _short, _stranger))
    return make(chance)


def _line(chance: random.Random) -> Rough:
    """A first line that is odd or wrong."""
    line = chance.choice(_LINES).encode()
    return Rough("first line", line + b"\r\nhost: x\r\ncontent-length: 0\r\n\r\n")


def _header(chance: random.Random) -> Rough:
    """A header that is wrong, or more of them than anybody sends."""
    body = request(chance)
    lines = chance.choice(_HEADERS) + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
    return Rough("header", _HEAD + lines + body)


def _framing(chance: random.Random) -> Rough:
    """Two lengths, or one that is no number."""
    body = request(chance)
    line = chance.choice(_FRAMINGS).replace(b"%d", b"%d" % len(body))
    return Rough("framing", _HEAD + line + b"\r\n\r\n" + body)


def _chunks(chance: random.Random) -> Rough:
    """Chunks of odd sizes, or sizes that are none."""
    size = chance.choice(_CHUNK_SIZES)
    sent = b"transfer-encoding: chunked\r\n\r\n" + size + b"\r\nhello\r\n0\r\n\r\n"
    return Rough("chunks", _HEAD + sent, leaves=True)


def _short(chance: random.Random) -> Rough:
    """A request whose end never comes."""
    post = Post(PATH, (("content-type", wire.MEDIA_TYPE),), request(chance))
    whole = raw(post, chunk=chance.choice((0, 50)))
    return Rough("short", whole[: chance.randrange(len(whole))], leaves=True)


def _stranger(chance: random.Random) -> Rough:
    """Another protocol."""
    sent = chance.choice((*_STRANGERS, request(chance), chance.randbytes(200)))
    return Rough("another protocol", sent, leaves=True)
