"""`datamix profile-engine`: measure what an engine's batches cost, and fit a line to it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamix.errors import ConfigError
from deployments.config import Config
from deployments.cores import usable_cores
from deployments.engine import Engine, Rows, Shape
from deployments.profile import BlockProfile, Measured, Profile


def profile(
    config: Config, *, rounds: int = 7, name: str | None = None, machine: str | None = None
) -> Profile:
    """Measure the engine of these settings, which name a bundle, on this machine.

    Args:
        config: the settings; the largest batch is ``max_batch_rows``.
        rounds: how often each batch size is measured.
        name: of the profile; None for the bundle's name and the device.
        machine: what it was measured on; None to look.

    Raises:
        BundleError: the bundle cannot be read or trusted.
        ConfigError: the device or dtype cannot be had, or the name is not one.
    """
    from pydantic import ValidationError

    from datamix.bundle import read_manifest
    from deployments.model import build_engine

    (bundle,) = config.bundles
    manifest = read_manifest(bundle)
    entry, engine = build_engine(config, bundle)
    blocks = measure(engine, config.max_batch_rows, request_rows=manifest.group_size, rounds=rounds)
    try:
        return Profile(
            schema_version=1,
            name=name or f"{entry.name}-{config.device.replace(':', '')}"[:64],
            machine=machine if machine is not None else _machine(config),
            engine=engine.name,
            max_batch_rows=config.max_batch_rows,
            depth=2 if engine.depth == 2 else 1,
            blocks=tuple(blocks),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"profile: {first['loc'][0]}: {first['msg']}") from None


def table(found: Profile) -> str:
    """A profile as lines for people."""
    lines = [f"{found.engine} on {found.machine}, batches of up to {found.max_batch_rows} rows"]
    for index, block in enumerate(found.blocks):
        line = f"block {index}: {block.a_s * 1e3:.3g} ms + {block.b_s * 1e6:.3g} us per row"
        if found.depth > 1:
            line += (
                f", after a copy of {block.copy_a_s * 1e3:.3g} ms + "
                f"{block.copy_b_s * 1e6:.3g} us per row"
            )
        lines.append(f"{line}; off by at most {block.fit_error or 0:.0%}")
        for sample in block.measured:
            fitted = block.a_s + block.b_s * sample.rows
            lines.append(
                f"  {sample.rows:5} rows: {sample.compute_s * 1e3:8.3f} ms, "
                f"fitted {fitted * 1e3:8.3f} ms"
            )
    return "\n".join(lines)


def _machine(config: Config) -> str:
    """The processor or GPU, in words."""
    if config.device != "cpu":
        import torch

        return torch.cuda.get_device_name(config.device)
    names = [
        line.partition(":")[2].strip()
        for line in _cpuinfo().splitlines()
        if line.startswith("model name")
    ]
    threads = config.threads or usable_cores()
    cores = os.cpu_count()
    return f"{threads} threads of {cores} cores, {names[0] if names else 'unknown processor'}"[:256]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


class Line(NamedTuple):
    """``a_s + b_s * rows``, and its largest distance from what it was fitted to, relative."""

    a_s: float
    b_s: float
    error: float


def fit(samples: Sequence[tuple[int, float]]) -> Line:
    """The line nearest to (rows, seconds), both of its numbers at least 0.

    Least squares of the relative error: a batch of one row counts as much as a full one.
    """
    rows = np.array([sample[0] for sample in samples], np.float64)
    seconds = np.array([sample[1] for sample in samples], np.float64)
    if not seconds.any():
        return Line(0.0, 0.0, 0.0)
    weights = 1 / np.maximum(seconds, 1e-9)
    columns = np.stack([np.ones_like(rows), rows], axis=1) * weights[:, None]
    wanted = seconds * weights
    # The best line, or where that has a negative number the better of those with a 0.
    candidates = [np.linalg.lstsq(columns, wanted, rcond=None)[0]]
    for edge in (0, 1):
        column = columns[:, edge]
        value = (column @ wanted) / (column @ column)
        candidates.append(np.array([value, 0.0] if edge == 0 else [0.0, value]))
    allowed = [line for line in candidates if (line >= 0).all()]
    best = min(allowed, key=lambda line: float(((columns @ line - wanted) ** 2).sum()))
    return Line(float(best[0]), float(best[1]), float(np.abs(columns @ best - wanted).max()))


def sizes(most: int) -> list[int]:
    """Batch sizes to measure: powers of two, and the largest."""
    found = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*found, most]


def measure(
    engine: Engine,
    max_batch_rows: int,
    *,
    request_rows: int = 4,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> list[BlockProfile]:
    """Run every block at every size, ``rounds`` times in turn, and fit a line to the medians.

    Args:
        engine: what to measure; nothing else may use it meanwhile.
        max_batch_rows: the largest batch.
        request_rows: rows of a request at most, as devices send them.
        rounds: how often.
        clock: seconds.
    """
    found = []
    for index, block in enumerate(engine.blocks):
        batches = {
            rows: _batch(block.input_shape, rows, request_rows) for rows in sizes(max_batch_rows)
        }
        times: dict[int, list[tuple[float, float]]] = {rows: [] for rows in batches}
        for number in range(rounds + 1):
            for rows, batch in batches.items():
                spent = _time(engine, index, batch, clock)
                if number:  # the first round warms up
                    times[rows].append(spent)
        measured = [
            Measured(
                rows=rows,
                compute_s=statistics.median(compute_s for compute_s, _ in spent),
                copy_s=statistics.median(copy_s for _, copy_s in spent),
            )
            for rows, spent in times.items()
        ]
        compute = fit([(sample.rows, sample.compute_s) for sample in measured])
        copy = fit([(sample.rows, sample.copy_s) for sample in measured])
        found.append(
            BlockProfile(
                a_s=compute.a_s,
                b_s=compute.b_s,
                copy_a_s=copy.a_s,
                copy_b_s=copy.b_s,
                fit_error=compute.error,
                measured=tuple(measured),
            )
        )
    return found


def _batch(shape: Shape, rows: int, request_rows: int) -> list[Rows]:
    values = np.random.default_rng(rows).standard_normal((rows, *shape)).astype(np.float16)
    return [Rows(part, None) for part in np.split(values, range(request_rows, rows, request_rows))]


def _time(
    engine: Engine, block: int, batch: list[Rows], clock: Callable[[], float]
) -> tuple[float, float]:
    """Computation and copy of one batch, in seconds; the latter is what overlap can hide."""
    start = clock()
    pending = engine.start(block, batch)
    staged = clock()
    pending.wait()
    end = clock()
    if engine.depth == 1:
        return end - start, 0.0
    copy_s = staged - start + pending.copy_s
    return max(0.0, end - start - copy_s), copy_s
