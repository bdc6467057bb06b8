"""Read the pickles in which CIFAR is published, without letting them do anything.

A pickle is a program. This one may build dicts, lists, numbers and byte strings, and call three
names of numpy, which stand here for plain records of what they were given: numpy's own never run.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

_MAX_BYTES = 1 << 28
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")


class _Dtype:
    """What a pickle says of an array's type."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: nothing that a byte has."""


class _Array:
    """An array as its pickle tells it; only bytes are of interest."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self) -> npt.NDArray[np.uint8]:
        """The array, if it is one of uint8 that holds what its shape says."""
        _, shape, dtype, fortran, body = self.state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1") or fortran:
            raise ValueError("an array of another type than uint8")
        if not isinstance(body, bytes) or math.prod(shape) != len(body):
            raise ValueError("an array that is shorter or longer than its shape")
        return np.frombuffer(body, np.uint8).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_ALLOWED = {"_reconstruct": _reconstruct, "ndarray": _Array, "dtype": _Dtype}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module not in _MODULES or name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[name]


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a dict of byte strings, numbers, lists and uint8 arrays.

    Returns:
        The dict with its keys as text and its arrays as numpy arrays.

    Raises:
        ConfigError: too large, cut off, or a pickle that asks for anything else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_BYTES} bytes, expected a part of CIFAR")
        found = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {_text(key): _plain(value) for key, value in found.items()}
    except ConfigError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        sentence = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is no pickle of arrays and numbers: {sentence}") from None


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _plain(value: Any) -> Any:
    return value.values() if isinstance(value, _Array) else value
