"""Whole messages on a stream of bytes: each behind its length in four bytes."""

from __future__ import annotations

_HEAD_BYTES = 4


def pack(message: bytes) -> bytes:
    """One message with its length before it."""
    return len(message).to_bytes(_HEAD_BYTES, "big") + message


class Unpacker:
    """Puts messages together from pieces of any size."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next piece; return the messages that are complete with it, in order."""
        buffer = self._buffer
        buffer += data
        found = []
        while len(buffer) >= _HEAD_BYTES:
            end = _HEAD_BYTES + int.from_bytes(buffer[:_HEAD_BYTES], "big")
            if len(buffer) < end:
                break
            found.append(bytes(buffer[_HEAD_BYTES:end]))
            del buffer[:end]
        return found
