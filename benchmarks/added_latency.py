"""How much later is an answer than the bare forward, when nobody else asks?

One stream with one request at a time through HAProxy, to a null engine and to block 0 of a bundle;
and forwards of the same block on as many rows, one after the other, in a process of its own with
the engine's number of threads. In turn, each round's difference to the bare forward of that round.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import clusters, report
from benchmarks.saturation import stats
from benchmarks.transports_clients import Endpoint, load
from cluster.demo import default_bundle
from datamix import wire
from datamix.bundle import read_manifest


@dataclass(frozen=True, slots=True)
class Times:
    """One path in one round.

    Attributes:
        p50_s: median time from question to answer, in seconds.
        p99_s: 99th percentile.
        engine_s: of that, the engine's, by its own clock; the mean.
        bare_s: the bare forward's median in the same round.
    """

    p50_s: float
    p99_s: float
    engine_s: float
    bare_s: float


def _forwards(results: Any, bundle: str, rows: int, threads: int, seconds: float) -> None:
    """How long each forward of block 0 takes, for ``seconds``."""
    import torch

    from datamix.bundle import load_backbone

    torch.set_num_threads(threads)
    manifest, blocks = load_backbone(bundle)
    batch = torch.randn(rows, *manifest.blocks[0].input_shape)
    taken_s = array("d")
    with torch.inference_mode():
        for _ in range(50):
            blocks[0](batch)
        end_s = time.monotonic() + seconds
        while (start_s := time.monotonic()) < end_s:
            blocks[0](batch)
            taken_s.append(time.monotonic() - start_s)
    results.put(taken_s)


def bare(bundle: str, rows: int, threads: int, seconds: float) -> Times:
    """Time the forwards in a process of their own."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(
        target=_forwards, args=(results, bundle, rows, threads, seconds), daemon=True
    )
    process.start()
    taken_s = results.get(timeout=seconds + 60)
    process.join()
    middle, tail = np.quantile(taken_s, (0.5, 0.99))
    return Times(float(middle), float(tail), float(np.mean(taken_s)), float(middle))


def stream(url: str, model: str, message: bytes, bare_s: float, seconds: float) -> Times:
    """One request at a time on one stream."""
    before = stats(url)
    run = load(
        Endpoint("websocket", f"ws{url.removeprefix('http')}/v2/models/{model}/stream"),
        message,
        connections=1,
        processes=1,
        warm_s=1.0,
        run_s=seconds,
        mark="ours",
        loaded=before["pid"],
        idle=set(),
        least_share=0.2,  # the answer of a block may be smaller than the question
    )
    after = stats(url)
    busy_s = after["engine_busy_s"] - before["engine_busy_s"]
    return Times(run.p50_s, run.p99_s, busy_s / (after["batches"] - before["batches"]), bare_s)


def row(path: str, runs: list[Times]) -> dict[str, Any]:
    """One row of the table: medians over the rounds, in milliseconds."""

    def median_ms(of: Callable[[Times], float]) -> float:
        return statistics.median(of(run) for run in runs) * 1e3

    return {
        "path": path,
        "p50 ms": median_ms(lambda run: run.p50_s),
        "p99 ms": median_ms(lambda run: run.p99_s),
        "engine, mean ms": median_ms(lambda run: run.engine_s),
        "added p50 ms": median_ms(lambda run: run.p50_s - run.bare_s),
        "added p99 ms": median_ms(lambda run: run.p99_s - run.bare_s),
    }


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--threads", type=int, default=1, help="of the engine and the bare forward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each path and round")
    options = parser.parse_args()
    bundle = options.bundle or default_bundle()
    manifest = read_manifest(bundle)
    rows, shape = manifest.group_size, manifest.blocks[0].input_shape
    features = np.random.default_rng(1).standard_normal((rows, *shape), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    null, block, forward = "stream, null engine", "stream, block 0", "bare forward, block 0"
    runs: dict[str, list[Times]] = {null: [], block: [], forward: []}
    with (
        clusters.start("ours", engine="null", echo_shape=shape) as null_url,
        clusters.start("ours", bundle=bundle, threads=options.threads) as block_url,
    ):
        for number in range(options.rounds):
            found = bare(bundle, rows, options.threads, options.seconds)
            runs[forward].append(found)
            runs[null].append(stream(null_url, "echo", message, 0.0, options.seconds))
            runs[block].append(
                stream(block_url, manifest.name, message, found.p50_s, options.seconds)
            )
            print(f"round {number + 1} of {options.rounds} done", flush=True)
    table = {path: row(path, each) for path, each in runs.items()}
    report.show(
        f"{manifest.name}: {rows} rows, {len(message) / 1000:.1f} kB, one request at a time",
        list(table.values()),
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s, "
            f"{options.threads} engine threads",
            "added is what lies above the bare forward's median of the same round, above nothing "
            "with the null engine; so the added p99 holds the forward's own spread too",
            "from the send of an encoded message to the receipt of the answer's last byte; "
            "HAProxy, replica and client share this machine's cores",
            "the engine's time, with conversion from and to float16, is in the others",
        ],
        options.json,
        added_p50_ms_null_engine=table[null]["added p50 ms"],
        added_p99_ms_null_engine=table[null]["added p99 ms"],
        added_p50_ms_block=table[block]["added p50 ms"],
        added_p99_ms_block=table[block]["added p99 ms"],
        bare_forward_p99_over_p50_ms=table[forward]["added p99 ms"],
    )


if __name__ == "__main__":
    main()
