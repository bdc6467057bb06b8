"""The batcher around an engine that stops where a test wants."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from datamix.errors import DataMixError, DeadlineExceeded, Overloaded, Unavailable
from deployments.batcher import Batcher
from deployments.emulated import Cost, EmulatedEngine
from deployments.engine import Array, Block, Engine, Pending, Rows, Settled
from deployments.waiting import Computed, Job, Timing
from tests.jobs import Clock, make_job

PATIENCE_S = 10.0  # for what must happen at once; only a failing test waits so long


@dataclass
class FakeEngine(Engine):
    """Doubles its input. Closed, it stops inside each batch until a test lets one go."""

    closed: bool = False
    fails_on: Callable[[Sequence[Rows]], bool] = lambda requests: False
    during: Callable[[], None] = lambda: None
    name: str = "fake"
    blocks: Sequence[Block] = (Block((1,), (1,)),) * 3
    calls: list[tuple[int, list[int]]] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    release: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        self.calls.append((block, [len(request.features) for request in requests]))
        self.entered.release()
        if self.closed:
            self.release.acquire(timeout=PATIENCE_S)
        self.during()
        if self.fails_on(requests):
            raise RuntimeError("secret 0.1234 in /some/path")
        return Settled([2 * request.features for request in requests], 100)

    async def await_entry(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)

    def open(self) -> None:
        self.closed = False
        self.release.release(100)


def fails_on_value(value: float) -> Callable[[Sequence[Rows]], bool]:
    return lambda requests: any((request.features == value).any() for request in requests)


@asynccontextmanager
async def batching(
    engine: FakeEngine,
    *,
    max_batch_rows: int = 8,
    max_queue_rows: int = 100,
    max_queue_bytes: int = 1 << 30,
    target_batch_s: float | None = None,
    clock: Callable[[], float] | None = None,
    on_batch: Callable[[Timing], None] = lambda timing: None,
) -> AsyncIterator[Batcher]:
    batcher = Batcher(
        engine,
        asyncio.get_running_loop(),
        max_batch_rows=max_batch_rows,
        max_queue_rows=max_queue_rows,
        max_queue_bytes=max_queue_bytes,
        target_batch_s=target_batch_s,
        on_batch=on_batch,
        clock=clock or Clock(),
    )
    try:
        yield batcher
    finally:
        engine.open()
        await batcher.drain(PATIENCE_S)


Answer = asyncio.Future[Computed]


def submit(
    batcher: Batcher,
    value: float = 1.0,
    rows: int = 1,
    *,
    block: int = 0,
    deadline: float | None = None,
    priority: int = 0,
) -> Answer:
    """Offer a request; its answer, which fails if it is given twice."""
    job = submit_job(batcher, value, rows, block=block, deadline=deadline, priority=priority)
    return job[1]


def submit_job(
    batcher: Batcher,
    value: float = 1.0,
    rows: int = 1,
    *,
    block: int = 0,
    deadline: float | None = None,
    priority: int = 0,
) -> tuple[Job, Answer]:
    answer: Answer = asyncio.get_running_loop().create_future()

    def done(outcome: Computed | DataMixError) -> None:
        if isinstance(outcome, DataMixError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    job = make_job(rows, block=block, value=value, deadline=deadline, priority=priority, done=done)
    batcher.offer(job)
    return job, answer


async def settled(*answers: Answer) -> list[Computed | BaseException]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*answers, return_exceptions=True)


async def computed(*answers: Answer) -> list[Computed]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*answers)


async def turn() -> None:
    """Let everything that is ready on the event loop happen."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "engine"] == []


def test_an_idle_engine_starts_at_once() -> None:
    async def go() -> None:
        engine = FakeEngine()
        async with batching(engine) as batcher:
            (answer,) = await computed(submit(batcher, 3.0, 2))
            np.testing.assert_array_equal(answer.output, np.full((2, 1), 6.0))
            assert answer.timing.batch_rows == 2
            assert answer.timing.close_reason == "engine_free"

    asyncio.run(go())


