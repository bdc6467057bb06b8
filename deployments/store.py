"""Where the table of models is kept: in Ray's control store, which every node reaches.

It lives as long as the cluster's head, and longer where the head is made fault tolerant. Serve
keeps its own state in the same place.
"""

from __future__ import annotations

from typing import Protocol

from datamix.errors import Unavailable

_NAMESPACE = b"datamix"


class Store(Protocol):
    """One value that all replicas read. Both calls block the calling thread."""

    def read(self) -> bytes | None:
        """The value; None before the first write.

        Raises:
            Unavailable: the store does not answer.
        """
        ...

    def write(self, value: bytes | None) -> None:
        """Replace the value; None removes it.

        Raises:
            Unavailable: the store does not answer.
        """
        ...


class MemoryStore:
    """A store in this process, for tests and for a replica without Ray."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._value: bytes | None = None

    def read(self) -> bytes | None:
        """See :class:`Store`."""
        return self._value

    def write(self, value: bytes | None) -> None:
        """See :class:`Store`."""
        self._value = value


class RayStore:
    """Ray's internal key-value store; only where Ray is connected."""

    def __init__(self, application: str) -> None:
        """Keep the table of the Serve application of this name."""
        self._key = f"models:{application}".encode()

    def read(self) -> bytes | None:
        """See :class:`Store`."""
        from ray.experimental.internal_kv import _internal_kv_get

        try:
            value: bytes | None = _internal_kv_get(self._key, namespace=_NAMESPACE)
        except Exception as error:  # of several kinds, none of them public
            raise Unavailable(f"Ray's store does not answer: {type(error).__name__}") from error
        return value

    def write(self, value: bytes | None) -> None:
        """See :class:`Store`."""
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

        try:
            if value is None:
                _internal_kv_del(self._key, namespace=_NAMESPACE)
            else:
                _internal_kv_put(self._key, value, overwrite=True, namespace=_NAMESPACE)
        except Exception as error:
            raise Unavailable(f"Ray's store does not answer: {type(error).__name__}") from error
