"""How much of a GPU's bare speed does the batcher serve, and what does an inference cost in joules?

In process: batcher and CUDA engine, saturated with requests of 4 float16 rows, beside a bare loop
of forwards on the largest batch, in the same dtype and memory format, whose input never leaves the
GPU. Utilisation and power come from ``nvidia-smi``, sampled while an arm runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import report
from benchmarks.engine import Case, cases
from benchmarks.inprocess import ROWS, Run
from cluster.demo import default_bundle
from datamix.models import Architecture, block_shapes, build
from deployments.cuda import CudaEngine
from deployments.engine import Block
from deployments.fuse import prepare
from deployments.gpu import CudaGpu


def all_cases(bundle: str) -> dict[str, Case]:
    """The blocks by name: the demo's, and ResNet-18's for small and large pictures."""
    torch.manual_seed(0)
    model = build(Architecture("resnet18", {"image_size": 224})).eval()
    large = Case("resnet18-224", model.blocks[0], Block(*block_shapes(model)[0]), ())
    return {case.name: case for case in [*cases(bundle), large]}


@contextlib.contextmanager
def watched(index: int) -> Iterator[dict[str, float]]:
    """What ``nvidia-smi`` says meanwhile: mean utilisation (0 to 1) and power (watts)."""
    found = {"utilisation": math.nan, "watts": math.nan}
    watcher = subprocess.Popen(
        [
            "nvidia-smi",
            f"--id={index}",
            "--query-gpu=utilization.gpu,power.draw",
            "--format=csv,noheader,nounits",
            "--loop-ms=100",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield found
    finally:
        watcher.terminate()
        lines, _ = watcher.communicate()
    samples = []
    for line in lines.splitlines()[1:]:  # the first is from before
        with contextlib.suppress(ValueError):  # a line cut off, or a figure it does not have
            utilisation, power = (float(part) for part in line.split(","))
            samples.append((utilisation / 100, power))
    if samples:
        found["utilisation"] = statistics.mean(sample[0] for sample in samples)
        found["watts"] = statistics.mean(sample[1] for sample in samples)


def bare(case: Case, device: str, dtype: str, rows: int, seconds: float) -> float:
    """Forwards one after the other on one batch that stays on the GPU; rows per second."""
    kind = getattr(torch, dtype)
    module = prepare(case.module, kind, True, "fuse").to(device)
    batch = torch.randn(rows, *case.block.input_shape, dtype=kind, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(20):
            module(batch)
        torch.cuda.synchronize(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(10):
                module(batch)
            count += 10
            torch.cuda.synchronize(device)
    return count * rows / (time.perf_counter() - start)


async def _served(engine: CudaEngine, rows: int, seconds: float) -> tuple[float, float]:
    """Rows per second and mean batch rows of a saturated batcher."""
    run = Run(engine, rows)
    before = run.batcher.statistics.batches, run.batcher.statistics.rows
    found = await run.saturate(seconds, 6 * rows // ROWS)
    batches = run.batcher.statistics.batches - before[0]
    mean = (run.batcher.statistics.rows - before[1]) / batches
    await run.batcher.drain(60)
    return found, mean


def engine(case: Case, device: str, dtype: str, rows: int, *, graphs: bool, depth: int) -> Any:
    """The engine of one arm, ready."""
    made = CudaEngine(
        torch.nn.ModuleList([case.module]),
        [case.block],
        CudaGpu(device),
        max_batch_rows=rows,
        dtype=dtype,
        graphs=graphs,
    )
    made.depth = depth  # with 1 the batcher waits for each batch before it starts the next
    return made


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--block", action="append", default=[], help="may be repeated")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="float32, float16 or bfloat16")
    parser.add_argument("--max-batch-rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="per arm and round")
    options = parser.parse_args()
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        sys.exit("benchmarks.gpu: found no CUDA device with nvidia-smi here, expected one")
    known = all_cases(options.bundle or default_bundle())
    names = options.block or ["fashion-mnist-mix 0", "resnet18"]
    index = int(options.device.partition(":")[2] or 0)
    rows, dtype, seconds = options.max_batch_rows, options.dtype, options.seconds
    table: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for name in names:
        case = known[name]
        arms = {
            "served": engine(case, options.device, dtype, rows, graphs=True, depth=2),
            "served, no graphs": engine(case, options.device, dtype, rows, graphs=False, depth=2),
            "served, one batch at a time": engine(
                case, options.device, dtype, rows, graphs=True, depth=1
            ),
        }
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            with watched(index) as seen:
                rate = bare(case, options.device, dtype, rows, seconds)
            found.setdefault("bare loop", []).append({"rows/s": rate, "batch": rows, **seen})
            for arm, runner in arms.items():
                with watched(index) as seen:
                    rate, mean = asyncio.run(_served(runner, rows, seconds))
                found.setdefault(arm, []).append({"rows/s": rate, "batch": mean, **seen})
        medians = {
            arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for arm, runs in found.items()
        }
        for arm, median in medians.items():
            table.append(
                {
                    "block": name,
                    "arm": arm,
                    "rows/s": median["rows/s"],
                    "over bare": median["rows/s"] / medians["bare loop"]["rows/s"],
                    "mean batch rows": median["batch"],
                    "utilisation": median["utilisation"],
                    "watts": median["watts"],
                    "J per 1,000 rows": 1000 * median["watts"] / median["rows/s"],
                }
            )
            figures[f"{name}, {arm}: over bare"] = table[-1]["over bare"]
    report.show(
        f"{torch.cuda.get_device_name(options.device)}, {dtype}, batches of at most {rows} rows",
        table,
        [
            f"medians of {options.rounds} rounds of {seconds:g} s, arms in turn",
            "the bare loop copies nothing: its input stays on the GPU, its output is thrown away",
            "utilisation means that a kernel ran; energy is the whole GPU's, idle power included",
        ],
        options.json,
        **figures,
    )


if __name__ == "__main__":
    main()