def test_requests_gather_while_the_engine_is_busy() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            first = submit(batcher, 1.0)
            await engine.await_entry()
            others = [submit(batcher, float(n), n) for n in (2, 3)]
            assert batcher.queue_rows == 5
            engine.open()
            answers = await computed(first, *others)
            assert engine.calls == [(0, [1]), (0, [2, 3])]
            for answer, n in zip(answers, (1, 2, 3), strict=True):
                np.testing.assert_array_equal(answer.output, np.full((n, 1), 2.0 * n))
            assert [answer.timing.batch_rows for answer in answers] == [1, 5, 5]
            assert {answer.timing.close_reason for answer in answers} == {"engine_free"}
            assert batcher.queue_rows == 0

    asyncio.run(go())


def test_a_full_batch_closes_as_full() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_batch_rows=4) as batcher:
            first = submit(batcher)
            await engine.await_entry()
            others = [submit(batcher, rows=2) for _ in range(3)]
            engine.open()
            answers = await computed(first, *others)
            assert engine.calls == [(0, [1]), (0, [2, 2]), (0, [2])]
            assert [answer.timing.close_reason for answer in answers] == [
                "engine_free",
                "full",
                "full",
                "engine_free",
            ]
            assert batcher.statistics.close_reasons == {"engine_free": 2, "full": 1}

    asyncio.run(go())


def test_blocks_are_never_mixed() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            first = submit(batcher)
            await engine.await_entry()
            others = [submit(batcher, float(n), block=n % 3) for n in range(6)]
            engine.open()
            answers = await computed(first, *others)
            assert engine.calls == [(0, [1]), (0, [1, 1]), (1, [1, 1]), (2, [1, 1])]
            for n, answer in enumerate(answers[1:]):
                assert answer.output == 2 * n

    asyncio.run(go())


def test_timings_and_totals() -> None:
    async def go() -> None:
        clock = Clock()

        def compute() -> None:
            clock.now += 0.5

        engine = FakeEngine(closed=True, during=compute)
        batches: list[Timing] = []
        async with batching(engine, clock=clock, on_batch=batches.append) as batcher:
            first = submit(batcher, rows=2)
            await engine.await_entry()
            clock.now += 0.25
            assert batcher.busy_s == 0.25  # the running batch counts
            second = submit(batcher, rows=3)
            clock.now += 0.25
            third = submit(batcher)
            engine.open()
            one, two, three = await computed(first, second, third)
            assert one.timing == Timing(0.0, 1.0, 2, "engine_free")
            assert two.timing == Timing(0.75, 0.5, 4, "engine_free")
            assert three.timing == Timing(0.5, 0.5, 4, "engine_free")
            statistics = batcher.statistics
            assert (statistics.batches, statistics.rows) == (2, 6)
            assert statistics.busy_s == batcher.busy_s == 1.5
            assert statistics.queue_s == 1.25
            assert statistics.copied_bytes == 200
            await turn()
            assert batches == [one.timing, two.timing]  # each by its oldest request

    asyncio.run(go())


def test_a_full_queue_sheds_at_once_and_says_when_to_come_back() -> None:
    async def go() -> None:
        clock = Clock()

        def compute() -> None:
            clock.now += 2.0

        engine = FakeEngine(closed=True, during=compute)
        async with batching(engine, max_batch_rows=4, max_queue_rows=6, clock=clock) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            waiting = [submit(batcher, rows=3), submit(batcher, rows=3)]
            with pytest.raises(Overloaded) as raised:
                submit(batcher)
            assert str(raised.value) == "the queue holds 6 rows of at most 6, try again later"
            assert raised.value.retry_after_s is not None
            assert raised.value.retry_after_s > 0
            engine.release.release()  # one batch passes, and now it is known how long one takes
            await engine.await_entry()
            submitted = submit(batcher, rows=3)
            with pytest.raises(Overloaded) as raised:
                submit(batcher)
            assert raised.value.retry_after_s == pytest.approx(2.0 * (1 + 6 / 4))
            engine.open()
            await computed(running, *waiting, submitted)
            assert [rows for _, rows in engine.calls] == [[1], [3], [3], [3]]

    asyncio.run(go())


