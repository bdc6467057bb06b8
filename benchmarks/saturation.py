"""How much of the engine's bare speed is served? Real backbone, saturated, clients on this machine.

The served rows/s of one block over those of a bare loop of forwards at the batch size that was
served and with the same number of threads, in a process of its own, in turn with the server.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import urllib.request
from typing import Any

import numpy as np

from benchmarks import clusters, load, report
from cluster.demo import default_bundle
from datamix import wire
from datamix.bundle import read_manifest


def _bare(results: Any, bundle: str, rows: int, threads: int, seconds: float) -> None:
    """Forwards of block 0 on ``rows`` rows, one after the other; rows per second."""
    import torch

    from datamix.bundle import load_backbone

    torch.set_num_threads(threads)
    manifest, blocks = load_backbone(bundle)
    batch = torch.randn(rows, *manifest.blocks[0].input_shape)
    with torch.inference_mode():
        for _ in range(10):
            blocks[0](batch)
        start, count = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            blocks[0](batch)
            count += 1
        results.put(count * rows / (time.monotonic() - start))


def bare_rows_per_s(bundle: str, rows: int, threads: int, seconds: float) -> float:
    """Run the bare loop in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(
        target=_bare, args=(results, bundle, rows, threads, seconds), daemon=True
    )
    process.start()
    found: float = results.get(timeout=seconds + 60)
    process.join()
    return found


def stats(url: str) -> dict[str, Any]:
    """The replica's running totals."""
    with urllib.request.urlopen(f"{url}/v2/stats", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
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
    options = parser.parse_args()
    bundle = options.bundle or default_bundle()
    manifest = read_manifest(bundle)
    shape = manifest.blocks[0].input_shape
    features = np.random.default_rng(1).standard_normal((manifest.group_size, *shape), np.float32)
    message = wire.encode_request(features, request_id="0" * 16)
    rows: list[dict[str, Any]] = []
    for threads in (int(number) for number in options.threads.split(",")):
        with clusters.start(
            "ours",
            bundle=bundle,
            threads=threads,
            max_batch_rows=options.max_batch_rows,
            max_request_rows=manifest.group_size,
        ) as url:
            stream = f"ws{url.removeprefix('http')}/v2/models/{manifest.name}/stream"
            for _ in range(options.rounds):
                before = stats(url)
                # The answer of a block may be smaller than the question.
                found = load.run(
                    "stream",
                    stream,
                    message,
                    connections=options.streams,
                    depth=options.depth,
                    run_s=options.seconds,
                    mark="ours",
                    least_share=0.2,
                )
                after = stats(url)
                batches = after["batches"] - before["batches"]
                mean = round((after["rows"] - before["rows"]) / batches)
                bare = bare_rows_per_s(bundle, mean, threads, options.seconds / 2)
                served = found.rate * manifest.group_size
                rows.append(
                    {
                        "engine threads": threads,
                        "served rows/s": served,
                        "mean batch rows": float(mean),
                        "bare loop rows/s": bare,
                        "served / bare": served / bare,
                        "server CPU us per message": found.server_us,
                        "client CPU share": found.client_cpu_s / found.seconds,
                    }
                )
    medians = {
        f"served_over_bare_{threads}_threads": statistics.median(
            row["served / bare"] for row in rows if row["engine threads"] == threads
        )
        for threads in sorted({row["engine threads"] for row in rows})
    }
    report.show(
        f"{manifest.name}: block 0 at saturation",
        rows,
        [
            "clients, HAProxy, Ray and engine share this machine's cores; the bare loop runs "
            "alone after the served run, with the engine's number of threads",
            "with as many engine threads as cores, everything else takes time from the engine",
        ],
        options.json,
        **medians,
    )


if __name__ == "__main__":
    main()
