"""Inputs from files, for the command line: pictures, sound, or arrays as numpy saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.preprocessing import ImagePreprocessing, LogMelPreprocessing, Preprocessing
from edge.data.wav import read_wav

Array = npt.NDArray[Any]


def read_inputs(paths: Sequence[Path], preprocessing: Preprocessing) -> tuple[list[str], Array]:
    """Read files as raw inputs of the kind that a bundle wants.

    A picture becomes grey or RGB, as the number of channels says, and is resized. A ``.wav`` file
    is mono, of 16 bits and at the bundle's rate; a shorter one than the bundle takes ends in
    silence. A ``.npy`` array holds one input or several, of the raw type; a channel of 1 may be
    left out.

    Returns:
        A name for each input (the file's, with a number where it holds several), and the inputs,
        (n, C, H, W) uint8 or (n, samples) int16.

    Raises:
        ConfigError: a file that cannot be read as such.
    """
    names: list[str] = []
    inputs: list[Array] = []
    for path in paths:
        found = _read(path, preprocessing)
        names += [str(path)] if len(found) == 1 else [f"{path}[{i}]" for i in range(len(found))]
        inputs.append(found)
    if not inputs:
        return [], np.empty((0, *preprocessing.raw_shape), _dtype(preprocessing))
    return names, np.concatenate(inputs)


def _read(path: Path, preprocessing: Preprocessing) -> Array:
    if path.suffix == ".npy":
        return _array(path, preprocessing.raw_shape, _dtype(preprocessing))
    if isinstance(preprocessing, ImagePreprocessing):
        return _picture(path, preprocessing.input_shape)
    return _clip(path, preprocessing)


def _dtype(preprocessing: Preprocessing) -> np.dtype[Any]:
    return np.dtype(np.uint8 if isinstance(preprocessing, ImagePreprocessing) else np.int16)


def _array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no array that numpy can load: {error}") from error
    if array.dtype != dtype:
        raise ConfigError(f"{path} holds {array.dtype}, expected {dtype}")
    wanted = [shape, shape[1:]] if len(shape) > 1 and shape[0] == 1 else [shape]
    for one in wanted:
        if array.ndim and array.shape in (one, (len(array), *one)):
            inputs: Array = array.reshape(-1, *shape)
            return inputs
    raise ConfigError(f"{path} has shape {array.shape}, expected (n, {', '.join(map(str, shape))})")


def _clip(path: Path, preprocessing: LogMelPreprocessing) -> Array:
    samples, rate = preprocessing.samples, preprocessing.sample_rate
    found = read_wav(path, rate)
    if not 0 < len(found) <= samples:
        raise ConfigError(
            f"{path} lasts {len(found) / rate:.2f} s, expected more than 0 and at most"
            f" {samples / rate:.2f} s"
        )
    return np.pad(found, (0, samples - len(found)))[None]


def _picture(path: Path, input_shape: tuple[int, int, int]) -> Array:
    from PIL import Image, UnidentifiedImageError

    channels, height, width = input_shape
    try:
        with Image.open(path) as picture:
            mode = "L" if channels == 1 else "RGB"
            pixels = np.asarray(picture.convert(mode).resize((width, height)))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} is no picture that can be read") from error
    return pixels.reshape(1, height, width, channels).transpose(0, 3, 1, 2)
