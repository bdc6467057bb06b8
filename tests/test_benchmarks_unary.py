"""The cheap HTTP client counts what it should, however the bytes are cut, and nothing else."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.unary import Connection, EchoServer, build_request, content_length

REQUEST = build_request("http://127.0.0.1:1/v2/infer", b"x" * 100, {"content-type": "a/b"})


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


def feed(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    """As an event loop does, as many bytes as there is room for at a time."""
    while data:
        view = memoryview(protocol.get_buffer(-1))
        size = min(len(view), len(data))
        view[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]


def connected(least_bytes: int = 10) -> tuple[Connection, Wire]:
    connection, wire = Connection(REQUEST, least_bytes), Wire()
    connection.connection_made(wire)
    connection.begin()
    return connection, wire


def answer(body: bytes, head: bytes = b"HTTP/1.1 200 OK\r\nServer: s\r\n") -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    return [data[start:stop] for start, stop in pairwise(at)]


def test_the_request_is_what_http_wants() -> None:
    assert REQUEST == (
        b"POST /v2/infer HTTP/1.1\r\nhost: 127.0.0.1:1\r\ncontent-type: a/b\r\n"
        b"content-length: 100\r\n\r\n" + b"x" * 100
    )


@given(st.lists(st.integers(0), max_size=20), st.integers(10, 400_000))
def test_an_answer_counts_once_however_it_is_cut(cuts: list[int], size: int) -> None:
    connection, wire = connected()
    for number in range(3):
        for piece in pieces(answer(b"y" * size), cuts):
            assert connection.count == number
            feed(connection, piece)
    assert connection.fault is None
    assert (connection.count, len(connection.latencies_s)) == (3, 3)
    assert wire.written == [REQUEST] * 4


def test_heads_may_change() -> None:
    connection, _ = connected()
    feed(connection, answer(b"y" * 20))
    feed(connection, answer(b"y" * 30, b"HTTP/1.1 200 OK\r\ndate: now\r\n"))
    assert (connection.count, connection.fault) == (2, None)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (answer(b"y" * 20, b"HTTP/1.1 429 Too Many\r\n"), "expected status 200"),
        (answer(b"y" * 9), "an answer has 9 bytes, expected 10"),
        (answer(b"y" * 20) + b"z", "longer than it declared"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "content-length"),
    ],
)
def test_what_is_no_good_answer_is_a_fault(data: bytes, fault: str) -> None:
    connection, wire = connected()
    feed(connection, data)
    assert fault in str(connection.fault)
    assert (connection.count, wire.aborted, wire.written) == (0, True, [REQUEST])


def test_a_closed_connection_is_a_fault() -> None:
    connection, _ = connected()
    connection.connection_lost(None)
    assert "closed" in str(connection.fault)


@given(st.lists(st.integers(0), max_size=20), st.integers(0, 600_000))
def test_the_echo_server_echoes(cuts: list[int], size: int) -> None:
    server, wire = EchoServer(), Wire()
    server.connection_made(wire)
    body = bytes(range(256)) * (size // 256)
    for _ in range(2):
        for piece in pieces(build_request("http://h/", body, {}), cuts):
            feed(server, piece)
    assert len(wire.written) == 2
    for written in wire.written:
        head, _, echoed = written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert content_length(head) == len(body)
        assert echoed == body
