"""Which batch starts when: steps on a clock that the tests own, no thread and no engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamix.errors import Overloaded
from deployments.dispatch import Dispatch, Flight, Step
from deployments.waiting import Queue
from tests.jobs import Clock, counts, make_job

# What a batch takes in most tests here: 0.1 s lead, then 1 s and 0.1 s per row.
LEAD_S, A_S, B_S = 0.1, 1.0, 0.1


class Thread:
    """What the engine's thread does with a dispatch, with an engine that is two numbers."""

    def __init__(self, *, depth: int = 2, max_batch_rows: int = 8, blocks: int = 1) -> None:
        self.clock = Clock()
        self.queue = Queue(max_batch_rows=max_batch_rows, max_queue_rows=1000)
        self.dispatch = Dispatch(self.queue, blocks=blocks, depth=depth)

    def offer(self, *sizes: int, block: int = 0) -> None:
        for rows in sizes:
            assert self.queue.offer(make_job(rows, block=block, arrived=self.clock.now))

    def next(self, *, landed: bool = False, draining: bool = False) -> Step:
        return self.dispatch.next(self.clock.now, landed=landed, draining=draining)

    def start(self, staged_s: float = 0.0) -> Flight:
        """The next step must be to start a batch: start it."""
        flight = self.next().start
        assert flight is not None
        self.dispatch.launch(flight, self.clock.now)
        self.clock.now += staged_s
        flight.staged_s = staged_s
        return flight

    def land(self, flight: Flight, copy_s: float = 0.0) -> float:
        """It is done now; the seconds it counts as computed."""
        begun = self.dispatch.land(flight, self.clock.now)
        self.dispatch.learn(flight, self.clock.now, begun, copy_s)
        return self.clock.now - begun

    def teach(self, batches: int = 40) -> None:
        """Run batches one by one."""
        for number in range(batches):
            self.offer(1 + number % 8)
            flight = self.start()
            self.clock.now += LEAD_S + A_S + B_S * flight.rows
            self.land(flight, LEAD_S)


# --- depth 1 ------------------------------------------------------------------------------------


def test_an_idle_dispatch_sleeps_until_something_comes() -> None:
    step = Thread(depth=1).next()
    assert (step.nap_s, step.wake_rows, step.start) == (float("inf"), 0, None)


def test_with_depth_1_the_batch_under_way_is_finished_first() -> None:
    thread = Thread(depth=1)
    thread.offer(3, 4)
    assert counts(thread.start().jobs) == [3, 4]
    thread.offer(8, 8)
    assert thread.next() == Step(finish=True)


def test_a_drained_dispatch_stops() -> None:
    thread = Thread()
    thread.offer(3)
    (flight,) = [thread.next(draining=True).start]
    assert flight is not None
    assert flight.close_reason == "drain"
    thread.dispatch.launch(flight, thread.clock.now)
    assert thread.next(draining=True).finish
    thread.land(flight)
    assert thread.next(draining=True).stop


# --- just in time -------------------------------------------------------------------------------


def test_a_cold_model_overlaps_nothing() -> None:
    thread = Thread()
    thread.teach(7)
    thread.offer(3)
    thread.start()
    thread.offer(8)
    assert thread.next().finish


def test_the_second_batch_closes_just_in_time() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    first = thread.start()  # 0.1 s lead, then 1.4 s
    assert first.cost_s == pytest.approx(1.4, rel=0.01)
    thread.offer(3)
    until = thread.clock.now + 1.5 - LEAD_S - 0.05 * 1.4 - 0.0003
    while (step := thread.next()).start is None:
        assert not step.finish
        # It looks in between whether the first is done already.
        assert 0 < step.nap_s <= 1.4 / 16 + 1e-3
        assert step.wake_rows == 3 + 5
        thread.clock.now += step.nap_s
    assert thread.clock.now == pytest.approx(until, abs=0.02)
    assert (counts(step.start.jobs), step.start.close_reason) == ([3], "engine_free")


def test_a_full_batch_closes_at_once() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(4, 3)
    assert thread.next().start is None
    thread.offer(1)
    second = thread.start()
    assert (counts(second.jobs), second.close_reason) == ([4, 3, 1], "full")
    thread.offer(8)
    assert thread.next().finish  # no third


def test_where_the_next_request_does_not_fit_the_batch_is_full() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(5, 6)
    assert counts(thread.start().jobs) == [5]


def test_only_rows_of_the_block_whose_turn_it_is_make_it_full() -> None:
    thread = Thread(blocks=2)
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(2)
    thread.offer(5, 1, block=1)
    step = thread.next()
    assert step.start is None
    assert step.wake_rows == 8 + 6  # 6 more rows could all be of block 0


def test_with_nothing_to_start_the_answers_come_first() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    step = thread.next()
    assert (step.start, step.finish, step.wake_rows) == (None, False, 8)
    thread.clock.now += 1.45
    assert thread.next().finish


def test_a_batch_that_is_done_early_is_finished() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(3)
    assert not thread.next().finish
    assert thread.next(landed=True).finish


def test_when_draining_nobody_waits_for_more() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(3)
    second = thread.next(draining=True).start
    assert second is not None
    assert second.close_reason == "drain"


def test_a_probe_that_nobody_waits_for_closes_no_batch() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(3)
    gone = make_job(1)
    gone.cancelled = True
    thread.dispatch.probes.append(gone)
    assert thread.next().start is None


