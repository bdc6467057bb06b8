"""What helps the processor's engine? Each setting beside the plain one, rounds in turn.

Whole batches through the engine: staged from float16 rows of 4 per request, computed, divided. Ways
that the engine does not offer stand beside those it does: a frozen TorchScript graph, and
``torch.compile``, which needs a C++ compiler where it runs.
"""

from __future__ import annotations

import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks import report
from cluster.demo import default_bundle
from datamix.bundle import load_backbone
from datamix.models import Architecture, block_shapes, build
from deployments.cores import has_bfloat16, usable_cores
from deployments.cpu import CpuEngine
from deployments.engine import Array, Block, Rows

ROWS = 4


@dataclass
class Case:
    """One block, and the batch sizes it is tried at."""

    name: str
    module: torch.nn.Module
    block: Block
    sizes: tuple[int, ...]


@dataclass
class Arm:
    """One setting: its engine, and what was measured."""

    engine: CpuEngine
    ready_s: float
    rows_per_s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def cases(bundle: str) -> list[Case]:
    """The demo's blocks, and ResNet-18 behind its first stage."""
    manifest, modules = load_backbone(bundle)
    found = [
        Case(f"{manifest.name} {index}", module, Block(b.input_shape, b.output_shape), (4, 32, 128))
        for index, (module, b) in enumerate(zip(modules, manifest.blocks, strict=True))
    ]
    torch.manual_seed(0)
    resnet = build(Architecture("resnet18", {})).eval()
    shapes = block_shapes(resnet)[0]
    return [*found, Case("resnet18", resnet.blocks[0], Block(*shapes), (4, 32))]


def _frozen(engine: CpuEngine) -> None:
    traced = torch.jit.trace(engine._modules[0], engine._batch(ROWS, 0))  # type: ignore[no-untyped-call]
    engine._modules[0] = torch.jit.freeze(traced)


def _compiled(engine: CpuEngine) -> None:
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.config.recompile_limit = 64  # beyond it torch falls back without a word
    torch._dynamo.reset()
    engine._modules[0].compile(dynamic=True)


Settings = dict[str, Any]
Change = Callable[[CpuEngine], None] | None


def settings() -> dict[str, tuple[Settings, Change]]:
    """Name -> the engine's settings, and what is done to it besides."""
    plain: Settings = {"optimise": "none", "channels_last": False}
    found: dict[str, tuple[Settings, Change]] = {
        "plain": (plain, None),
        "channels_last": (plain | {"channels_last": True}, None),
        "fuse": (plain | {"optimise": "fuse"}, None),
        "fuse, channels_last (default)": ({}, None),
        "the default, frozen": ({}, _frozen),
    }
    if shutil.which("g++") or shutil.which("clang++"):
        found["fuse, compiled"] = ({"channels_last": False}, _compiled)
    if has_bfloat16():
        found["bfloat16, fuse"] = ({"dtype": "bfloat16", "channels_last": False}, None)
        found["bfloat16, fuse, channels_last"] = ({"dtype": "bfloat16"}, None)
    return found


def make(case: Case, options: Settings, change: Change, threads: int) -> Arm:
    """An engine for one case, run once at every size."""
    start = time.monotonic()
    engine = CpuEngine(
        torch.nn.ModuleList([case.module]),
        [case.block],
        max_batch_rows=max(case.sizes),
        threads=threads,
        **options,
    )
    with torch.inference_mode():
        if change is not None:
            change(engine)
    for size in case.sizes:
        engine.run(0, requests(case, size))
    return Arm(engine, time.monotonic() - start)


def requests(case: Case, rows: int) -> list[Rows]:
    """A batch of ``rows`` rows as devices send them."""
    generator = np.random.default_rng(1)
    values = generator.standard_normal((rows, *case.block.input_shape)).astype(np.float16)
    return [Rows(part, None) for part in np.split(values, rows // ROWS)]


def measure(arm: Arm, batch: list[Rows], rows: int, seconds: float) -> None:
    """One round of one arm."""
    arm.engine.run(0, batch)
    cpu, start, count = time.process_time(), time.perf_counter(), 0
    while (took_s := time.perf_counter() - start) < seconds or not count:
        arm.engine.run(0, batch)
        count += 1
    arm.rows_per_s.append(count * rows / took_s)
    arm.cpu_us.append((time.process_time() - cpu) / (count * rows) * 1e6)


def error(got: list[Array], wanted: list[Array]) -> float:
    """Largest difference, relative to max(1, |value|)."""
    one, other = (np.concatenate(list(part)).astype(np.float64) for part in (got, wanted))
    return float((np.abs(one - other) / np.maximum(1.0, np.abs(other))).max())


def compare(
    case: Case, threads: int, rounds: int, seconds: float, only: set[str]
) -> list[dict[str, Any]]:
    """All arms on one case."""
    arms = {
        name: make(case, options, change, threads)
        for name, (options, change) in settings().items()
        if not only or name in only or name == "plain"
    }
    found = []
    for size in case.sizes:
        batch = requests(case, size)
        wide = [Rows(rows.features.astype(np.float32), None) for rows in batch]  # exact outputs
        for arm in arms.values():
            arm.rows_per_s.clear()
            arm.cpu_us.clear()
        for _ in range(rounds):
            for arm in arms.values():
                measure(arm, batch, size, seconds)
        plain = statistics.median(arms["plain"].rows_per_s)
        expected = list(arms["plain"].engine.run(0, wide))
        for name, arm in arms.items():
            rows_per_s = statistics.median(arm.rows_per_s)
            found.append(
                {
                    "block": case.name,
                    "batch rows": size,
                    "setting": name,
                    "rows/s": rows_per_s,
                    "over plain": rows_per_s / plain,
                    "CPU us per row": statistics.median(arm.cpu_us),
                    "error": error(list(arm.engine.run(0, wide)), expected),
                    "ready after s": arm.ready_s,
                }
            )
    return found


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per arm and round")
    parser.add_argument("--only", action="append", default=[], help="a setting; may be repeated")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit")
    rows: list[dict[str, Any]] = []
    for case in cases(options.bundle or default_bundle()):
        rows += compare(case, options.threads, options.rounds, options.seconds, set(options.only))
        print(f"{case.name} done", flush=True)
    default = [row["over plain"] for row in rows if "(default)" in row["setting"]]
    report.show(
        f"the processor's engine, {options.threads} threads",
        rows,
        [
            f"medians of {options.rounds} rounds of {options.seconds:g} s, arms in turn",
            "error: largest difference from plain, relative to max(1, |value|)",
            "ready after: from the module to an engine that ran every batch size once",
        ],
        options.json,
        default_over_plain=statistics.geometric_mean(default) if default else float("nan"),
    )


if __name__ == "__main__":
    main()
