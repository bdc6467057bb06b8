"""Inputs from files, for the command line: pictures, or arrays as numpy saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError

Array = npt.NDArray[Any]


def read_inputs(
    paths: Sequence[Path], input_shape: tuple[int, ...]
) -> tuple[list[str], npt.NDArray[np.uint8]]:
    """Read pictures and ``.npy`` arrays as inputs of the shape that a bundle wants.

    A picture becomes grey or RGB, as the number of channels says, and is resized. An array holds
    one input (*input_shape) or several (n, *input_shape), uint8; a channel of 1 may be left out.

    Returns:
        A name for each input (the file's, with a number where it holds several), and the inputs
        (n, *input_shape) uint8.

    Raises:
        ConfigError: a file that cannot be read as such.
    """
    names: list[str] = []
    inputs: list[Array] = []
    for path in paths:
        found = _array(path, input_shape) if path.suffix == ".npy" else _picture(path, input_shape)
        names += [str(path)] if len(found) == 1 else [f"{path}[{i}]" for i in range(len(found))]
        inputs.append(found)
    if not inputs:
        return [], np.empty((0, *input_shape), np.uint8)
    return names, np.concatenate(inputs)


def _array(path: Path, input_shape: tuple[int, ...]) -> Array:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no array that numpy can load: {error}") from error
    if array.dtype != np.uint8:
        raise ConfigError(f"{path} holds {array.dtype}, expected uint8")
    wanted = [input_shape, input_shape[1:]] if input_shape[0] == 1 else [input_shape]
    for shape in wanted:
        if array.shape in (shape, (len(array), *shape)):
            inputs: Array = array.reshape(-1, *input_shape)
            return inputs
    raise ConfigError(f"{path} has shape {array.shape}, expected (n, {str(input_shape)[1:-1]})")


def _picture(path: Path, input_shape: tuple[int, ...]) -> Array:
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
