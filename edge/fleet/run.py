"""Run a fleet: ask the cloud what it serves, start the shards, merge what they bring back."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datamix.errors import ConfigError, DataMixError, Unavailable, from_status
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.crew import Crew, Launch, Lost
from edge.fleet.offline import OfflineTraffic
from edge.fleet.prepare import prepare
from edge.fleet.process import Failure, Ready, Target
from edge.fleet.processes import processes
from edge.fleet.quantiles import observed
from edge.fleet.recorder import Recorder
from edge.fleet.report import Run, Summary, summarise
from edge.fleet.settled import Merge, Watch
from edge.fleet.shard import Counters, Progress, ShardResult
from edge.fleet.stats import Sampler, Use, fetch, use
from edge.fleet.terms import agree

_HEADROOM_S = 0.3  # from "all are ready" to the first arrival, so that every shard has heard it
_PATIENCE_S = 30.0  # beyond the last deadline, before a silent shard is taken for dead
_PREPARE_S = 300.0  # reading the bundle and computing what is right


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
        latencies_s: of the inferences answered since the last progress, from when they fell due.
        p50_s: their median; None if there were none.
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
    latencies_s: list[float]
    p50_s: float | None
    p99_s: float | None
    batch_rows_mean: float | None
    engine_busy_ratio: float | None
    generator_cpu_ratio: float


OnProgress = Callable[[FleetProgress], None]


def simulate(
    config: FleetConfig, on_progress: OnProgress | None = None, launch: Launch = processes
) -> Summary:
    """Run the fleet against a cloud and say what it saw; see :func:`record`."""
    return record(config, on_progress, launch)[1]


def record(
    config: FleetConfig,
    on_progress: OnProgress | None = None,
    launch: Launch = processes,
    watch: Watch | None = None,
) -> tuple[Run, Summary]:
    """Run the fleet against a cloud; all that was recorded, and what it says.

    Ctrl-C ends the run early: record and summary then cover what was done. So does ``watch``, once
    that is enough for it. So does the loss of a shard: the others are stopped, and the summary of
    what they did is not valid. No process stays behind.

    Args:
        config: the run.
        on_progress: called about once a second.
        launch: where the shards are at work; by default in processes of this machine.
        watch: sees the inferences as they end, in the order they were due.

    Raises:
        ConfigError: the settings don't fit the cloud, the bundle or this machine, or the two ends
            of the mode split seem to have one operator.
        Unavailable: nobody answers, or not every device got its stream.
        DataMixError: what the cloud or a bundle had to say.
    """
    terms = agree(config)
    target = discover(config)
    rounds, rows = _shape(config, target)
    mode = "echo" if terms is None else terms.promise.mode
    recorder = None if config.out is None else Recorder(config)
    keep = None if recorder is None else recorder.sample
    sampler = Sampler(*config.base_urls, access=config.access, keep=keep)
    with contextlib.ExitStack() as stack:
        shelf = None
        if config.precompute:
            shelf = prepare(config)
            stack.enter_context(shelf.memory)
        crew = stack.enter_context(launch(config, target, shelf))
        fleet = _Fleet(config, crew)
        fleet.wait_ready(on_progress)
        sampler.start()
        try:
            start_s = fleet.start()
            if recorder is not None:
                recorder.begin(
                    model=target.model,
                    mode=mode,
                    rounds=rounds,
                    group_size=rows,
                    start_s=start_s,
                    terms=terms,
                )
            interrupted = fleet.follow(start_s, sampler, on_progress, watch)
        finally:
            samples = sampler.stop()
        results, lost = fleet.results, fleet.lost
    if not results:
        raise Unavailable(f"every shard of the fleet was lost: {_losses(lost, crew.size)}")
    whole = merged(results)
    run = Run(
        config=config,
        model=target.model,
        mode=mode,
        terms=terms,
        offline=_add_offline([part.offline for part in results if part.offline is not None]),
        rounds=rounds,
        group_size=rows,
        table=whole.table,
        answered=whole.answered,
        counters=whole.counters,
        cpu_s=[part.cpu_s for part in results],
        busy_ratios=[part.busy_ratio for part in results],
        window_s=max(part.window_s for part in results),
        elapsed_s=max(part.elapsed_s for part in results),
        interrupted=interrupted,
        start_s=start_s,
        samples=samples,
        start_error_s=crew.start_error_s,
        fault=_losses(lost, crew.size) if lost else None,
    )
    summary = summarise(run)
    if recorder is not None:
        recorder.end(run, summary)
    return run, summary


@dataclass(frozen=True, slots=True)
class Merged:
    """What all shards brought back, as one would have.

    Attributes:
        table: a row per inference that fell due, in the order of the whole fleet's schedule.
        answered: (seconds, 2) messages and rows answered in each second after the start.
        counters: totals.
    """

    table: result.Table
    answered: npt.NDArray[np.int64]
    counters: dict[str, int]


def merged(parts: Sequence[ShardResult]) -> Merged:
    """Put the shards' results together, whatever order they came in; nothing is rounded."""
    answered = np.zeros((max(len(part.answered) for part in parts), 2), np.int64)
    for part in parts:
        answered[: len(part.answered)] += part.answered
    table = result.merge([part.table for part in parts])
    return Merged(table, answered, _add([part.counters for part in parts]))


