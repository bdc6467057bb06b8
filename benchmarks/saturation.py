"""How much of the engine's bare speed is served? Real backbones, saturated, clients beside them.

The served rows/s of one block over those of a bare loop of forwards at the batch size that was
served and with the same number of threads. Each served round stands between two rounds of the bare
loop, whose process waits meanwhile, so that a machine that gets slower or faster cancels out.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks import clusters, load, report
from cluster.demo import default_bundle
from datamix import wire
from datamix.bundle import (
    ArchitectureSpec,
    ImagePreprocessing,
    Manifest,
    read_manifest,
    save_bundle,
)
from deployments.cores import let_threads_sleep

RESNET18 = "resnet18"


@dataclass(frozen=True, slots=True)
class Load:
    """How one backbone is loaded.

    Attributes:
        bundle: its folder.
        streams: WebSockets open.
        depth: messages under way on each.
        max_batch_rows: rows per batch at most.
        seconds: of each served round; a bare one takes half of it.
    """

    bundle: str
    streams: int
    depth: int
    max_batch_rows: int
    seconds: float


def save_resnet18(folder: str | Path, image_size: int) -> str:
    """A ResNet-18 of random weights, cut after its first convolution; the path of its bundle."""
    import torch

    from datamix.models import Architecture, build

    torch.manual_seed(0)
    options: dict[str, int | str] = {"image_size": image_size, "cut": 0}
    path = Path(folder) / RESNET18
    save_bundle(
        path,
        build(Architecture(RESNET18, options)).eval(),
        name=f"{RESNET18}-{image_size}",
        version="1",
        mode="mix",
        group_size=4,
        architecture=ArchitectureSpec(name=RESNET18, options=options),
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=(3, image_size, image_size), mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        class_names=tuple(map(str, range(10))),
        tolerance=0.05,
        metrics={},
    )
    return str(path)


# --- the bare loop ----------------------------------------------------------------------------


class Pace(NamedTuple):
    """What a bare loop did: rows per second, and CPU time per row in seconds."""

    rows_per_s: float
    cpu_s_per_row: float


def _bare(pipe: Any, bundle: str, threads: int) -> None:
    """Forwards of block 0, one after the other, whenever it is told (rows, seconds).

    As well prepared as the engine's own: threads that sleep, norms folded, channels last.
    """
    let_threads_sleep()  # before torch is loaded
    import torch

    from datamix.bundle import load_backbone
    from deployments.fuse import prepare

    torch.set_num_threads(threads)
    manifest, blocks = load_backbone(bundle)
    block = prepare(blocks[0], torch.float32, True, "fuse")
    with torch.inference_mode():
        while (asked := pipe.recv()) is not None:
            rows, seconds = asked
            batch = torch.randn(rows, *manifest.blocks[0].input_shape)
            batch = batch.to(memory_format=torch.channels_last)
            for _ in range(3):
                block(batch)
            start_s, cpu_s, count = time.monotonic(), time.process_time(), 0
            while time.monotonic() < start_s + seconds:
                block(batch)
                count += rows
            cpu_s = time.process_time() - cpu_s
            pipe.send(Pace(count / (time.monotonic() - start_s), cpu_s / count))


class Bare:
    """The bare loop in a process of its own, which sleeps while it is not asked."""

    def __init__(self, pipe: Any) -> None:
        """Ask through ``pipe``."""
        self._pipe = pipe

    @classmethod
    @contextlib.contextmanager
    def start(cls, bundle: str, threads: int) -> Iterator[Bare]:
        """Start the process, and end it."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_bare, args=(theirs, bundle, threads), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is noticed here
        try:
            yield cls(ours)
        finally:
            with contextlib.suppress(OSError):
                ours.send(None)
            process.join(10)

    def run(self, rows: int, seconds: float) -> Pace:
        """Run for ``seconds`` with batches of ``rows``."""
        self._pipe.send((rows, seconds))
        found: Pace = self._pipe.recv()
        return found


# --- what is served ---------------------------------------------------------------------------


