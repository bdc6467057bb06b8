"""One inference of one group, without any input or output: the way of the data on the device.

    stem features -> (protect -> cloud block -> restore -> bridge) per round -> head -> outputs

Protecting is mixing, or what else the mode does (:mod:`edge.modes`).

Written as a generator so that one definition serves the client, the fleet simulator and the tests:
whoever drives it sends each :class:`Round` to the cloud and feeds the answer back in.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from datamix.errors import AnswerError
from datamix.wire import is_finite
from edge.modes import Mix, Mode

if TYPE_CHECKING:
    from datamix.bundle import Manifest

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


class Device(Protocol):
    """The parts of the network that stay on the device; see :mod:`edge.runtime`."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        ...

    def preprocess(self, raw: Array) -> Floats:
        """Raw inputs (n, *raw_shape) as the stem wants them, (n, *input_shape)."""
        ...

    def stem(self, inputs: Array) -> Floats:
        """Inputs (n, *input_shape) to features (n, C, H, W)."""
        ...

    def bridge(self, index: int, features: Array) -> Floats:
        """De-mixed output of block ``index`` to the features of the next round."""
        ...

    def head(self, features: Array) -> Floats:
        """De-mixed output of the last block to outputs (n, classes)."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """One trip to the cloud.

    Attributes:
        block: which block of the backbone.
        features: (K, C, H, W) float32 mixtures, in the clear of the wire but not of the cloud.
        step: what these are whole multiples of, for a wire of integers; None for floats.
    """

    block: int
    features: Floats
    step: float | None = None


def check_answer(answer: Array, rows: int, output_shape: tuple[int, ...]) -> None:
    """Refuse an answer that cannot be what the block computed.

    Raises:
        AnswerError: not ``rows`` rows of ``output_shape``, or a value that is not finite.
    """
    expected = (rows, *output_shape)
    if answer.shape != expected:
        raise AnswerError(f"the cloud's answer has shape {answer.shape}, expected {expected}")
    if not is_finite(answer):
        raise AnswerError("the cloud's answer holds NaN or Inf, expected finite values")


def infer_group(
    device: Device, features: Array, mode: Mode | None = None
) -> Generator[Round, Floats, Floats]:
    """Infer one group through the cloud.

    Each round has a fresh secret: mixing the same features twice with different matrices tells the
    cloud nothing more than once (A is orthogonal), but reusing one matrix over rounds would tie the
    rounds together. A secret is wiped as soon as its answer is there, or the inference is given up.

    Args:
        device: stem, bridges and head, and the manifest.
        features: (K, C, H, W) float32, the stem's output for the group.
        mode: what protects this group; None for plain mixing.

    Yields:
        What leaves in each round; expects the cloud's answer (K, *output_shape) float32 to be sent
        in.

    Returns:
        Outputs (K, classes) float32.

    Raises:
        AnswerError: an answer with the wrong shape or values that are not finite.
    """
    mode = mode or Mix()
    rows = len(features)
    blocks = device.manifest.blocks
    for index, block in enumerate(blocks):
        leaving, secret = mode.protect(index, features)
        try:
            answer = yield Round(index, leaving, mode.step)
            check_answer(answer, rows, block.output_shape)
            features = secret.restore(answer)
        finally:
            secret.wipe()
        if index < len(blocks) - 1:
            features = device.bridge(index, features)
    return device.head(features)
