"""Sealed messages are the very bytes of the wire's own encoder, and refuse what cannot travel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix import wire
from datamix.envelope import Envelope
from datamix.errors import WireError

shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
ids = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)


@settings(max_examples=60)
@given(shapes, ids, st.integers(0, 12), st.floats(-1, 1e6), st.integers(0, 2**32 - 1))
def test_a_sealed_message_is_what_the_wire_writes(
    shape: tuple[int, ...], name: str, block: int, left_s: float, seed: int
) -> None:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
    sealed = Envelope(shape, block).seal((values.tobytes()[:1], values.tobytes()[1:]), name, left_s)
    assert sealed == wire.encode_request(values, request_id=name, block=block, deadline_s=left_s)
    assert wire.decode_request(sealed).features.tobytes() == values.tobytes()


def test_what_cannot_travel_is_refused() -> None:
    for shape in ((4,), (0, 3), (2, 0)):
        with pytest.raises(WireError, match="expected \\(rows"):
            Envelope(shape)
    with pytest.raises(WireError, match="block is -1"):
        Envelope((1, 1), -1)
    envelope = Envelope((2, 3))
    assert envelope.seal([bytes(12)], "ab", 1.0)
    with pytest.raises(WireError, match="rows have 11 bytes, expected 12"):
        envelope.seal([bytes(11)], "ab", 1.0)
    for name in ("", "a b", "x" * 65, "a\n"):
        with pytest.raises(WireError, match="request_id is"):
            envelope.seal([bytes(12)], name, 1.0)
    with pytest.raises(WireError, match="more than 12 digits"):
        envelope.seal([bytes(12)], "ab", 1e10)
