"""Groups that were mixed and encoded once, to be sent many times by a simulated fleet.

A device never sends a mixture twice. A load generator may: what the cloud does with a message does
not depend on whether it has seen the like, and a generator that mixes anew for each message is busy
with that. The stock holds, for each group and round, the rows as they travel and what may come
back, in one piece of memory that all processes of a machine share (:mod:`edge.fleet.shared`).

What may come back is kept as float16, the type that answers have: a least value and how much more
is allowed, both as whole numbers in the order of the floats. So an answer is checked value by value
without converting one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from datamix.envelope import Envelope
from datamix.errors import AnswerError, ConfigError
from datamix.framing import Buffer, Dtype
from datamix.wire import is_finite
from edge.fleet.stages import Stages
from edge.fleet.workload import Inference, Outcome, Sealed

Array = npt.NDArray[Any]

_ALIGN = 64  # a cache line
_LARGEST = float(np.finfo(np.float16).max)
_RIGHT, _WRONG = Outcome(), Outcome(True)


@dataclass(frozen=True, slots=True)
class Leg:
    """One round, the same for all groups.

    Attributes:
        rows_shape: (K, *input_shape) of what is sent.
        answer_shape: (K, *output_shape) of what comes back.
    """

    rows_shape: tuple[int, ...]
    answer_shape: tuple[int, ...]

    @property
    def sizes_bytes(self) -> tuple[int, int, int]:
        """Of the rows, the least values and the spans, padded to whole cache lines."""
        rows, answer = (2 * math.prod(shape) for shape in (self.rows_shape, self.answer_shape))
        return _padded(rows), _padded(answer), _padded(answer)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stock lies in memory: group after group, and in each round after round.

    Attributes:
        groups: how many.
        legs: their rounds.
        group_bytes: bytes of one group.
    """

    groups: int
    legs: tuple[Leg, ...]

    group_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Add up."""
        object.__setattr__(self, "group_bytes", sum(sum(leg.sizes_bytes) for leg in self.legs))

    @property
    def size_bytes(self) -> int:
        """Bytes of all."""
        return self.groups * self.group_bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """One round of one group.

    Attributes:
        rows: (K, *input_shape) float16, mixed.
        expected: (K, *output_shape) float32, the block's output for these very rows.
    """

    rows: Array
    expected: Array


def encode(leg: Leg, prepared: Prepared, tolerance: float) -> Iterator[Buffer]:
    """A round of a group as the stock keeps it.

    tolerance: the largest deviation that arithmetic explains, relative to max(1, |value|).
    """
    if prepared.rows.shape != leg.rows_shape or prepared.expected.shape != leg.answer_shape:
        raise ConfigError(
            f"a round has rows {prepared.rows.shape} and answers {prepared.expected.shape},"
            f" expected {leg.rows_shape} and {leg.answer_shape}"
        )
    least, span = bounds(prepared.expected, tolerance)
    parts = (prepared.rows.astype(np.float16), least, span)
    for part, size in zip(parts, leg.sizes_bytes, strict=True):
        yield part.tobytes()
        yield bytes(size - part.nbytes)


def bounds(expected: Array, tolerance: float) -> tuple[Array, Array]:
    """The float16 values within the tolerance: the least, int16, and how many more there are.

    Both count float16 values in their order, see :func:`ordered`. Exactly those values ``v`` are
    within for which ``|v - expected| <= tolerance * max(1, |expected|)``.

    Raises:
        ConfigError: a value has no float16 value within the tolerance.
    """
    if not is_finite(np.ascontiguousarray(expected, np.float32)):
        raise ConfigError("an answer holds NaN or Inf, which no float16 value is near")
    exact = expected.astype(np.float64)
    width = tolerance * np.maximum(1, np.abs(exact))
    low, high = np.maximum(exact - width, -_LARGEST), np.minimum(exact + width, _LARGEST)
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        least, most = low.astype(np.float16), high.astype(np.float16)
    infinity = np.float16(np.inf)
    least = np.where(least < low, np.nextafter(least, infinity), least)
    most = np.where(most > high, np.nextafter(most, -infinity), most)
    # Both zeros are within if one is.
    least = np.where(least == 0, np.float16(-0.0), least)
    most = np.where(most == 0, np.float16(0.0), most)
    first, last = ordered(least), ordered(most)
    span = last.astype(np.int32) - first
    if (span < 0).any():
        raise ConfigError(
            f"an answer lies within {tolerance:g} of no float16 value, expected a wider tolerance"
        )
    return first, span.astype(np.uint16)


def ordered(values: Array, out: npt.NDArray[np.int16] | None = None) -> npt.NDArray[np.int16]:
    """float16 values as int16 that compare as they do; -0 stands just below 0, NaN outside.

    out: int16 of the same shape to write to, or None for a new array.
    """
    bits = values.view(np.int16)
    signs: npt.NDArray[np.int16] = np.right_shift(bits, 15, out=out)
    signs &= 0x7FFF
    signs ^= bits
    return signs


class Stock:
    """A stock in memory, ready to be sent.

    Attributes:
        layout: what is where.
    """

    def __init__(self, layout: Layout, memory: Buffer) -> None:
        """Look at a stock that lies in ``memory``.

        Raises:
            ConfigError: the memory has another size.
        """
        view = memoryview(memory).toreadonly().cast("B")
        if len(view) != layout.size_bytes:
            raise ConfigError(f"a stock has {len(view)} bytes, expected {layout.size_bytes}")
        self.layout = layout
        self._view = view
        # Where, within a group, each round has its rows, least values and spans.
        self._places: list[tuple[int, int, int, int]] = []
        # For each round what a comparison writes to: as signed, as unsigned, and over or not.
        self._scratch: list[tuple[Array, Array, Array]] = []
        at = 0
        for leg in layout.legs:
            signed = np.empty(math.prod(leg.answer_shape), np.int16)
            self._scratch.append((signed, signed.view(np.uint16), np.empty(len(signed), np.bool_)))
            rows, least, span = leg.sizes_bytes
            stop = at + 2 * math.prod(leg.rows_shape)
            self._places.append((at, stop, at + rows, at + rows + least))
            at += rows + least + span

    def rows(self, group: int, leg: int) -> memoryview:
        """The rows of one message, as they travel."""
        start = group * self.layout.group_bytes
        first, stop, *_ = self._places[leg]
        return self._view[start + first : start + stop]

    def accepts(self, group: int, leg: int, answer: Array) -> bool:
        """Whether each value of a float16 answer, of the right shape, is what it may be.

        For one thread: it writes to memory of the stock's own.
        """
        start = group * self.layout.group_bytes
        *_, least_at, span_at = self._places[leg]
        least = np.frombuffer(self._view, np.uint16, answer.size, start + least_at)
        span = np.frombuffer(self._view, np.uint16, answer.size, start + span_at)
        signed, above, over = self._scratch[leg]
        ordered(answer.reshape(-1), signed)
        above -= least  # below the least it wraps to a large number
        np.greater(above, span, over)
        return not over.any()


class StockWorkload:
    """Sends the groups of a stock in turn; nothing is mixed, de-mixed or classified."""

    dtype: Dtype = "float16"
    stages: Stages | None = None

    def __init__(self, stock: Stock, verify: bool) -> None:
        """Send what is in ``stock``; ``verify`` compares the answers."""
        legs = stock.layout.legs
        self.rows = legs[0].rows_shape[0]
        self.rounds = len(legs)
        self._stock = stock
        self._verify = verify
        self._envelopes = [Envelope(leg.rows_shape, block) for block, leg in enumerate(legs)]

    def start(self, index: int) -> Inference:
        """Send one group through its rounds: what each asks does not depend on the last answer."""
        group = index % self._stock.layout.groups
        right = True
        for envelope, leg in zip(self._envelopes, self._stock.layout.legs, strict=True):
            block = envelope.block
            response = yield Sealed(envelope, (self._stock.rows(group, block),))
            answer = response.features
            if answer.shape != leg.answer_shape or answer.dtype != np.float16:
                raise AnswerError(
                    f"the answer is {answer.shape} {answer.dtype},"
                    f" expected {leg.answer_shape} float16"
                )
            if self._verify and self._stock.accepts(group, block, answer):
                continue
            if not is_finite(answer):
                raise AnswerError("the cloud's answer holds NaN or Inf, expected finite values")
            right = right and not self._verify
        return _RIGHT if right else _WRONG


def _padded(size: int) -> int:
    return size + -size % _ALIGN


def parts(
    layout: Layout, groups: Iterable[Iterable[Prepared]], tolerance: float
) -> Iterator[Buffer]:
    """Everything that a stock holds, in its order, for :class:`edge.fleet.shared.SharedBytes`."""
    for rounds in groups:
        for leg, prepared in zip(layout.legs, rounds, strict=True):
            yield from encode(leg, prepared, tolerance)