def test_probes_and_retries_go_first_and_take_a_place() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(3)
    gone = make_job(1)
    gone.cancelled = True
    thread.dispatch.probes += [gone, make_job(1)]
    thread.dispatch.retries += [[gone], [make_job(2), gone, make_job(1)]]
    probe = thread.start()
    assert (probe.probe, counts(probe.jobs)) == (True, [1])
    assert thread.next().finish
    thread.dispatch.land(thread.dispatch.flights[0], thread.clock.now)
    retry = thread.start()
    assert (retry.probe, counts(retry.jobs), retry.rows) == (False, [2, 1], 3)
    assert thread.queue.rows == 3


# --- accounting ---------------------------------------------------------------------------------


def test_overlapped_batches_are_booked_and_learned_once() -> None:
    """Two always under way: busy time is the sum of the computations, and so is what is learned."""
    thread = Thread()
    thread.teach()
    dispatch, clock = thread.dispatch, thread.clock
    busy_s = dispatch.busy_s(clock.now)
    thread.offer(8)
    running = thread.start(0.02)
    started = clock.now - 0.02
    ends = started + LEAD_S + A_S + 8 * B_S
    for _ in range(100):
        thread.offer(8)
        following = thread.start(0.02)
        clock.now = ends
        compute_s = thread.land(running, LEAD_S - 0.02)
        ends += A_S + 8 * B_S
        running = following
        assert dispatch.busy_s(clock.now) - busy_s == pytest.approx(clock.now - started)
    assert compute_s == pytest.approx(1.8)
    assert dispatch.costs[0].predict(8) == pytest.approx(1.8, rel=0.01)
    assert dispatch.costs[0].predict(1) == pytest.approx(1.1, rel=0.05)
    assert dispatch.leads[0].predict(8) == pytest.approx(LEAD_S, rel=0.01)
    assert dispatch.remaining_s(clock.now) == pytest.approx(1.8, rel=0.01)
    clock.now = ends
    assert thread.land(running, LEAD_S - 0.02) == pytest.approx(1.8)
    clock.now += 7.0
    assert dispatch.busy_s(clock.now) - busy_s == pytest.approx(ends - started)
    assert dispatch.flights == ()


def test_what_the_copy_cannot_hide_is_not_taken_for_computation() -> None:
    """A batch that was started late leaves a gap; the model knows better than to count it."""
    thread = Thread()
    thread.teach()
    thread.offer(4)
    first = thread.start()
    clock = thread.clock
    clock.now += 1.45
    thread.offer(4)
    second = thread.start()
    clock.now += 0.05  # the first has ended, the second's rows are under way for 0.05 s more
    thread.land(first, LEAD_S)
    before = thread.dispatch.costs[0].predict(4)
    clock.now += 0.05 + 1.4
    assert thread.land(second, LEAD_S) == pytest.approx(1.45)  # as its requests lived it
    assert thread.dispatch.costs[0].predict(4) == pytest.approx(before, rel=0.01)


def test_a_batch_that_fails_before_its_turn_does_not_disturb_the_one_before() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    first = thread.start()
    thread.clock.now += 1.0
    thread.offer(8)
    second = thread.start()
    thread.dispatch.land(second, thread.clock.now)
    assert thread.dispatch.flights == (first,)
    before = thread.dispatch.costs[0].predict(4)
    thread.clock.now += 0.5
    assert thread.land(first, LEAD_S) == pytest.approx(1.5)
    assert thread.dispatch.costs[0].predict(4) == pytest.approx(before, rel=0.01)


def test_the_time_left_counts_every_batch_under_way() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    now = thread.clock.now
    thread.start()
    assert thread.dispatch.remaining_s(now) == pytest.approx(1.5, rel=0.01)
    thread.offer(8)
    thread.start()
    assert thread.dispatch.remaining_s(now) == pytest.approx(1.5 + 1.8, rel=0.01)
    # The first is late, and nobody knows by how much: the second still needs its time.
    assert thread.dispatch.remaining_s(now + 3.0) == pytest.approx(1.8, rel=0.01)
    thread.offer(4)
    assert thread.dispatch.wait_s(now) == pytest.approx(1.5 + 1.8 + 1.4, rel=0.01)


def test_a_batch_that_hides_behind_no_other_is_not_late_for_its_copy() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    alone = thread.start()
    assert alone.ends(alone.started) == pytest.approx(alone.started + 1.5, rel=0.01)
    thread.clock.now += 1.4
    thread.offer(4)
    behind = thread.start()
    landed = alone.started + 1.5
    assert behind.ends(landed) == pytest.approx(landed + 1.4, rel=0.01)


def test_a_deadline_is_checked_against_both_batches() -> None:
    thread = Thread()
    thread.teach()
    thread.offer(4)
    thread.start()
    thread.offer(8)
    thread.start()
    now = thread.clock.now
    job = make_job(2, arrived=now, deadline=now + 4.6)  # 1.5 + 1.8 + 1.2
    thread.dispatch.check_deadline(job, now + 4.6)
    with pytest.raises(Overloaded, match="predicted in 4.5 s, after the deadline in 4.4 s"):
        thread.dispatch.check_deadline(job, now + 4.4)


@given(
    running=st.lists(st.integers(1, 8), max_size=2),
    waiting=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    left_s=st.floats(0.0, 30.0),
)
def test_the_quick_bound_lets_nothing_through_that_the_exact_check_refuses(
    running: list[int], waiting: list[int], left_s: float
) -> None:
    thread = Thread()
    thread.teach()
    for rows in running:
        thread.offer(rows)
        flight = thread.queue.take(thread.clock.now).batch
        thread.dispatch.launch(Flight(flight, rows=rows), thread.clock.now)
    thread.offer(*waiting)
    now = thread.clock.now
    job = make_job(1, arrived=now, deadline=now + left_s)
    if left_s >= thread.dispatch.longest_s(job.count):
        thread.dispatch.check_deadline(job, now + left_s)