def test_a_queue_that_is_full_in_bytes_sheds_too() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_queue_bytes=100) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            waiting = [submit(batcher, rows=8) for _ in range(3)]  # 32 bytes each
            with pytest.raises(Overloaded) as raised:
                submit(batcher, rows=2)
            assert str(raised.value) == ("the queue holds 96 bytes of at most 100, try again later")
            assert raised.value.retry_after_s is not None
            fits = submit(batcher, rows=1)
            engine.open()
            await computed(running, *waiting, fits)
            await computed(submit(batcher, rows=8))  # what left makes room

    asyncio.run(go())


def test_a_deadline_that_passed_is_answered_without_compute() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        async with batching(engine, clock=clock) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            late = submit(batcher, 2.0, deadline=clock.now + 1)
            alive = submit(batcher, 3.0, deadline=clock.now + 3)
            clock.now += 2
            engine.open()
            _, late_outcome, alive_outcome = await settled(running, late, alive)
            assert isinstance(late_outcome, DeadlineExceeded)
            assert isinstance(alive_outcome, Computed)
            assert engine.calls == [(0, [1]), (0, [1])]

    asyncio.run(go())


def test_a_deadline_that_passes_during_the_computation_changes_nothing() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        async with batching(engine, clock=clock) as batcher:
            answer = submit(batcher, 2.0, deadline=clock.now + 1)
            await engine.await_entry()
            clock.now += 2
            engine.open()
            assert (await computed(answer))[0].output == 4.0

    asyncio.run(go())


def test_a_cancelled_request_is_neither_computed_nor_answered() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            running, running_answer = submit_job(batcher)
            await engine.await_entry()
            waiting, waiting_answer = submit_job(batcher)
            other = submit(batcher, 5.0)
            running.cancelled = waiting.cancelled = True
            engine.open()
            assert (await computed(other))[0].output == 10.0
            assert engine.calls == [(0, [1]), (0, [1])]
            assert not running_answer.done()
            assert not waiting_answer.done()

    asyncio.run(go())


def test_urgent_requests_go_first() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        batches: list[Timing] = []
        async with batching(
            engine, max_batch_rows=3, clock=clock, on_batch=batches.append
        ) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            answers = [
                submit(batcher, rows=1, priority=1),
                submit(batcher, rows=2),
                submit(batcher, rows=3, deadline=clock.now + 1.5),
            ]
            clock.now += 0.5
            answers.append(submit(batcher, rows=1, deadline=clock.now + 1.2))
            engine.open()
            await computed(running, *answers)
            assert [rows for _, rows in engine.calls] == [[1], [3], [1, 2], [1]]
            await turn()
            assert batches[2].queue_s == 0.5  # of the oldest, which is not the most urgent

    asyncio.run(go())


# --- the cost model -----------------------------------------------------------------------------


def costly(clock: Clock, a_s: float, b_s: float) -> FakeEngine:
    """An engine whose batches take ``a_s + b_s * rows`` seconds of the test's clock."""

    def compute() -> None:
        clock.now += a_s + b_s * sum(engine.calls[-1][1])

    engine = FakeEngine(during=compute)
    return engine


async def teach(batcher: Batcher, engine: FakeEngine, batches: int = 8) -> None:
    """Run batches of 1, 2, 3, ... rows."""
    for rows in range(1, batches + 1):
        await computed(submit(batcher, rows=rows))
        await engine.await_entry()


