"""Run a fleet: ask the cloud what it serves, start the shards, merge what they bring back."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from datamix.errors import ConfigError, DataMixError, Unavailable, from_status
from datamix.limits import raise_descriptor_limit
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.offline import OfflineTraffic
from edge.fleet.process import Failure, Ready, Target, Task, main
from edge.fleet.report import Run, Summary, percentiles, summarise
from edge.fleet.settled import Merge, Watch
from edge.fleet.shard import Counters, Progress, ShardResult
from edge.fleet.stats import Sampler, Use, fetch, use
from edge.fleet.terms import agree

_HEADROOM_S = 0.3  # from "all are ready" to the first arrival, so that every shard has heard it
_PATIENCE_S = 30.0  # beyond the last deadline, before a silent shard is taken for dead
_PREPARE_S = 300.0  # reading the bundle and computing what is right
_SPARE_DESCRIPTORS = 64


@dataclass(frozen=True, slots=True)
class FleetProgress:
    """What the whole fleet did until now, for a live view.

    Attributes:
        phase: ``connecting``, ``running`` or ``draining`` (all begun, some under way).
        elapsed_s: since the first inference could fall due.
        duration_s: for how long they do.
        devices: simulated devices.
        connected: of those, with an open stream.
        in_flight: inferences under way.
        counters: totals so far.
        requests_per_s: answered since the last progress.
        offered_per_s: inferences begun since the last progress, per second.
        p50_s: median latency of the inferences answered since then; None if there were none.
        p99_s: their 99th percentile, or None if they are too few.
        batch_rows_mean: rows per batch lately; None where the cloud gives no statistics.
        engine_busy_ratio: share of time its engine computed lately.
        generator_cpu_ratio: cores that all generator processes used since the start.
    """

    phase: str
    elapsed_s: float
    duration_s: float
    devices: int
    connected: int
    in_flight: int
    counters: dict[str, int]
    requests_per_s: float
    offered_per_s: float
    p50_s: float | None
    p99_s: float | None
    batch_rows_mean: float | None
    engine_busy_ratio: float | None
    generator_cpu_ratio: float


OnProgress = Callable[[FleetProgress], None]


def simulate(config: FleetConfig, on_progress: OnProgress | None = None) -> Summary:
    """Run the fleet against a cloud and say what it saw; see :func:`record`."""
    return summarise(record(config, on_progress))


def record(
    config: FleetConfig, on_progress: OnProgress | None = None, watch: Watch | None = None
) -> Run:
    """Run the fleet against a cloud and keep all that was recorded.

    Ctrl-C ends the run early: the record then covers what was done. So does ``watch``, which sees
    the inferences as they end, once that is enough for it. No process stays behind.

    Raises:
        ConfigError: the settings don't fit the cloud, the bundle or this machine, or the two ends
            of the mode split seem to have one operator.
        Unavailable: nobody answers, or not every device got its stream.
        DataMixError: what the cloud or a bundle had to say.
    """
    check_descriptors(config)
    terms = agree(config)
    target = discover(config)
    rounds, rows = _shape(config, target)
    sampler = Sampler(config.base_url, config.access)
    with _shards(config, target) as fleet:
        fleet.wait_ready(on_progress)
        sampler.start()
        try:
            start_s = fleet.start()
            interrupted = fleet.follow(start_s, sampler, on_progress, watch)
        finally:
            samples = sampler.stop()
        results = fleet.results
    longest = max(len(part.answered) for part in results)
    answered = np.zeros((longest, 2), np.int64)
    for part in results:
        answered[: len(part.answered)] += part.answered
    return Run(
        config=config,
        model=target.model,
        mode="echo" if terms is None else terms.promise.mode,
        terms=terms,
        offline=_add_offline([part.offline for part in results if part.offline is not None]),
        rounds=rounds,
        group_size=rows,
        table=result.merge([part.table for part in results]),
        answered=answered,
        counters=_add([part.counters for part in results]),
        cpu_s=[part.cpu_s for part in results],
        busy_ratios=[part.busy_ratio for part in results],
        window_s=max(part.window_s for part in results),
        elapsed_s=max(part.elapsed_s for part in results),
        interrupted=interrupted,
        start_s=start_s,
        samples=samples,
    )


def discover(config: FleetConfig) -> Target:
    """Ask the cloud what it serves, and check that the workload fits.

    Raises:
        ConfigError: the bundle is another model than the one served, or the workload does not
            fit the engine.
        Unavailable: nobody answers.
    """
    model = config.model
    if model is None and config.bundle is not None:
        from datamix.bundle import read_manifest

        model = read_manifest(config.bundle).name
    if model is None:
        model = str(fetch(f"{config.base_url}/v2/stats", config.access).get("model", ""))
        if not model:
            raise ConfigError(f"{config.base_url} does not say which model it serves, expected one")
    url = f"{config.base_url}/v2/models/{model}"
    body = fetch(url, config.access)
    try:
        parameters = body["parameters"]
        engine = str(parameters["engine"])
        shapes = tuple(tuple(map(int, block["input_shape"])) for block in parameters["blocks"])
    except (KeyError, TypeError, ValueError) as error:
        raise Unavailable(f"{url} does not give engine and block shapes: {error!r}") from error
    echoes = engine == "null" or engine.startswith("emulated")
    if echoes != (config.workload == "echo"):
        fitting = "echo" if echoes else "bundle"
        raise ConfigError(
            f"workload is {config.workload!r}, expected {fitting!r} for the engine {engine!r}"
        )
    if not shapes:
        raise Unavailable(f"{url} names no block, expected at least one")
    return Target(model, engine, shapes)


def check_descriptors(config: FleetConfig) -> None:
    """Raise the limit of open files as far as allowed; refuse if a process needs more."""
    needed = -(-config.devices // config.processes) + _SPARE_DESCRIPTORS
    allowed = raise_descriptor_limit()
    if needed > allowed:
        raise ConfigError(
            f"a process may open {allowed} files here and needs {needed} for its devices: raise "
            f"the hard limit (ulimit -Hn) or use at least "
            f"{math.ceil(config.devices / max(1, allowed - _SPARE_DESCRIPTORS))} processes"
        )


def _shape(config: FleetConfig, target: Target) -> tuple[int, int]:
    """Requests per inference and rows per request."""
    if config.workload == "echo" or config.bundle is None:
        return 1, config.rows
    from datamix.bundle import read_manifest

    manifest = read_manifest(config.bundle)
    shapes = tuple(tuple(block.input_shape) for block in manifest.blocks)
    if shapes != target.input_shapes:
        raise ConfigError(
            f"the bundle's blocks take {shapes}, expected {target.input_shapes} as the cloud serves"
        )
    return len(manifest.blocks), manifest.group_size


def _add(parts: list[Counters]) -> dict[str, int]:
    names = [item.name for item in dataclasses.fields(Counters)]
    return {name: sum(getattr(part, name) for part in parts) for name in names}


def _add_offline(parts: list[OfflineTraffic]) -> OfflineTraffic | None:
    names = [item.name for item in dataclasses.fields(OfflineTraffic)]
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    return OfflineTraffic(**sums) if parts else None


class _Fleet:
    """The shard processes of one run, seen from their parent."""

    def __init__(self, config: FleetConfig, processes: dict[Connection, SpawnProcess]) -> None:
        self.config = config
        self.results: list[ShardResult] = []
        self._processes = processes
        self._ready = 0
        self._latest: dict[int, Progress] = {}
        self._latencies_s: list[float] = []
        self._merge = Merge(config.processes)
        self._watch: Watch | None = None
        self._enough = False
        self._shown_s = 0.0
        self._shown_elapsed_s = 0.0
        self._shown = dict.fromkeys((item.name for item in dataclasses.fields(Counters)), 0)

    def wait_ready(self, on_progress: OnProgress | None) -> None:
        """Wait until every device has its stream."""
        deadline_s = time.monotonic() + _PREPARE_S + self.config.connect_timeout_s
        while self._ready < len(self._processes):
            self._hear(0.5, deadline_s)
            self._show("connecting", None, on_progress)

    def start(self) -> float:
        """Tell every shard the common start; return it."""
        start_s = time.monotonic() + _HEADROOM_S
        for connection in self._processes:
            connection.send(start_s)
        return start_s

    def follow(
        self,
        start_s: float,
        sampler: Sampler,
        on_progress: OnProgress | None,
        watch: Watch | None = None,
    ) -> bool:
        """Wait for the results; return whether Ctrl-C cut the run short."""
        config, self._watch = self.config, watch
        length_s = config.duration_s + config.timeout_s
        interrupted = False
        deadline_s = start_s + length_s + _PATIENCE_S
        while len(self.results) < len(self._processes):
            try:
                self._hear(0.25, deadline_s)
                draining = time.monotonic() - start_s > config.duration_s
                phase = "draining" if draining else "running"
                self._show(phase, sampler, on_progress)
                if self._enough:
                    self._enough, self._watch = False, None
                    deadline_s = self._stop()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                deadline_s = self._stop()
        return interrupted

    def _stop(self) -> float:
        """Tell every shard to end; until when it may take."""
        for connection in self._processes:
            with contextlib.suppress(OSError):  # that shard is done already
                connection.send(None)
        return time.monotonic() + _PATIENCE_S

    def _hear(self, timeout_s: float, deadline_s: float) -> None:
        """Take what the shards say; raise what they could not cope with."""
        if time.monotonic() > deadline_s:
            raise Unavailable("a shard of the fleet fell silent, expected its result")
        for connection in wait([c for c in self._processes if not c.closed], timeout_s):
            assert isinstance(connection, Connection)
            try:
                word: Any = connection.recv()
            except EOFError as error:
                code = self._exit_code(connection)
                raise RuntimeError(f"a shard of the fleet died with exit code {code}") from error
            if isinstance(word, Progress):
                self._latest[word.shard] = word
                self._latencies_s += word.latencies_s
                news = self._merge.add(word.shard, word.settled)
                if self._watch is not None and news is not None:
                    self._enough |= self._watch(news)
            elif isinstance(word, Ready):
                self._ready += 1
            elif isinstance(word, ShardResult):
                self.results.append(word)
                connection.close()
            elif isinstance(word, Failure):
                raise _error(word)

    def _exit_code(self, connection: Connection) -> int | None:
        process = self._processes[connection]
        process.join(1)
        return process.exitcode

    def _show(self, phase: str, sampler: Sampler | None, on_progress: OnProgress | None) -> None:
        """Report progress about once a second."""
        now = time.monotonic()
        if on_progress is None or now - self._shown_s < 0.99:
            return
        latest = list(self._latest.values())
        counters = _add([part.counters for part in latest])
        lately = percentiles(np.array(self._latencies_s))
        cloud = (
            use([s for s in sampler.samples if s.at_s > now - 3]) if sampler else Use(None, None)
        )
        elapsed_s = max((part.elapsed_s for part in latest), default=0.0)
        # By the shards' own clock: their words come twice a second, not when they are shown.
        span_s = max(elapsed_s - self._shown_elapsed_s, 1e-3)
        cpu_s = sum(part.cpu_s for part in latest)
        on_progress(
            FleetProgress(
                phase=phase,
                elapsed_s=elapsed_s,
                duration_s=self.config.duration_s,
                devices=self.config.devices,
                connected=sum(part.connected for part in latest),
                in_flight=sum(part.in_flight for part in latest),
                counters=counters,
                requests_per_s=(counters["requests_ok"] - self._shown["requests_ok"]) / span_s,
                offered_per_s=(counters["begun"] - self._shown["begun"]) / span_s,
                p50_s=lately["p50"],
                p99_s=lately["p99"],
                batch_rows_mean=cloud.batch_rows_mean,
                engine_busy_ratio=cloud.busy_ratio,
                generator_cpu_ratio=cpu_s / elapsed_s if elapsed_s > 0 else 0.0,
            )
        )
        self._shown_s, self._shown_elapsed_s, self._shown = now, elapsed_s, counters
        self._latencies_s.clear()


@contextlib.contextmanager
def _shards(config: FleetConfig, target: Target) -> Iterator[_Fleet]:
    """Start the shard processes; on leaving, whatever the reason, none of them is alive."""
    # Spawned, not forked: a fork would copy locks and threads of a parent that may run anything.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        with _quiet_children():
            for number in range(config.processes):
                ours, theirs = context.Pipe()
                task = Task(config, target, number, config.processes)
                process = context.Process(
                    target=main, args=(theirs, task), name=f"fleet-{number}", daemon=True
                )
                process.start()
                theirs.close()
                processes[ours] = process
        yield _Fleet(config, processes)
    finally:
        for connection in processes:
            connection.close()  # the shard's lifeline: it leaves
        for process in processes.values():
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Children started in here don't see Ctrl-C and have one arithmetic thread.

    Ctrl-C goes to every process of the terminal; the parent alone decides what it means. Shards
    share the cores among themselves already, so a thread pool in each would only fight the others.
    """
    # It would be started with the first child, and unblock what is blocked here.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    old = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _error(failure: Failure) -> Exception:
    if failure.status == 0:
        return RuntimeError(f"the fleet simulator failed:\n{failure.sentence}")
    error: DataMixError = from_status(failure.status, failure.sentence)
    return error
