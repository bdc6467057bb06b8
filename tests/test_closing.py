"""A with block closes, whatever happened within."""

from __future__ import annotations

import pytest

from edge.closing import Closing


class Door(Closing):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_it_is_closed_on_the_way_out() -> None:
    with Door() as door:
        assert door.closed == 0
    assert door.closed == 1


def test_an_error_passes_and_it_is_closed_all_the_same() -> None:
    door = Door()
    with pytest.raises(KeyError), door:
        raise KeyError
    assert door.closed == 1


def test_what_cannot_be_closed_is_none() -> None:
    with pytest.raises(TypeError, match="close"):
        type("Hole", (Closing,), {})()