def test_a_request_that_cannot_be_in_time_is_refused_at_once() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, max_batch_rows=8, clock=clock) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            running = submit(batcher, rows=4)  # 1.4 s
            await engine.await_entry()
            clock.now += 0.4
            waiting = submit(batcher, rows=3)  # with one more row 1.4 s after the running one
            with pytest.raises(
                Overloaded, match="predicted in 2.4 s, after the deadline in 2 s"
            ) as late:
                submit(batcher, deadline=clock.now + 2.0)
            wait_s = late.value.retry_after_s
            assert wait_s is not None
            assert wait_s == pytest.approx(0.4, rel=0.1)
            # What it says is true: when that time has passed, the same request is accepted.
            clock.now += wait_s
            accepted = submit(batcher, deadline=clock.now + 2.0)
            assert batcher.queue_rows == 4
            clock.now = 110.0
            engine.open()
            await settled(running, waiting, accepted)

    asyncio.run(go())


def test_an_urgent_request_is_measured_by_what_goes_before_it_only() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 0.1, 0.01)
        async with batching(engine, max_batch_rows=8, clock=clock) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            answers = [submit(batcher, rows=8)]
            await engine.await_entry()
            answers += [submit(batcher, rows=8) for _ in range(5)]
            assert batcher.predicted_wait_s() == pytest.approx(6 * 0.18, rel=0.1)
            answers.append(submit(batcher, deadline=clock.now + 0.5))
            with pytest.raises(Overloaded):
                submit(batcher, deadline=clock.now + 0.5, priority=1)
            with pytest.raises(Overloaded):
                submit(batcher, deadline=clock.now + 0.2)
            engine.open()
            await computed(*answers)
            assert [rows for _, rows in engine.calls[8:]] == [[8], [1], *5 * [[8]]]

    asyncio.run(go())


def test_a_cold_model_refuses_nobody() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, clock=clock) as batcher:
            await teach(batcher, engine, 7)
            engine.closed = True
            running = submit(batcher)
            await engine.await_entry()
            hopeless = submit(batcher, deadline=clock.now + 0.001)
            other = submit(batcher, block=1, deadline=clock.now + 0.001)  # nothing known of block 1
            engine.open()
            outcomes = await settled(running, hopeless, other)
            assert [type(outcome) for outcome in outcomes] == [
                Computed,
                DeadlineExceeded,
                DeadlineExceeded,
            ]

    asyncio.run(go())


def test_each_block_has_a_model_of_its_own() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, clock=clock) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            answers = [submit(batcher, block=1)]
            await engine.await_entry()
            answers += [submit(batcher, block=1), submit(batcher, rows=7), submit(batcher, rows=2)]
            engine.release.release()
            await engine.await_entry()  # block 1 has seen one batch: still cold
            answers.append(submit(batcher, block=1, deadline=clock.now + 0.1))
            with pytest.raises(Overloaded):  # both blocks go before its answer
                submit(batcher, deadline=clock.now + 3.3)
            engine.open()
            await settled(*answers)

    asyncio.run(go())


def test_an_idle_engine_takes_what_the_model_thinks_hopeless() -> None:
    """Or a model that is wrong would refuse all, and never see the batch that corrects it."""

    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 1.0, 0.1)
        async with batching(engine, clock=clock) as batcher:
            await teach(batcher, engine)
            await computed(submit(batcher, deadline=clock.now + 0.001))

    asyncio.run(go())


def test_batches_keep_to_the_target() -> None:
    async def go() -> None:
        clock = Clock()
        engine = costly(clock, 0.1, 0.01)
        async with batching(
            engine, max_batch_rows=16, clock=clock, target_batch_s=0.145
        ) as batcher:
            await teach(batcher, engine)
            engine.closed = True
            first = submit(batcher)
            await engine.await_entry()
            answers = [submit(batcher, rows=2) for _ in range(5)] + [submit(batcher, rows=9)]
            engine.open()
            timings = [answer.timing for answer in await computed(first, *answers)]
            assert [rows for _, rows in engine.calls[9:]] == [[2, 2], [2, 2], [2], [9]]
            assert [timing.close_reason for timing in timings] == ["engine_free"] + 6 * ["deadline"]
            assert batcher.statistics.close_reasons["deadline"] == 4

    asyncio.run(go())


