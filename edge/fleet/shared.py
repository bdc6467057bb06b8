"""Memory that the processes of one run share, without a name that could be left behind.

A named segment in ``/dev/shm`` outlives whoever is killed before it is unlinked. This one is a file
that has no name: its descriptor goes to the spawned processes, each maps it read-only, and the
kernel frees the one copy with the last of them, however they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterable
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

from datamix.errors import ConfigError
from datamix.framing import Buffer
from edge.closing import Closing


class SharedBytes(Closing):
    """Bytes that are written once, and read by this process and those spawned with it.

    Pickles while a process is being spawned, as the one copy; not otherwise.

    Attributes:
        view: all of them, read-only.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        """Map ``size`` bytes of an open file; takes over the descriptor."""
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        self.view = memoryview(self._map)

    @classmethod
    def write(cls, parts: Iterable[Buffer]) -> SharedBytes:
        """Keep ``parts``, one behind the other.

        Raises:
            ConfigError: this machine has no memory for them, or there are none.
        """
        descriptor = _nameless()
        size = 0
        try:
            with open(descriptor, "wb", closefd=False) as file:
                for part in parts:
                    size += file.write(part)
            if not size:
                raise ConfigError("there are no bytes to share, expected at least one")
            if hasattr(fcntl, "F_ADD_SEALS"):  # from now on nobody can, not even by mistake
                seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
            return cls(descriptor, size)
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(
                f"no room for {size} bytes and more of shared memory: {error.strerror}"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Let go of the memory, if nothing here looks at it any more; a second call is harmless."""
        with contextlib.suppress(BufferError):  # an array still does: freed with the process
            self.view.release()
            self._map.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a process that is being spawned, as a descriptor.

        Raises:
            TypeError: no process is: elsewhere there is nothing to map.
        """
        if get_spawning_popen() is None:
            raise TypeError("shared bytes are pickled, expected only for a process being spawned")
        return _attach, (reduction.DupFd(self._descriptor), len(self.view))


def _nameless() -> int:
    if hasattr(os, "memfd_create"):  # Linux
        return os.memfd_create("datamix-fleet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _attach(descriptor: Any, size: int) -> SharedBytes:
    return SharedBytes(descriptor.detach(), size)
