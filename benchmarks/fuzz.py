"""Does a replica survive 200,000 mutated messages, and serve others meanwhile as if nothing were?

A real replica behind HAProxy gets mutants over WebSocket streams, over HTTP, and over connections
that break either protocol. Each has to be answered once, as the local codec says. Good clients ask
on beside them and know their answers bit for bit. A finding is written to a file, the exit code is
1 if there was any, and a seed gives the same mutants again.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import clusters, report
from benchmarks.fuzzing.attack import Plan, attack
from benchmarks.fuzzing.good import Good, befriend
from benchmarks.fuzzing.messages import MAX_ROWS, SHAPE
from benchmarks.fuzzing.oracle import Oracle
from benchmarks.fuzzing.tally import Finding, Tally
from benchmarks.saturation import stats
from deployments.config import Config

# Small limits are met more often. The queue takes everything: a good request is never shed.
SETTINGS: dict[str, Any] = {
    "engine": "null",
    "echo_shape": SHAPE,
    "max_request_rows": MAX_ROWS,
    "max_batch_rows": 64,
    "max_queue_rows": 100_000,
    "max_stream_requests": 16,
}
_MARKS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of all mutants: where the table tells of memory
_SAMPLE_S = 0.5
_SETTLE_S = 3.0
WAYS = {
    "HTTP: ": "connections that hardly speak HTTP",
    "WebSocket: ": "WebSockets with rare or broken frames",
    "Arrow: ": "HTTP, Arrow",
    "JSON": "HTTP, Open Inference Protocol",
    "binary": "HTTP, Open Inference Protocol",
    "OIP structure": "HTTP, Open Inference Protocol, by hypothesis",
    "odd headers": "HTTP, odd headers and paths",
    "arrow structure": "stream, Arrow by hypothesis",
}


def _attack(url: str, plan: Plan, sent: Any, results: Any) -> None:
    """A process that sends all mutants; ``sent`` counts them."""

    async def go() -> Tally:
        tally = Tally(plan.limit_s)

        async def count() -> None:
            while True:
                sent.value = tally.sent.total()
                await asyncio.sleep(0.1)

        counting = asyncio.create_task(count())
        try:
            await attack(url, plan, Oracle(Config(**SETTINGS)), tally)
        except* Exception as group:  # the front door is closed, say
            tally.found("connection", f"no client could go on: {group.exceptions[0]!r}")
        counting.cancel()
        return tally

    results.put(asyncio.run(go()))


def _befriend(url: str, plan: Plan, stop: Any, results: Any) -> None:
    """A process of good clients, until ``stop``."""
    oracle = Oracle(Config(**SETTINGS))
    results.put(
        asyncio.run(befriend(url, oracle, stop.is_set, seed=plan.seed, limit_s=plan.limit_s))
    )


@dataclass(slots=True)
class Watch:
    """The replica as seen from outside, again and again.

    Attributes:
        samples: (mutants sent, resident bytes).
        findings: what it should not have done.
    """

    url: str
    first: dict[str, Any]
    last: dict[str, Any]
    samples: list[tuple[int, int]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def start(cls, url: str) -> Watch:
        """Look for the first time."""
        now = stats(url)
        return cls(url, now, now)

    def look(self, sent: int) -> None:
        """Take a sample, and see that it is the same replica."""
        try:
            now = stats(self.url)
            self.samples.append((sent, psutil.Process(now["pid"]).memory_info().rss))
        except (OSError, psutil.Error) as error:
            self._found(f"the replica cannot be seen: {error!r}")
            return
        same = all(now[key] == self.first[key] for key in ("replica", "pid"))
        if not same or now["uptime_s"] < self.last["uptime_s"]:
            self._found(f"another replica answers: pid {now['pid']}, up {now['uptime_s']:.0f} s")
            self.first = now
        self.last = now

    def settle(self, sent: int) -> None:
        """Look at what is left when everybody is gone."""
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            self.last = stats(self.url)
            if not (self.last["open_streams"] or self.last["queue_rows"]):
                break
            time.sleep(_SAMPLE_S)
        else:
            left = {key: self.last[key] for key in ("open_streams", "queue_rows")}
            self._found(f"everybody has left, but there are {left}")
        for _ in range(6):
            time.sleep(_SETTLE_S / 6)
            self.look(sent)

    def _found(self, what: str) -> None:
        self.findings.append(Finding("replica", what))

    def floor_mib(self, share: float) -> float:
        """The least resident memory within a tenth of the run, from this share of all mutants on.

        Allocators keep buffers of large messages for a while; what leaked stays in the floor.
        """
        total = self.samples[-1][0]
        shares = [(sent / total, rss) for sent, rss in self.samples]
        within = [rss for at, rss in shares if share <= at <= share + 0.1]
        nearest = min(shares, key=lambda sample: abs(sample[0] - share))[1]
        return min(within, default=nearest) / 2**20


def run(url: str, plan: Plan, total: int) -> tuple[Tally, Good, Watch, float]:
    """Let everybody loose on a replica; also how long it took, in seconds."""
    spawn = multiprocessing.get_context("spawn")
    tallies, goods, sent, stop = spawn.Queue(), spawn.Queue(), spawn.Value("q", 0), spawn.Event()
    friends = spawn.Process(target=_befriend, args=(url, plan, stop, goods), daemon=True)
    hostile = spawn.Process(target=_attack, args=(url, plan, sent, tallies), daemon=True)
    watch, start_s, told_s = Watch.start(url), time.monotonic(), 0.0
    friends.start()
    hostile.start()
    try:
        while tallies.empty() and hostile.is_alive():
            watch.look(sent.value)
            if time.monotonic() - told_s > 5:
                told_s = time.monotonic()
                _say(told_s - start_s, sent.value, total, watch)
            time.sleep(_SAMPLE_S)
        tally: Tally = tallies.get(timeout=plan.limit_s)
        elapsed_s = time.monotonic() - start_s
        stop.set()
        good: Good = goods.get(timeout=2 * plan.limit_s)
    finally:
        for process in (friends, hostile):
            process.join(5)
            if process.is_alive():
                process.kill()
    watch.settle(tally.sent.total())
    return tally, good, watch, elapsed_s


def _say(elapsed_s: float, sent: int, total: int, watch: Watch) -> None:
    mib = watch.samples[-1][1] / 2**20 if watch.samples else 0.0
    print(f"{elapsed_s:4.0f} s: {sent:,} of {total:,} mutants, replica {mib:.0f} MiB", flush=True)


def way(kind: str) -> str:
    """Which row of the table a kind of mutant belongs to."""
    return next((name for prefix, name in WAYS.items() if kind.startswith(prefix)), "stream, Arrow")


def rows_of(tally: Tally) -> list[dict[str, Any]]:
    """The table: one row per way."""
    sent: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {}
    for kind, count in tally.sent.items():
        sent[way(kind)] += count
    for (kind, status), count in tally.statuses.items():
        group = "no answer" if status == 0 else f"{status // 100}xx"
        answers.setdefault(way(kind), Counter())[group] += count
    wrong = Counter(way(finding.kind) for finding in tally.findings)
    return [
        {
            "way": name,
            "mutants": count,
            **{f"answered {group}": answers.get(name, Counter())[group]
               for group in ("2xx", "4xx", "5xx")},
            "findings": wrong[name],
        }
        for name, count in sent.most_common()
    ]  # fmt: skip


def write_findings(folder: Path, findings: list[Finding]) -> None:
    """Each finding's bytes to a file, and what they are to another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, finding in enumerate(findings):
        (folder / f"{number:03}.bin").write_bytes(finding.sent)
        text = {"kind": finding.kind, "what": finding.what}
        (folder / f"{number:03}.json").write_text(json.dumps(text, indent=1) + "\n")


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--count", type=int, default=200_000, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--limit-s", type=float, default=30.0, help="later answers are hangs")
    parser.add_argument(
        "--max-growth-mib", type=float, default=16.0, help="from half of the run on"
    )
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    plan = Plan.of(
        options.count, streams=options.streams, seed=options.seed, limit_s=options.limit_s
    )
    with clusters.start("ours", **SETTINGS) as url:
        tally, good, watch, elapsed_s = run(url, plan, options.count)
    count = tally.sent.total()
    floors_mib = {mark: watch.floor_mib(mark) for mark in _MARKS}
    growth_mib = floors_mib[0.9] - floors_mib[0.5]
    findings = tally.findings + watch.findings
    findings += [Finding("good client", what) for what in good.wrong]
    if growth_mib > options.max_growth_mib:
        grown = f"the replica grew by {growth_mib:.1f} MiB in the second half"
        findings.append(Finding("memory", grown))
    if findings:
        write_findings(options.findings, findings)
    report.show(
        f"{count:,} mutants, seed {options.seed}, in {elapsed_s:.0f} s; the replica's memory from "
        + ", ".join(f"{mark:.0%}: {mib:.0f}" for mark, mib in floors_mib.items())
        + " MiB",
        rows_of(tally),
        [
            "each mutant is answered once: with the status, words and values that the codec gives "
            "beside the replica, without its memory; statuses above 499, a wrong or second answer, "
            f"or none in {options.limit_s:g} s are findings",
            "connections that break HTTP or WebSocket may be closed without an answer, but nothing "
            "else may be; those with rare but legal frames are answered, and some several times",
            f"good clients: 4 streams and HTTP, {len(good.latencies_s):,} answers, each compared "
            f"bit for bit; p50 {np.median(good.latencies_s) * 1e3:.1f} ms; mutants, clients and "
            "replica share this machine's cores",
            "memory is the least that was resident within a tenth of the run, as allocators keep "
            "what large messages took for a while; the last tenth goes on until all have left",
            *(f"finding: {each.kind}: {each.what[:300]}" for each in findings[:20]),
        ],
        options.json,
        mutants=float(count),
        findings=float(len(findings)),
        good_answers=float(len(good.latencies_s)),
        good_answers_wrong=float(len(good.wrong)),
        good_p99_ms=float(np.quantile(good.latencies_s, 0.99)) * 1e3,
        longest_sign_of_life_ms=max(good.probes_s) * 1e3,
        growth_from_10_percent_mib=floors_mib[0.9] - floors_mib[0.1],
        growth_from_50_percent_mib=growth_mib,
        replica_restarts=float(sum("another replica" in each.what for each in watch.findings)),
    )
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