def test_dead_requests_make_room_in_a_full_queue() -> None:
    async def go() -> None:
        clock = Clock()
        engine = FakeEngine(closed=True)
        async with batching(engine, max_queue_rows=4, clock=clock) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            alive = submit(batcher)
            late = submit(batcher, deadline=clock.now + 1)
            cancelled, unanswered = submit_job(batcher, rows=2)
            clock.now += 1.5
            cancelled.cancelled = True
            new = submit(batcher, rows=2)
            # It is answered while the engine is still busy with the first.
            assert isinstance((await settled(late))[0], DeadlineExceeded)
            assert batcher.queue_rows == 3
            engine.open()
            await computed(running, alive, new)
            assert not unanswered.done()

    asyncio.run(go())


# --- faults -------------------------------------------------------------------------------------


def test_only_the_request_that_the_engine_fails_on_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True, fails_on=fails_on_value(13.0))
        async with batching(engine) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            answers = [submit(batcher, value) for value in (2.0, 13.0, 3.0)]
            engine.open()
            _, two, thirteen, three = await settled(running, *answers)
            assert isinstance(two, Computed)
            assert isinstance(three, Computed)
            assert two.output == 4.0
            assert three.output == 6.0
            assert isinstance(thirteen, Unavailable)
            assert str(thirteen) == "the engine failed on this request"
            assert (await computed(submit(batcher, 7.0)))[0].output == 14.0

    asyncio.run(go())
    assert [record.message for record in caplog.records] == [
        "engine failed on a request: RuntimeError"
    ]
    assert "secret" not in caplog.text


def test_one_culprit_among_many_costs_few_more_batches() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True, fails_on=fails_on_value(13.0))
        async with batching(engine, max_batch_rows=64) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            answers = [submit(batcher, float(value)) for value in range(64)]
            engine.open()
            outcomes = await settled(running, *answers)
            refused = [o for o in outcomes if not isinstance(o, Computed)]
            assert [type(outcome) for outcome in refused] == [Unavailable]
            outputs = [float(o.output.item()) for o in outcomes if isinstance(o, Computed)]
            assert outputs == [2.0, *(2.0 * value for value in range(64) if value != 13)]
            # The first, the batch of all, and two halves of each half that failed.
            assert len(engine.calls) == 2 + 2 * 6

    asyncio.run(go())


def test_an_engine_that_always_fails_answers_everybody() -> None:
    async def go() -> None:
        engine = FakeEngine(fails_on=lambda requests: True)
        async with batching(engine) as batcher:
            outcomes = await settled(*(submit(batcher) for _ in range(20)))
            assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
            assert len(engine.calls) < 2 * 20
            assert batcher.statistics.batches == 0
            engine.fails_on = lambda requests: False
            assert (await computed(submit(batcher, 7.0)))[0].output == 14.0

    asyncio.run(go())


def test_an_engine_that_loses_an_output_does_not_stop_the_batcher() -> None:
    class Forgetful(FakeEngine):
        def start(self, block: int, requests: Sequence[Rows]) -> Pending:
            return Settled(super().start(block, requests).wait()[1:])

    async def go() -> None:
        async with batching(Forgetful()) as batcher:
            for _ in range(2):
                (outcome,) = await settled(submit(batcher))
                assert isinstance(outcome, Unavailable)

    asyncio.run(go())


def test_a_callback_that_raises_does_not_hurt_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(outcome: Computed | DataMixError) -> None:
        raise ValueError("secret 0.1234")

    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            running = submit(batcher)
            await engine.await_entry()
            batcher.offer(make_job(done=broken))
            after = submit(batcher, 4.0)
            engine.open()
            assert (await computed(running, after))[1].output == 8.0
            assert engine.calls == [(0, [1]), (0, [1, 1])]

    asyncio.run(go())
    assert [record.message for record in caplog.records] == [
        "a request's callback failed: ValueError"
    ]
    assert "secret" not in caplog.text


