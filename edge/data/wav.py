"""Clips of 16-bit mono sound from wav files, by Python's own reader."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Samples = npt.NDArray[np.int16]
_MAX_SAMPLES = 1 << 24


class Clips:
    """Wav files that are read when asked for: (n, samples) int16.

    Shorter ones end in silence; longer ones are cut.

    Attributes:
        paths: one per clip.
    """

    def __init__(self, paths: Sequence[Path], samples: int, sample_rate: int) -> None:
        """Remember where they are; nothing is opened."""
        self.paths = paths
        self._samples = samples
        self._sample_rate = sample_rate

    def __len__(self) -> int:
        """How many."""
        return len(self.paths)

    def __getitem__(self, rows: npt.NDArray[np.int64] | slice, /) -> Samples:
        """Read some.

        Raises:
            ConfigError: a file that is no such clip, or not there any more.
        """
        chosen = np.arange(len(self.paths))[rows]
        clips = np.zeros((len(chosen), self._samples), np.int16)
        for clip, index in zip(clips, chosen, strict=True):
            found = read_wav(self.paths[index], self._sample_rate)[: self._samples]
            clip[: len(found)] = found
        return clips


def read_wav(path: Path, sample_rate: int) -> Samples:
    """Read a mono wav file of 16-bit samples at ``sample_rate``, whole.

    Raises:
        ConfigError: missing, broken, or of another kind.
    """
    try:
        with wave.open(str(path), "rb") as file:
            found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            if found != (1, 16, sample_rate):
                raise ConfigError(
                    f"{path} has {found[0]} channels of {found[1]} bits at {found[2]} Hz,"
                    f" expected 1 of 16 bits at {sample_rate} Hz"
                )
            count = file.getnframes()
            if count > _MAX_SAMPLES:
                raise ConfigError(f"{path} has {count} samples, expected at most {_MAX_SAMPLES}")
            body = file.readframes(count)
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there") from None
    except (OSError, EOFError, wave.Error) as error:
        raise ConfigError(f"{path} is no wav file that can be read: {error}") from None
    if len(body) != 2 * count:
        raise ConfigError(f"{path} is cut off: {len(body) // 2} of {count} samples")
    return np.frombuffer(body, "<i2").astype(np.int16)
