"""Pictures as PNG, without a library: 8 bits, grey or colour (W3C PNG specification)."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """One picture (1 or 3, H, W) uint8 as a PNG file.

    Raises:
        ConfigError: another shape or type.
    """
    if pixels.ndim != 3 or len(pixels) not in (1, 3) or pixels.dtype != np.uint8 or not pixels.size:
        raise ConfigError(f"picture has shape {pixels.shape} of {pixels.dtype}, expected uint8")
    channels, height, width = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with filter 0: none
    rows[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