# --- the probe ----------------------------------------------------------------------------------


def test_the_probe_passes_when_idle() -> None:
    async def go() -> None:
        engine = FakeEngine()
        async with batching(engine) as batcher:
            await batcher.probe(PATIENCE_S)
            assert engine.calls == [(0, [1])]
            assert batcher.statistics.batches == 0

    asyncio.run(go())


def test_the_probe_goes_before_waiting_requests() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_batch_rows=1) as batcher:
            answers = [submit(batcher, rows=1, block=1) for _ in range(3)]
            await engine.await_entry()
            probe = asyncio.create_task(batcher.probe(PATIENCE_S))
            await turn()
            engine.open()
            await probe
            await computed(*answers)
            assert [block for block, _ in engine.calls] == [1, 0, 1, 1]

    asyncio.run(go())


def test_a_probe_times_a_batch_of_any_block() -> None:
    async def go() -> None:
        clock = Clock()

        def during() -> None:
            clock.now += 2.0

        engine = FakeEngine(during=during)
        async with batching(engine, clock=clock) as batcher:
            assert await batcher.probe(PATIENCE_S, block=2, rows=8) == 2.0
            assert engine.calls == [(2, [8])]

    asyncio.run(go())


def test_the_probe_fails_when_the_engine_hangs() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            answer = submit(batcher)
            await engine.await_entry()
            for _ in range(3):
                with pytest.raises(Unavailable, match="no sign of life in 0.001 s"):
                    await batcher.probe(0.001)
            engine.open()
            await batcher.probe(PATIENCE_S)
            await computed(answer)
            # Nobody waits any more for the probes that failed, so they are not run.
            assert len(engine.calls) == 2

    asyncio.run(go())


def test_the_probe_fails_when_the_engine_raises() -> None:
    async def go() -> None:
        engine = FakeEngine(fails_on=lambda requests: True)
        async with batching(engine) as batcher:
            with pytest.raises(Unavailable) as raised:
                await batcher.probe(PATIENCE_S)
            assert str(raised.value) == "the engine failed its health probe: RuntimeError"

    asyncio.run(go())


def test_the_probe_fails_when_the_thread_is_gone() -> None:
    async def go() -> None:
        async with batching(FakeEngine()) as batcher:
            await batcher.drain(PATIENCE_S)
            with pytest.raises(Unavailable):
                await batcher.probe(0.001)

    asyncio.run(go())


# --- two batches under way ----------------------------------------------------------------------


@dataclass
class Pipeline(FakeEngine):
    """A fake of depth 2: closed, it has a batch done when a test lets one go, in their order."""

    depth: int = 2
    clock: Clock = field(default_factory=Clock)
    fails_to_start: Callable[[Sequence[Rows]], bool] = lambda requests: False

    def start(self, block: int, requests: Sequence[Rows]) -> Pending:
        self.calls.append((block, [len(request.features) for request in requests]))
        self.entered.release()
        if self.fails_to_start(requests):
            raise RuntimeError("secret 0.1234 in /some/path")
        return Underway(self, requests)


class Underway:
    """One batch of :class:`Pipeline`; each takes 1 s of the test's clock."""

    copied_bytes = 100
    copy_s = 0.0

    def __init__(self, engine: Pipeline, requests: Sequence[Rows]) -> None:
        self.engine = engine
        self.requests = requests

    def done(self) -> bool:
        if not self.engine.closed:
            return True
        free = self.engine.release.acquire(blocking=False)
        if free:
            self.engine.release.release()
        return free

    def wait(self) -> Sequence[Array]:
        if self.engine.closed:
            self.engine.release.acquire(timeout=PATIENCE_S)
        self.engine.clock.now += 1.0
        if self.engine.fails_on(self.requests):
            raise RuntimeError("secret 0.1234 in /some/path")
        return [2 * request.features for request in self.requests]


