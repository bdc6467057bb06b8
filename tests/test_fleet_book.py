"""What a shard writes down, without a loop, a socket or a clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix import wire
from edge.fleet import result
from edge.fleet.book import Book
from edge.fleet.config import FleetConfig
from edge.fleet.device import FleetDevice

ROWS = 4


def make_book(**changes: Any) -> Book:
    settings: dict[str, Any] = {"devices": 3, "rate": 10, "duration_s": 1.0, "pacer": "constant"}
    config = FleetConfig(url="http://cloud", workload="echo", **(settings | changes))
    book = Book(config.schedule(), ROWS, config)
    book.start_s = 100.0
    return book


def answer(request_id: str) -> wire.Response:
    features = np.zeros((ROWS, 2), np.float32)
    return wire.Response(features, None, request_id, queue_s=0.1, compute_s=0.2, batch_rows=16)


def test_nothing_has_happened_at_first() -> None:
    book = make_book()
    assert len(book.due()) == len(book.table) == book.rows == 10
    assert np.all(book.table["status"] == 0) and np.isnan(book.table["done_s"]).all()
    assert book.answered().sum() == 0


@pytest.mark.parametrize(
    ("status", "counter"),
    [
        (result.OK, "ok"),
        (result.CANCELLED, "cancelled"),
        (result.WRONG, "failed"),
        (result.TIMEOUT, "failed"),
        (503, "failed"),
    ],
)
def test_an_end_is_counted_once_and_only_right_answers_have_a_latency(
    status: int, counter: str
) -> None:
    book = make_book()
    assert book.end(3, status, 100.8) == pytest.approx(0.8)
    assert book.table["status"][3] == status
    assert book.table["done_s"][3] == pytest.approx(0.8)
    assert getattr(book.counters, counter) == 1
    assert book.counters.ok + book.counters.cancelled + book.counters.failed == 1
    expected = [0.8 - book.table["scheduled_s"][3]] if status == result.OK else []
    assert book.take_latencies() == pytest.approx(expected)
    assert book.take_latencies() == []


def test_rounds_add_up_and_those_after_the_window_are_told_apart() -> None:
    book = make_book()
    for now_s in (100.5, 101.5):
        book.count_answer(2, answer(book.request_id(2, 0)), now_s)
    row = result.result(book.table, 2)
    assert (row.rounds, row.batch_rows) == (2, 32)
    assert [row.queue_s, row.compute_s] == pytest.approx([0.2, 0.4])
    assert book.counters.requests_ok == 2
    assert (book.counters.requests_in_window, book.counters.rows_in_window) == (1, ROWS)
    assert book.answered()[:2].tolist() == [[1, ROWS], [1, ROWS]]


def test_an_answer_long_after_the_end_is_counted_in_the_last_second() -> None:
    book = make_book()
    book.count_answer(0, answer(book.request_id(0, 0)), 1e6)
    assert book.answered()[-1].tolist() == [1, ROWS]


@pytest.mark.parametrize(
    ("status", "counter"),
    [
        (result.OK, "duplicates"),
        (503, "duplicates"),
        (result.TIMEOUT, "late"),
        (result.CANCELLED, "late"),
        (result.STOPPED, "late"),
    ],
)
def test_a_stray_answer_is_late_or_a_duplicate(status: int, counter: str) -> None:
    book = make_book()
    book.end(7, status, 100.5)
    book.count_stray(book.request_id(7, 1))
    counted = {name: getattr(book.counters, name) for name in ("duplicates", "late", "unmatched")}
    assert counted == {"duplicates": 0, "late": 0, "unmatched": 0, counter: 1}


@given(st.text(max_size=30))
def test_an_answer_to_nobody_is_unmatched(text: str) -> None:
    book = make_book()
    nonce = book.request_id(0, 0).split("-")[0]
    strays = (text, f"{nonce}-x{text}-0", f"{nonce}-{text}-0-0", f"{nonce}-ffffffff-0", nonce)
    for number, request_id in enumerate(strays, 1):
        book.count_stray(request_id)
        assert book.counters.unmatched == number, request_id
    assert book.counters.late == book.counters.duplicates == 0


@given(st.lists(st.integers(0, 10), max_size=6).map(sorted))
def test_what_is_told_in_pieces_is_told_once(ends: list[int]) -> None:
    book = make_book()
    for position in range(book.rows):
        book.end(position, result.OK if position % 3 else result.TIMEOUT, 101.0)
    pieces = [book.settle(end) for end in [*ends, book.rows]]
    due_s = np.concatenate([piece.due_s for piece in pieces])
    assert due_s.tolist() == book.table["scheduled_s"].tolist()
    late = np.isinf(np.concatenate([piece.latency_s for piece in pieces]))
    assert late.tolist() == [position % 3 == 0 for position in range(book.rows)]
    assert pieces[-1].until_s == book.window_s


def test_a_closed_loop_finds_out_what_is_due() -> None:
    book = make_book(pacer="closed:think_s=0.1")
    assert book.rows == 3  # one for each device
    device = FleetDevice(1, None)  # type: ignore[arg-type]
    device.turns = 2
    positions = [book.add(device, due_s) for due_s in (0.5, 0.9, 1.1, 2.0)]
    assert positions == [3, 4, 5, 6]
    assert book.column["scheduled_s"][6] == 2.0  # the columns are those of the grown table
    assert book.table["index"][3] == 2 * 3 + 1 and book.table["device"][3] == 1
    assert np.all(book.table["rows"] == ROWS)
    assert book.due()["scheduled_s"].max() == pytest.approx(0.9)
    assert len(book.settle(5).due_s) == 0  # nobody knows what else was due
