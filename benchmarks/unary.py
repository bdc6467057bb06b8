"""HTTP/1.1 as cheap as Python can have it: a keep-alive client that looks at nothing but the head.

The request is built once; an answer's head is compared with the last one's, and its body is counted
and dropped. ``EchoServer`` is the other end, against which the client's own ceiling is measured.
"""

from __future__ import annotations

import asyncio
import re
from time import monotonic
from typing import cast
from urllib.parse import urlsplit

_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BUFFER_BYTES = 1 << 18


def build_request(url: str, body: bytes, headers: dict[str, str]) -> bytes:
    """``body`` as one POST to ``url``, ready to be written."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path or '/'} HTTP/1.1", f"host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def content_length(head: bytes) -> int:
    """The length that ``head`` declares.

    Raises:
        ValueError: it declares none.
    """
    found = _LENGTH.search(head)
    if found is None:
        raise ValueError(f"head is {head[:300]!r}, expected one with a content-length")
    return int(found[1])


class Connection(asyncio.BufferedProtocol):
    """One connection that posts the same request again as soon as its answer is complete.

    Attributes:
        count: complete answers so far.
        latencies_s: how long each took, from its write to its last byte.
        fault: what was wrong with an answer, or with the connection; None while all is well.
    """

    # All connections of a process read into one buffer: nothing of it is needed after the call.
    _buffer = bytearray(_BUFFER_BYTES)
    _view = memoryview(_buffer)

    def __init__(self, request: bytes, least_bytes: int) -> None:
        """Post ``request``; an answer of less than ``least_bytes`` is a fault."""
        self.count = 0
        self.latencies_s: list[float] = []
        self.fault: str | None = None
        self._request, self._least_bytes = request, least_bytes
        self._head = b""  # the last answer's
        self._length = 0  # of the body that it declared
        self._part = b""  # a head that is not complete yet
        self._left = 0  # bytes of the body still to come
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """A server that closes is one that failed."""
        self.fault = self.fault or f"the connection was closed: {error}"

    def begin(self) -> None:
        """Post the first request."""
        self._sent = monotonic()
        self._transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Count ``nbytes`` more; post again where they complete the answer."""
        if self._left:
            self._left -= nbytes
        else:
            data: bytes | bytearray = self._buffer
            if self._part:
                data = self._part + self._buffer[:nbytes]
                nbytes = len(data)
            end = data.find(_END, 0, nbytes)
            if end < 0:
                self._part = bytes(data[:nbytes])
                return
            self._part = b""
            head = data[:end]
            if head != self._head and not self._read(bytes(head)):
                return
            self._left = self._length - (nbytes - end - len(_END))
        if self._left == 0:
            self.count += 1
            now = monotonic()
            self.latencies_s.append(now - self._sent)
            self._sent = now
            self._transport.write(self._request)
        elif self._left < 0:
            self._fail("an answer is longer than it declared")

    def _read(self, head: bytes) -> bool:
        """Check a head that differs from the last one; whether it is good."""
        try:
            self._length = content_length(head)
        except ValueError as error:
            return self._fail(str(error))
        if not head.startswith(b"HTTP/1.1 200 "):
            return self._fail(f"an answer is {head[:60]!r}, expected status 200")
        if self._length < self._least_bytes:
            return self._fail(f"an answer has {self._length} bytes, expected {self._least_bytes}")
        self._head = head
        return True

    def _fail(self, fault: str) -> bool:
        self.fault = self.fault or fault
        self._transport.abort()
        return False


class EchoServer(asyncio.BufferedProtocol):
    """Sends every body back at once, looking at nothing but its length."""

    def __init__(self) -> None:
        """Wait for the first request."""
        self._buffer = bytearray(_BUFFER_BYTES)
        self._filled = 0
        self._whole = 0  # bytes of the request being read; 0 while its head is not complete
        self._body_at = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Answer where the request is complete."""
        self._filled += nbytes
        if not self._whole:
            end = self._buffer.find(_END, 0, self._filled)
            if end < 0:
                return
            self._body_at = end + len(_END)
            self._whole = self._body_at + content_length(bytes(self._buffer[:end]))
            if self._whole > len(self._buffer):
                self._buffer = self._buffer[: self._filled] + bytes(self._whole - self._filled)
        if self._filled >= self._whole:
            body = self._buffer[self._body_at : self._whole]
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)
            self._filled = self._whole = 0