def stats(url: str) -> dict[str, Any]:
    """The replica's running totals."""
    with urllib.request.urlopen(f"{url}/v2/stats", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def threads_cpu_s(pid: int) -> dict[int, float]:
    """CPU time so far of each thread of a process."""
    return {t.id: t.user_time + t.system_time for t in psutil.Process(pid).threads()}


def engine_cpu_s(before: dict[int, float], after: dict[int, float], threads: int) -> float:
    """CPU time of the engine's threads: those ``threads`` of the replica that worked most."""
    worked = (cpu_s - before.get(thread, 0.0) for thread, cpu_s in after.items())
    return sum(sorted(worked, reverse=True)[:threads])


def left_for_the_engine(client_share: float, threads: int, cores: int) -> float:
    """Which part of its ``threads`` cores the clients left to the server, 0 to 1.

    ``client_share`` is the clients' CPU time over the time that passed: 0.1 is a tenth of a core.
    """
    return min(1.0, (cores - client_share) / threads)


@dataclass(frozen=True, slots=True)
class Served:
    """One served round.

    Attributes:
        rows_per_s: rows answered per second.
        batch_rows: rows per batch, the mean.
        server_us: CPU time per message of all server processes, in microseconds.
        engine_us: of that, the engine's threads'.
        client_share: CPU time of the clients over the time that passed.
    """

    rows_per_s: float
    batch_rows: float
    server_us: float
    engine_us: float
    client_share: float


def serve(url: str, manifest: Manifest, message: bytes, threads: int, plan: Load) -> Served:
    """Saturate a cluster for one round."""
    answer_bytes = 2 * manifest.group_size * math.prod(manifest.blocks[0].output_shape)
    before = stats(url)
    cpu_s = threads_cpu_s(before["pid"])
    found = load.run(
        "stream",
        f"ws{url.removeprefix('http')}/v2/models/{manifest.name}/stream",
        message,
        connections=plan.streams,
        depth=plan.depth,
        warm_s=max(1.0, plan.seconds / 8),
        run_s=plan.seconds,
        mark="ours",
        # The answer of a block may be smaller than the question; an error is smaller still.
        least_share=answer_bytes / len(message),
    )
    after = stats(url)
    engine_s = engine_cpu_s(cpu_s, threads_cpu_s(before["pid"]), threads)
    rows = after["rows"] - before["rows"]
    return Served(
        rows_per_s=found.rate * manifest.group_size,
        batch_rows=rows / (after["batches"] - before["batches"]),
        server_us=found.server_us,
        engine_us=engine_s / rows * manifest.group_size * 1e6,
        client_share=found.client_cpu_s / found.seconds,
    )


def rounds_of(plan: Load, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One backbone at one number of threads: a row of the table per round."""
    manifest = read_manifest(plan.bundle)
    shape = (manifest.group_size, *manifest.blocks[0].input_shape)
    features = np.random.default_rng(1).standard_normal(shape, np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    cores = os.cpu_count() or 1
    rows = []
    with (
        clusters.start(
            "ours",
            bundle=plan.bundle,
            threads=threads,
            max_batch_rows=plan.max_batch_rows,
            max_request_rows=manifest.group_size,
        ) as url,
        Bare.start(plan.bundle, threads) as bare,
    ):
        batch_rows = round(serve(url, manifest, message, threads, plan).batch_rows)  # not counted
        before = bare.run(batch_rows, plan.seconds / 2)
        for _ in range(rounds):
            served = serve(url, manifest, message, threads, plan)
            after = bare.run(batch_rows, plan.seconds / 2)
            ratio = 2 * served.rows_per_s / (before.rows_per_s + after.rows_per_s)
            bare_us = (before.cpu_s_per_row + after.cpu_s_per_row) / 2 * manifest.group_size * 1e6
            left = left_for_the_engine(served.client_share, threads, cores)
            rows.append(
                {
                    "model": manifest.name,
                    "engine threads": threads,
                    "served rows/s": served.rows_per_s,
                    "bare rows/s before": before.rows_per_s,
                    "bare rows/s after": after.rows_per_s,
                    "served / bare": ratio,
                    "served / bare, without clients": ratio / left,
                    "batch rows": served.batch_rows,
                    "bare CPU us per message": bare_us,
                    "engine CPU us per message": served.engine_us,
                    "other server CPU us per message": served.server_us - served.engine_us,
                    "client CPU share": served.client_share,
                }
            )
            before = after
            print(f"{manifest.name}, {threads} threads: {ratio:.3f}", flush=True)
    return rows


def figures(rows: list[dict[str, Any]], model: str, prefix: str = "") -> dict[str, Any]:
    """Medians over the rounds of one model, by number of threads."""
    found = {}
    mine = [row for row in rows if row["model"] == model]
    for threads in sorted({row["engine threads"] for row in mine}):
        for column, suffix in (("", ""), (", without clients", "_without_clients")):
            found[f"{prefix}served_over_bare_{threads}_threads{suffix}"] = statistics.median(
                row[f"served / bare{column}"] for row in mine if row["engine threads"] == threads
            )
    return found


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2, help="messages under way per stream")
    parser.add_argument("--threads", default="1,2", help="of the engine and of the bare loop")
    parser.add_argument("--max-batch-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument(
        "--image-size", type=int, default=32, choices=(32, 224), help="of ResNet-18"
    )
    parser.add_argument("--resnet-batch-rows", type=int, default=16)
    parser.add_argument("--resnet-seconds", type=float, default=20.0)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmx-") as folder:
        demo = Load(
            options.bundle or default_bundle(),
            options.streams,
            options.depth,
            options.max_batch_rows,
            options.seconds,
        )
        resnet = Load(
            save_resnet18(folder, options.image_size),
            streams=16,
            depth=2,
            max_batch_rows=options.resnet_batch_rows,
            seconds=options.resnet_seconds,
        )
        names = [read_manifest(plan.bundle).name for plan in (demo, resnet)]
        for plan in (demo, resnet):
            for threads in map(int, options.threads.split(",")):
                rows += rounds_of(plan, threads, options.rounds)
    report.show(
        "Block 0 at saturation",
        rows,
        [
            "clients, HAProxy, Ray and engine share this machine's cores; served / bare is over "
            "the mean of the bare loop before and after, with the engine's number of threads",
            "without clients: served / bare, divided by min(1, (cores - client CPU share) / "
            "engine threads), the part of the engine's cores that the clients left it; HAProxy, "
            "Ray and the rest of the replica stay charged to serving",
            "engine CPU: of the replica's threads that worked most, as many as the engine has; "
            "they copy rows in and out too; other server CPU is all else that serves; with as many "
            "engine threads as cores, served / bare is about bare CPU over all CPU",
            f"the ResNet-18 has random weights, {options.image_size}x{options.image_size} inputs, "
            "and all but its first convolution in the cloud",
        ],
        options.json,
        **figures(rows, names[0]),
        **figures(rows, names[1], "resnet18_"),
    )


if __name__ == "__main__":
    main()