def discover(config: FleetConfig) -> Target:
    """Ask the cloud what it serves, and check that the workload fits.

    Raises:
        ConfigError: the bundle is another model than the one served, or the workload does not
            fit the engine.
        Unavailable: nobody answers.
    """
    model, version = config.model, None
    if model is None and config.bundle is not None:
        from datamix.bundle import read_manifest

        manifest = read_manifest(config.bundle)
        model, version = manifest.name, manifest.version
    if model is None:
        model = str(fetch(f"{config.base_url}/v2/stats", config.access).get("model", ""))
        if not model:
            raise ConfigError(f"{config.base_url} does not say which model it serves, expected one")
    target = Target(model, "", (), version)
    url = f"{config.base_url}/v2/models/{target.path}"
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
    return dataclasses.replace(target, engine=engine, input_shapes=shapes)


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


def _losses(lost: list[Lost], shards: int) -> str:
    first = lost[0]
    others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return (
        f"shard {first.shard} of {shards}{others} was lost ({first.reason}): what its devices did "
        "is missing, and the others were stopped"
    )


def _add_offline(parts: list[OfflineTraffic]) -> OfflineTraffic | None:
    names = [item.name for item in dataclasses.fields(OfflineTraffic)]
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    return OfflineTraffic(**sums) if parts else None


class _Fleet:
    """The shards of one run, seen from their parent."""

    def __init__(self, config: FleetConfig, crew: Crew) -> None:
        self.config = config
        self.results: list[ShardResult] = []
        self.lost: list[Lost] = []
        self._crew = crew
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
        while self._ready < self._crew.size:
            self._hear(0.5, deadline_s)
            if self.lost:
                raise Unavailable(
                    f"shard {self.lost[0].shard} of {self._crew.size} was lost before the run "
                    f"began ({self.lost[0].reason})"
                )
            self._show("connecting", None, on_progress)

    def start(self) -> float:
        """Tell every shard the common start; return it."""
        return self._crew.start(_HEADROOM_S)

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
        interrupted = stopped = False
        deadline_s = start_s + length_s + _PATIENCE_S
        while len(self.results) + len(self.lost) < self._crew.size:
            try:
                self._hear(0.25, deadline_s)
                draining = time.monotonic() - start_s > config.duration_s
                phase = "draining" if draining else "running"
                self._show(phase, sampler, on_progress)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
            if (interrupted or self.lost or self._enough) and not stopped:
                stopped = True
                deadline_s = time.monotonic() + _PATIENCE_S
                self._crew.stop()
        return interrupted

    def _hear(self, timeout_s: float, deadline_s: float) -> None:
        """Take what the shards say; raise what they could not cope with."""
        if time.monotonic() > deadline_s:
            raise Unavailable("a shard of the fleet fell silent, expected its result")
        for word in self._crew.hear(timeout_s):
            match word:
                case Progress():
                    self._latest[word.shard] = word
                    self._latencies_s += word.latencies_s
                    news = self._merge.add(word.shard, word.settled)
                    if self._watch is not None and news is not None and not self._enough:
                        self._enough = self._watch(news)
                case Ready():
                    self._ready += 1
                case ShardResult():
                    self.results.append(word)
                case Lost():
                    self.lost.append(word)
                case Failure():
                    raise _error(word)

    def _show(self, phase: str, sampler: Sampler | None, on_progress: OnProgress | None) -> None:
        """Report progress about once a second."""
        now = time.monotonic()
        if on_progress is None or now - self._shown_s < 0.99:
            return
        latest = list(self._latest.values())
        counters = _add([part.counters for part in latest])
        lately = observed(np.array(self._latencies_s))
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
                latencies_s=self._latencies_s,
                p50_s=lately["p50"],
                p99_s=lately["p99"],
                batch_rows_mean=cloud.batch_rows_mean,
                engine_busy_ratio=cloud.busy_ratio,
                generator_cpu_ratio=cpu_s / elapsed_s if elapsed_s > 0 else 0.0,
            )
        )
        self._shown_s, self._shown_elapsed_s, self._shown = now, elapsed_s, counters
        self._latencies_s = []


def _error(failure: Failure) -> Exception:
    if failure.status == 0:
        return RuntimeError(f"the fleet simulator failed:\n{failure.sentence}")
    error: DataMixError = from_status(failure.status, failure.sentence)
    return error
