"""Pictures to arrays with pillow, several at a time: decoding frees the interpreter's lock."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Fit = Callable[["Image"], "Image"]

_BUNCH = 64  # pictures per task; small ones take less time than handing over a task


class Pictures:
    """Files that are read when asked for: (n, 3, size, size) uint8, brought to size by ``fit``.

    Attributes:
        paths: one per picture.
    """

    def __init__(self, paths: Sequence[Path], size: int, fit: Fit) -> None:
        """Remember where they are; nothing is opened."""
        self.paths = paths
        self._size = size
        self._fit = fit

    def __len__(self) -> int:
        """How many."""
        return len(self.paths)

    def __getitem__(self, rows: npt.NDArray[np.int64] | slice, /) -> Pixels:
        """Decode some.

        Raises:
            ConfigError: a file that is no picture, or not there any more.
        """
        chosen = np.arange(len(self.paths))[rows]
        return decode([self.paths[i] for i in chosen], (self._size, self._size), self._fit)


def decode(
    sources: Sequence[Path | bytes], size: tuple[int, int], fit: Fit | None = None
) -> Pixels:
    """Decode pictures as RGB.

    Args:
        sources: files, or what would be in them.
        size: (height, width) of every picture, after ``fit``.
        fit: crops or resizes; None where every picture must have ``size`` as it is.

    Returns:
        (n, 3, height, width) uint8.

    Raises:
        ConfigError: something that is no picture, or one of another size.
    """
    pixels = np.empty((len(sources), *size, 3), np.uint8)

    def some(start: int) -> None:
        for index in range(start, min(start + _BUNCH, len(sources))):
            pixels[index] = _decode(sources[index], index, size, fit)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(0, len(sources), _BUNCH)))
    return pixels.transpose(0, 3, 1, 2)


def _decode(source: Path | bytes, index: int, size: tuple[int, int], fit: Fit | None) -> Any:
    from PIL import Image

    name = f"picture {index}" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            # A picture of many times the size is decoded at a half, a quarter... where JPEG can.
            if fit is not None:
                picture.draft("RGB", (2 * size[1], 2 * size[0]))
            coloured = picture.convert("RGB")
    except FileNotFoundError:
        raise ConfigError(f"{name} is not there") from None
    # SyntaxError and ValueError: pillow's plugins on broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ConfigError(f"{name} is no picture that can be read") from None
    fitted = coloured if fit is None else fit(coloured)
    if fitted.size != (size[1], size[0]):
        raise ConfigError(f"{name} is {fitted.height}x{fitted.width}, expected {size[0]}x{size[1]}")
    return np.asarray(fitted)
