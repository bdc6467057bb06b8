"""Canaries: noise for each block of a backbone, and what the block must make of it.

    canaries.safetensors   blocks.0.input   (rows, C, H, W) float16, as it comes off the wire
                           blocks.0.output  (rows, C, H, W) float32, and so on for every block

Whoever serves a bundle runs them on its own engine before a device's mixtures: weights that are
well-formed may still be the wrong ones, and an engine may compute something else than the modules.
The noise is drawn from a fixed seed, so nothing private stands in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from datamix.errors import BundleError

if TYPE_CHECKING:
    from torch import nn

    from datamix.schema import Shape

CANARIES: Final = "canaries.safetensors"
ROWS = 2
_HEADER_BYTES = 1 << 16

Array = npt.NDArray[Any]
Shapes = Iterable[tuple["Shape", "Shape"]]


class Canary(NamedTuple):
    """What one block must compute.

    Attributes:
        inputs: (rows, *input_shape) float16.
        outputs: (rows, *output_shape) float32.
    """

    inputs: Array
    outputs: Array


def make(blocks: nn.ModuleList, input_shapes: Sequence[Shape]) -> bytes:
    """The file for these blocks, which are in eval mode, float32.

    Raises:
        BundleError: a block makes no finite number of noise.
    """
    import torch
    from safetensors.numpy import save

    random = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    for index, (block, shape) in enumerate(zip(blocks, input_shapes, strict=True)):
        inputs = random.standard_normal((ROWS, *shape), np.float32).astype(np.float16)
        with torch.inference_mode():
            outputs = block(torch.from_numpy(inputs.astype(np.float32))).numpy()
        if not np.isfinite(outputs).all():
            raise BundleError(f"block {index} makes NaN or Inf of noise, expected finite values")
        tensors[f"blocks.{index}.input"] = inputs
        tensors[f"blocks.{index}.output"] = np.ascontiguousarray(outputs, np.float32)
    body: bytes = save(tensors)
    return body


def parse(body: bytes, shapes: Shapes) -> tuple[Canary, ...]:
    """Read the file of a backbone whose blocks have these shapes of rows, in and out.

    Raises:
        BundleError: it is not one.
    """
    from safetensors.numpy import load

    try:
        tensors = load(body)
    except Exception as error:  # safetensors raises its own type, and others on odd headers
        raise BundleError(f"{CANARIES}: not valid safetensors") from error
    canaries = []
    for index, (inputs, outputs) in enumerate(shapes):
        canaries.append(
            Canary(
                _taken(tensors, f"blocks.{index}.input", inputs, np.float16),
                _taken(tensors, f"blocks.{index}.output", outputs, np.float32),
            )
        )
    if tensors:
        raise BundleError(f"{CANARIES}: unknown tensor {min(tensors)[:128]!r}")
    return tuple(canaries)


def most_bytes(shapes: Shapes) -> int:
    """The most that the file of such a backbone may have, in bytes."""
    values = sum(2 * np.prod(inputs) + 4 * np.prod(outputs) for inputs, outputs in shapes)
    return ROWS * int(values) + _HEADER_BYTES


def _taken(tensors: dict[str, Array], name: str, shape: Shape, dtype: type[Any]) -> Array:
    values = tensors.pop(name, None)
    if values is None:
        raise BundleError(f"{CANARIES}: tensor {name!r} is missing")
    if values.dtype != dtype or values.shape != (ROWS, *shape):
        raise BundleError(
            f"{CANARIES}: tensor {name!r} is {values.dtype} {values.shape}, expected "
            f"{np.dtype(dtype)} {(ROWS, *shape)}"
        )
    if not np.isfinite(values).all():
        raise BundleError(f"{CANARIES}: tensor {name!r} holds NaN or Inf")
    return values