@asynccontextmanager
async def two_under_way(engine: Pipeline) -> AsyncIterator[tuple[Batcher, list[Answer]]]:
    """A batcher of batches of 4 rows that has learned what they cost, and two of them started."""
    async with batching(engine, max_batch_rows=4, clock=engine.clock) as batcher:
        for value in range(8):
            await computed(submit(batcher, float(value), rows=1 + value % 4))
            await engine.await_entry()
        engine.calls.clear()
        engine.closed = True
        answers = [submit(batcher, 20.0)]
        await engine.await_entry()
        answers += [submit(batcher, 21.0, rows=2), submit(batcher, 22.0, rows=2)]
        await engine.await_entry()
        yield batcher, answers


def test_a_full_batch_starts_beside_the_running_one() -> None:
    async def go() -> None:
        engine = Pipeline()
        async with two_under_way(engine) as (batcher, answers):
            busy_s = batcher.busy_s
            answers.append(submit(batcher, 23.0, rows=4))
            assert engine.calls == [(0, [1]), (0, [2, 2])]
            assert batcher.queue_rows == 4  # a third has to wait
            engine.open()
            for answer, value in zip(await computed(*answers), range(20, 24), strict=True):
                assert (answer.output == 2 * value).all()
            one, two, three, four = [(await answer).timing for answer in answers]
            # Each took 1 s, and while one was computed the next was in the queue, as it were.
            assert one == Timing(0.0, 1.0, 1, "engine_free")
            assert two == three == Timing(1.0, 1.0, 4, "full")
            assert four.compute_s == 1.0
            assert batcher.busy_s - busy_s == 3.0
            assert batcher.statistics.copied_bytes == 1100

    asyncio.run(go())


@pytest.mark.parametrize("value", [20.0, 21.0])
def test_one_of_two_batches_fails(value: float) -> None:
    async def go() -> None:
        engine = Pipeline(fails_on=fails_on_value(value))
        async with two_under_way(engine) as (_, answers):
            engine.open()
            outcomes = await settled(*answers)
            for outcome, own in zip(outcomes, (20.0, 21.0, 22.0), strict=True):
                if own == value:
                    assert isinstance(outcome, Unavailable)
                    assert str(outcome) == "the engine failed on this request"
                else:
                    assert isinstance(outcome, Computed)
                    assert (outcome.output == 2 * own).all()

    asyncio.run(go())


def test_a_batch_that_cannot_start_leaves_the_running_one_alone() -> None:
    async def go() -> None:
        engine = Pipeline(fails_to_start=fails_on_value(21.0))
        async with two_under_way(engine) as (batcher, answers):
            engine.open()
            first, second, third = await settled(*answers)
            assert isinstance(first, Computed)
            assert isinstance(second, Unavailable)
            assert isinstance(third, Computed)
            assert (third.output == 44.0).all()
            assert first.timing == Timing(0.0, 1.0, 1, "engine_free")
            assert (await computed(submit(batcher, 7.0)))[0].output == 14.0

    asyncio.run(go())


def test_the_probe_waits_for_what_is_under_way_only() -> None:
    async def go() -> None:
        engine = Pipeline()
        async with two_under_way(engine) as (batcher, answers):
            answers += [submit(batcher, rows=4), submit(batcher, rows=4)]
            probe = asyncio.create_task(batcher.probe(PATIENCE_S))
            await turn()
            for _ in range(3):
                engine.release.release()
            await probe
            assert [rows for _, rows in engine.calls[:3]] == [[1], [2, 2], [1]]
            engine.open()
            await computed(*answers)

    asyncio.run(go())


def test_draining_finishes_both() -> None:
    async def go() -> None:
        engine = Pipeline()
        async with two_under_way(engine) as (batcher, answers):
            answers.append(submit(batcher, 23.0))
            drain = asyncio.create_task(batcher.drain(PATIENCE_S))
            await turn()
            engine.open()
            await drain
            results = await computed(*answers)
            assert [float(result.output[0, 0]) for result in results] == [40, 42, 44, 46]
            assert results[-1].timing.close_reason == "drain"

    asyncio.run(go())


