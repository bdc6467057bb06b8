"""What the batcher needs of an engine, and the engine that computes nothing.

An engine runs a block of the backbone on a batch. :meth:`Engine.start` stages the rows and
launches; :meth:`Pending.wait` gives the outputs. Where an engine can copy one batch while it
computes another its ``depth`` is 2, and the batcher starts the second before the first is done.

A request gets the same result in any batch, up to the order of summation: within ``TOLERANCE`` of
what it would get alone, and within ``ROUNDING`` of the modules in float32, both relative to
``max(1, |value|)``.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from datamix.errors import ConfigError
from datamix.wire import dequantise

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest difference between batched and alone by the engine's dtype, relative to max(1, |value|).

Batches of another size sum in another order. De-mixing multiplies this by the condition of the
coefficients, which is 1 for ours.
"""

ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3}
"""Largest difference from the modules run as they are in float32, relative to max(1, |value|).

Every layer rounds to the engine's dtype. A bundle promises its own tolerance for float32.
"""


class Rows(NamedTuple):
    """The rows of one request, as they came off the wire.

    Attributes:
        features: (rows, *shape), float16, float32, int8 or int16.
        scale: (rows,) float32 with integers, else None.
    """

    features: Array
    scale: Array | None


class Block(NamedTuple):
    """What is known of a block.

    Attributes:
        input_shape: of one row before it.
        output_shape: of one row after it.
        linear: whether it is exactly linear, so that noise can be taken off its output.
    """

    input_shape: Shape
    output_shape: Shape
    linear: bool = False


class Pending(Protocol):
    """One batch on its way through an engine."""

    @property
    def copied_bytes(self) -> int:
        """Bytes of rows that were copied for it on their way to where they are computed."""
        ...

    @property
    def copy_s(self) -> float:
        """How long its rows travelled to the device after ``start`` had returned, in seconds.

        What another batch's computation can hide; known once it has been waited for.
        """
        ...

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once; never blocks."""
        ...

    def wait(self) -> Sequence[Array]:
        """Block until it is computed; called once. Releases the GIL meanwhile.

        Returns:
            One output per request, in order: (rows, *output_shape), float16 where every request of
            the batch came as float16, else float32. They stay valid whatever is started next.
        """
        ...


class Engine(ABC):
    """Runs blocks on batches. One thread at a time calls it.

    Attributes:
        name: short name for metadata and metrics, such as ``torch:cpu:float32``.
        blocks: shapes of every block it can run.
        depth: batches that may be under way at once; they finish in the order of their start.
    """

    name: str
    blocks: Sequence[Block]
    depth: int = 1

    @abstractmethod
    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        """Run one block on the rows of all requests, as one batch.

        The rows are read before it returns. An engine of depth 1 may compute here, too; others do
        not wait for the device.
        """

    def run(self, block: int, requests: Sequence[Rows]) -> Sequence[Array]:
        """Start one batch and wait for it."""
        return self.start(block, requests).wait()


class Settled:
    """A batch that was computed when it was started."""

    __slots__ = ("copied_bytes", "outputs")
    copy_s = 0.0

    def __init__(self, outputs: Sequence[Array], copied_bytes: int = 0) -> None:
        """Hold one output per request."""
        self.outputs = outputs
        self.copied_bytes = copied_bytes

    def done(self) -> bool:
        """It is."""
        return True

    def wait(self) -> Sequence[Array]:
        """Give the outputs."""
        return self.outputs


class EchoEngine(Engine):
    """The null engine: each row comes back as it went in, at once.

    It shows what everything around an engine costs.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Echo blocks of the given row shapes."""
        self.name = "null"
        self.blocks = [Block(shape, shape, linear=True) for shape in shapes]

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        """Hand float rows on as they are; only integers are made anew."""
        copied = 0
        outputs = []
        for features, scale in requests:
            if scale is not None:
                features = dequantise(features, scale)
                copied += features.nbytes
            outputs.append(features)
        return Settled(outputs, copied)


def check_device(device: str) -> None:
    """Check the name of a device, not whether it is there.

    Raises:
        ConfigError: neither ``cpu`` nor ``cuda`` nor ``cuda:N``.
    """
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise ConfigError(f"engine device is {device!r}, expected cpu, cuda or cuda:N")


class EngineText(NamedTuple):
    """What the setting ``engine`` says.

    Attributes:
        kind: ``torch``, ``null`` or ``emulated``.
        a_s: seconds per batch of an emulated engine without a profile.
        b_s: seconds per row of it.
        profile: path of the profile of an emulated engine that has one.
    """

    kind: str
    a_s: float = 0.0
    b_s: float = 0.0
    profile: str | None = None


def parse_engine(text: str) -> EngineText:
    """Read ``torch``, ``null``, ``emulated:a_s,b_s`` or ``emulated:PATH.json``.

    Raises:
        ConfigError: anything else.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "emulated":
            if rest.endswith(".json"):
                return EngineText(kind, profile=rest)
            a_s, b_s = (float(number) for number in rest.split(","))
            if 0 <= a_s < math.inf and 0 <= b_s < math.inf:
                return EngineText(kind, a_s, b_s)
        if text in ("torch", "null"):
            return EngineText(kind)
    except ValueError:
        pass
    raise ConfigError(
        f"engine is {text!r}, expected torch, null, emulated:a_s,b_s in seconds or "
        "emulated:PATH.json"
    )
