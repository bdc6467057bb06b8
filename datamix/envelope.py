"""Requests around rows that are encoded already: many messages of one layout, one copy each.

:func:`datamix.wire.encode_request` takes tensors: it converts them, looks for values that are not
finite, and finds the template of the message. A load generator that sends what it has prepared
needs none of that again: here only the id and the deadline are written, and the parts are joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from datamix.errors import WireError
from datamix.framing import END, PADDING, Buffer, template
from datamix.wire import PROTOCOL, check_name

_VALUE_BYTES = 2  # of float16


class Envelope:
    """Requests with float16 rows of one shape for one block.

    The bytes are those that :func:`datamix.wire.encode_request` gives for the same values.

    Attributes:
        block: which block of the backbone.
        shape: (rows, *shape) of the features.
        size_bytes: of the rows.
        rows_at: where the rows stand in each message, counted from its end: a negative number.
    """

    __slots__ = ("_cuts", "_end", "_fields", "block", "rows_at", "shape", "size_bytes")

    def __init__(self, shape: tuple[int, ...], block: int = 0) -> None:
        """Make messages with features of ``shape``, (rows, *shape).

        Raises:
            WireError: the shape or the block cannot travel.
        """
        if len(shape) < 2 or min(shape) < 1:
            raise WireError(f"features have shape {shape}, expected (rows, *shape), not empty")
        if not 0 <= block < 10**12:
            raise WireError(f"block is {block}, expected 0 or more, at most 12 digits")
        self.block = block
        self.size_bytes = math.prod(shape) * _VALUE_BYTES
        self.shape = shape
        self._fields = (("datamix.block", str(block)),) if block else ()
        self._end = bytes(-self.size_bytes % PADDING) + END
        self.rows_at = -self.size_bytes - len(self._end)
        # By the lengths of id and deadline, of which there are a few.
        self._cuts: dict[tuple[int, int], tuple[bytes, bytes, bytes, bool, int]] = {}

    def seal(self, rows: Iterable[Buffer], request_id: str, deadline_s: float) -> bytes:
        """One whole message; the rows stand in it from ``rows_at`` on.

        Args:
            rows: the values in parts, little-endian float16 and finite, ``size_bytes`` together.
            request_id: names the request.
            deadline_s: the budget left on arrival, in seconds.

        Raises:
            WireError: other rows than the layout's, or an id or deadline that cannot travel.
        """
        name = check_name("request_id", request_id).encode()
        budget = b"%d" % math.ceil(max(0.0, deadline_s) * 1000)
        lengths = len(name), len(budget)
        cut = self._cuts.get(lengths)
        if cut is None:
            cut = self._cuts[lengths] = self._cut(*lengths)
        head, middle, tail, swapped, size_bytes = cut
        if swapped:
            name, budget = budget, name
        message = b"".join((head, name, middle, budget, tail, *rows, self._end))
        if len(message) != size_bytes:
            wrong = self.size_bytes + len(message) - size_bytes
            raise WireError(f"rows have {wrong} bytes, expected {self.size_bytes}")
        return message

    def _cut(self, name: int, budget: int) -> tuple[bytes, bytes, bytes, bool, int]:
        """What stands around id and deadline, whether the deadline is first, and the whole size."""
        if budget > 12:
            raise WireError("deadline has more than 12 digits of milliseconds")
        fields = (
            ("datamix.protocol", PROTOCOL),
            ("datamix.request_id", name),
            *self._fields,
            ("datamix.deadline_ms", budget),
        )
        layout = template("float16", self.shape, fields)
        head, middle, tail = layout.pieces
        fixed = len(head) + name + len(middle) + budget + len(tail) + len(self._end)
        return head, middle, tail, layout.order == (1, 0), fixed + self.size_bytes
