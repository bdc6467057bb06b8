"""The search with its runs, against a solved queue instead of a cloud: no clock, no socket."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.batch_queue import BatchQueue
from cluster.cli import main
from datamix.errors import ConfigError, Unavailable
from edge.fleet import capacity_command, pacing, result
from edge.fleet.capacity import Capacity, Fleet, Probe, measure, probe
from edge.fleet.capacity_view import probe_line, show_capacity, step_line
from edge.fleet.config import FleetConfig
from edge.fleet.objective import Objective
from edge.fleet.report import Run, Summary, summarise
from edge.fleet.run import OnProgress
from edge.fleet.search import Plan
from edge.fleet.settled import Settled, Watch
from tests.fake_cloud import FakeCloud, running
from tests.test_fleet_report import make_run
from tests.test_fleet_run import group, wait_for

QUEUE = BatchQueue(0.02, 0.002, 16)
P99 = Objective(0.99, 0.15)
CAPACITY = 280.4  # tests/test_fleet_search.py holds it


@dataclass
class Queue:
    """Runs a fleet against the queue; ``most`` streams, and a generator that lags above a rate."""

    lags_above: float = float("inf")
    link_s: float = 0.0
    most: int = 1 << 30
    interrupt_after: int = 1 << 30
    configs: list[FleetConfig] = field(default_factory=list)

    def __call__(
        self, config: FleetConfig, on_progress: OnProgress | None, watch: Watch | None
    ) -> tuple[Run, Summary]:
        self.configs.append(config)
        if config.devices > self.most:
            raise Unavailable(f"{config.devices - self.most} devices got no stream")
        plan = pacing.schedule(
            config.pacer, config.rate, config.duration_s, config.devices, config.seed
        )
        due_s, latency_s = plan.due_s, QUEUE.follow(plan.due_s) + self.link_s
        lag_s = 0.2 if config.rate > self.lags_above else 0.001
        until_s, over = 0.0, False
        while watch is not None and not over and until_s < config.duration_s:
            part = (due_s >= until_s) & (due_s < until_s + 0.5)
            until_s += 0.5
            over = watch(Settled(until_s, due_s[part], latency_s[part] + lag_s))
        window_s = until_s if over else config.duration_s
        rows = int(np.searchsorted(due_s, window_s))
        run = make_run()
        table = result.allocate(plan, rows=4)[:rows]
        table["status"], table["rounds"] = result.OK, 1
        table["lag_s"], table["compute_s"] = lag_s, 0.04
        table["done_s"] = due_s[:rows] + latency_s[:rows] + lag_s
        table["sent_s"] = due_s[:rows] + lag_s
        table["queue_s"] = latency_s[:rows] - 0.04 - self.link_s
        table["uplink_s"] = self.link_s
        run = replace(
            run,
            config=config,
            table=table,
            answered=np.zeros((int(window_s) + 2, 2), np.int64),
            window_s=window_s,
            elapsed_s=window_s + 1,
            interrupted=len(self.configs) > self.interrupt_after,
        )
        return run, summarise(run)


def make_fleet(**changes: Any) -> Fleet:
    base = FleetConfig(url="http://cloud", workload="echo")
    return replace(Fleet(base, 0.5, 100, 1.0), **changes)


def search(queue: Queue, plan: Plan | None = None, **more: Any) -> Capacity:
    return measure(make_fleet(), plan or Plan(P99), recorder=queue, **more)


def test_a_search_says_how_many_devices_and_what_limits_them() -> None:
    queue = Queue()
    found = search(queue)
    assert found.ended == "found" and found.exit_code == 0
    assert found.rate == pytest.approx(CAPACITY, rel=0.03)
    assert found.devices == pytest.approx(2 * CAPACITY, rel=0.03)
    assert found.devices is not None and found.devices_high is not None
    assert found.devices_low <= found.devices <= found.devices_high
    assert found.limit.name == "queue" and found.model == "echo"
    assert found.failed_rate is not None and found.failed_rate > CAPACITY * 0.97
    seeds = [config.seed for config in queue.configs]
    assert len(set(seeds)) == len(seeds), "two probes saw the same schedule"
    assert {config.devices for config in queue.configs} == {64, 100}, "streams are bounded"
    assert found.probes[0].devices == 64 and found.probes[-1].devices > 400


def test_a_probe_stops_when_it_knows() -> None:
    plan = Plan(P99)
    queue = Queue()
    step = replace(next_after(plan), rate=560.0)
    found, run = probe(make_fleet(), plan, step, 0, recorder=queue)
    assert found.tried.verdict.answer == "fail"
    assert run.window_s < step.rules.duration_s
    assert found.tried.verdict.inferences < len(run.table)


def next_after(plan: Plan) -> Any:
    from edge.fleet.search import next_step

    step = next_step([], plan)
    assert step is not None
    return step


def test_a_probe_that_came_to_its_end_is_judged_whole() -> None:
    plan = Plan(P99, most_s=3.0)
    step = replace(next_after(plan), rate=100.0)

    def deaf(
        config: FleetConfig, on_progress: OnProgress | None, watch: Watch
    ) -> tuple[Run, Summary]:
        return Queue()(config, on_progress, None)

    found, run = probe(make_fleet(), plan, step, 0, recorder=deaf)
    warm = run.table["scheduled_s"] >= step.rules.warmup_s
    assert found.tried.verdict.inferences == int(warm.sum()) > 200


def test_a_lagging_generator_ends_the_search_and_is_named() -> None:
    found = search(Queue(lags_above=200))
    assert found.ended == "generator" and found.exit_code == 3
    assert found.limit.name == "generator" and "not the cloud" in found.limit.sentence
    assert found.rate is None and found.devices is None
    assert found.rate_low == 128 and found.devices_low == 256
    assert [one.valid for one in found.probes[-3:]] == [False] * 3


def test_streams_that_are_not_opened_end_the_search_with_the_clouds_words() -> None:
    found = search(Queue(most=80), Plan(P99, start_rate=16))
    assert found.ended == "streams" and found.limit.name == "connections"
    assert "got no stream" in found.limit.sentence and found.rate_low == 32
    with pytest.raises(Unavailable):
        search(Queue(most=1))


def test_links_that_alone_take_too_long_end_the_search_soon() -> None:
    found = search(Queue(link_s=0.2))
    assert found.ended == "elsewhere" and found.exit_code == 1 and len(found.probes) == 2
    assert found.limit.name == "link" and "no cloud" in found.limit.sentence
    show_capacity(found, Console(file=io.StringIO()))


def test_ctrl_c_gives_what_is_known() -> None:
    queue = Queue(interrupt_after=4)
    found = search(queue)
    assert found.ended == "interrupted" and found.exit_code == 130
    assert len(found.probes) == 4 and found.rate_low == 256 and found.rate is None

    def impatient(
        config: FleetConfig, on_progress: OnProgress | None, watch: Watch
    ) -> tuple[Run, Summary]:
        raise KeyboardInterrupt

    nothing = measure(make_fleet(), Plan(P99), recorder=impatient)
    assert nothing.ended == "interrupted" and nothing.probes == () and nothing.devices_low == 0


def test_all_that_was_asked_for_and_nothing_at_all_are_answers() -> None:
    top = search(Queue(), Plan(P99, start_rate=16, most_rate=64))
    assert top.ended == "top" and top.exit_code == 0 and top.devices_low == 128
    assert top.limit.name == "none"
    strict = Plan(Objective(0.99, 0.021), start_rate=8, least_rate=4, most_s=3)
    bottom = measure(make_fleet(), strict, recorder=Queue())
    assert bottom.ended == "bottom" and bottom.exit_code == 1 and bottom.devices_low == 0
    assert bottom.devices_high == 8


def test_a_search_goes_on_from_its_file(tmp_path: Path) -> None:
    plan, fleet = Plan(P99), make_fleet()
    whole = search(Queue())
    part = search(Queue(interrupt_after=6))
    path = tmp_path / "capacity.json"
    setting = capacity_command.settings(fleet, plan, 0)
    capacity_command.write(path, part, setting)
    before = capacity_command.load_probes(path, setting)
    assert before == list(part.probes)
    resumed = search(Queue(), before=before)
    assert resumed == whole
    assert json.loads(path.read_text())["ended"] == "interrupted"
    with pytest.raises(ConfigError, match="another search: seed differ"):
        capacity_command.load_probes(path, setting | {"seed": 1})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"probes": 3}', '{"probes": [{}], "settings": null}', "\x00"]
)
def test_a_file_that_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "capacity.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected|differ"):
        capacity_command.load_probes(path, {"seed": 0})
    with pytest.raises(ConfigError, match="does not exist"):
        capacity_command.load_probes(tmp_path / "none.json", {})
    with pytest.raises(ConfigError, match="expected a saved one"):
        Probe.from_dict({"tried": {"rate": 1, "verdict": {"share": None}}, "limit": {}})


def test_what_is_found_is_shown() -> None:
    out = io.StringIO()
    steps: list[str] = []
    found = search(Queue(), on_step=lambda step, known: steps.append(step_line(step, known)))
    show_capacity(found, Console(file=out, width=100))
    text = out.getvalue()
    assert f"{found.devices:,} (" in text and "what limits it" in text and "queue: " in text
    assert steps[0].startswith("trying 32 inferences/s") and "believed" in steps[-1]
    assert "late" in probe_line(found.probes[0])
    for other in (Queue(lags_above=200), Queue(interrupt_after=0)):
        show_capacity(search(other), Console(file=io.StringIO()))
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"rate_per_device": 0.0},
        {"most_streams": 0},
        *(
            {"base": FleetConfig(url="http://cloud", workload="echo", pacer=pacer)}
            for pacer in ("closed:think_s=1", "ramp:to=400", "diurnal:depth=0.8")
        ),
    ],
)
def test_devices_that_nobody_can_count_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make_fleet(**bad)


def test_the_command_searches_a_real_cloud_and_writes_what_it_knows(tmp_path: Path) -> None:
    path = tmp_path / "capacity.json"
    options = ["--workload", "echo", "--slo", "p50=200ms", "--rate-per-device", "2", "--seed", "3"]
    options += ["--start-rate", "40", "--most-devices", "20", "--probe-seconds", "1"]
    with running(FakeCloud()) as cloud, pytest.raises(SystemExit) as ended:
        main(["capacity", "--url", cloud.url, *options, "--json", str(path)])
    found = json.loads(path.read_text())
    assert ended.value.code == 0 and found["ended"] == "top"
    assert found["devices_low"] == 20 and found["limit"]["name"] == "none"
    assert found["probes"][0]["streams"] == 20 == cloud.streams
    assert found["probes"][0]["tried"]["verdict"]["late"] == 0


def test_ctrl_c_writes_what_is_known_and_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "capacity.json"
    with running(FakeCloud()) as cloud:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "capacity", "--url", cloud.url]
            + ["--workload", "echo", "--slo", "p50=100ms", "--json", str(path)]
            + ["--start-rate", "200", "--probe-seconds", "1"],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for(lambda: path.exists(), 60)  # the first probe is done
        asked = cloud.requests
        wait_for(lambda: cloud.requests > asked, 60)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert "Traceback" not in err and "it was interrupted" in out
        found = json.loads(path.read_text())
        assert found["ended"] == "interrupted" and len(found["probes"]) >= 1
        wait_for(lambda: not group(process.pid), 5)