def test_a_second_batch_starts_just_in_time_on_a_real_clock() -> None:
    """Whatever the machine's timers do, all are answered; how well it goes benchmarks tell."""

    async def go() -> None:
        cost = Cost(0.002, 0.0, 0.001, 0.0)
        engine = EmulatedEngine([(1,)], [cost], name="x", depth=2)
        batcher = Batcher(
            engine, asyncio.get_running_loop(), max_batch_rows=8, max_queue_rows=10_000
        )
        answers = []
        for n in range(300):
            answers.append(submit(batcher, float(n), 1 + n % 4))
            await asyncio.sleep(0.0005)
        for n, answer in enumerate(await computed(*answers)):
            assert (answer.output == n).all()
        assert batcher.statistics.busy_s >= batcher.statistics.batches * 0.002
        await batcher.drain(PATIENCE_S)

    asyncio.run(go())


# --- draining -----------------------------------------------------------------------------------


def test_draining_answers_what_waits_and_refuses_what_comes() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine, max_batch_rows=2) as batcher:
            answers = [submit(batcher, float(n)) for n in range(5)]
            await engine.await_entry()
            drain = asyncio.create_task(batcher.drain(PATIENCE_S))
            await turn()
            with pytest.raises(Unavailable, match="draining"):
                submit(batcher)
            engine.open()
            await drain
            results = await computed(*answers)
            assert [float(result.output[0, 0]) for result in results] == [0, 2, 4, 6, 8]
            assert results[-1].timing.close_reason == "drain"
            with pytest.raises(Unavailable, match="draining"):
                submit(batcher)

    asyncio.run(go())


def test_draining_an_idle_batcher_stops_its_thread() -> None:
    async def go() -> None:
        async with batching(FakeEngine()) as batcher:
            await batcher.drain(PATIENCE_S)
            assert "engine" not in [thread.name for thread in threading.enumerate()]
            await batcher.drain(PATIENCE_S)  # twice does no harm

    asyncio.run(go())


def test_draining_gives_up_on_an_engine_that_hangs() -> None:
    async def go() -> None:
        engine = FakeEngine(closed=True)
        async with batching(engine) as batcher:
            answer = submit(batcher)
            await engine.await_entry()
            with pytest.raises(Unavailable, match="the queue did not drain in 0.01 s"):
                await batcher.drain(0.01)
            engine.open()
            await computed(answer)

    asyncio.run(go())


def test_an_event_loop_that_closed_does_not_break_the_thread() -> None:
    engine = FakeEngine(closed=True)

    async def begin() -> Batcher:
        batcher = Batcher(engine, asyncio.get_running_loop(), max_batch_rows=1, max_queue_rows=100)
        for _ in range(2):
            batcher.offer(make_job())
        await engine.await_entry()
        return batcher

    batcher = asyncio.run(begin())
    engine.open()
    asyncio.run(batcher.drain(PATIENCE_S))
    assert len(engine.calls) == 2


# --- many at once -------------------------------------------------------------------------------


def test_thousands_of_requests_each_get_their_own_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def go() -> None:
        engine = FakeEngine()
        async with batching(engine, max_batch_rows=64, max_queue_rows=10_000) as batcher:
            answers = []
            for n in range(3000):
                answers.append(submit(batcher, float(n), 1 + n % 4, block=n % 3))
                if n % 100 == 0:
                    await turn()
            for n, answer in enumerate(await computed(*answers)):
                assert answer.output.shape == (1 + n % 4, 1)
                assert (answer.output == 2 * n).all()
            assert batcher.statistics.rows == sum(1 + n % 4 for n in range(3000))
            assert max(sum(rows) for _, rows in engine.calls) <= 64

    asyncio.run(go())
    assert caplog.records == []
