"""Whether an engine may serve: it computes what the bundle's canaries say, and fast enough."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from datamix.errors import BundleError, ConfigError
from deployments.engine import ROUNDING, Engine, Rows

_RUNS = 3  # of each batch; the fastest counts, as anything may slow one down
_ALWAYS_FAST_S = 0.005  # per batch: whoever is faster is never too slow


def check_canaries(engine: Engine, bundle: str) -> None:
    """Run a bundle's canaries, each row by itself, as it would come off the wire.

    An output may differ by the bundle's tolerance, or by the rounding of the engine's dtype where
    that is more. A bundle without canaries passes.

    Raises:
        BundleError: an output differs by more, or the canaries cannot be read.
    """
    from datamix.bundle import load_canaries, read_manifest

    canaries = load_canaries(bundle)
    dtype = engine.name.rpartition(":")[2]
    bound = max(read_manifest(bundle).tolerance, ROUNDING.get(dtype, 0.0))
    for block, (inputs, outputs) in enumerate(canaries):
        for row, expected in zip(inputs, outputs, strict=True):
            (found,) = engine.run(block, [Rows(row[None], None)])
            error = float(np.max(np.abs(found[0] - expected) / np.maximum(1.0, np.abs(expected))))
            if not error <= bound:  # NaN is no answer either
                raise BundleError(
                    f"block {block} fails its canaries: outputs differ by {error:.3g}, expected "
                    f"at most {bound:.3g}"
                )


def batch_s(
    engine: Engine, rows: int, clock: Callable[[], float] = time.perf_counter, runs: int = _RUNS
) -> float:
    """Seconds that batches of so many rows take, one for every block; the fastest of ``runs``."""

    def once(block: int, batch: Rows) -> float:
        start = clock()
        engine.run(block, [batch])
        return clock() - start

    total_s = 0.0
    for block, (shape, *_) in enumerate(engine.blocks):
        batch = Rows(np.zeros((rows, *shape), np.float32), None)
        total_s += min(once(block, batch) for _ in range(runs))
    return total_s


def check_speed(found_s: float, limit_s: float | None) -> None:
    """Refuse an engine whose full batches take more than ``canary_batch_s``.

    Raises:
        ConfigError: they do.
    """
    if limit_s is not None and found_s > limit_s:
        raise ConfigError(
            f"full batches of all blocks take {found_s:.3g} s, expected at most "
            f"canary_batch_s ({limit_s:g})"
        )


def check_slowdown(found_s: float, current_s: float, version: str, slowdown: float) -> None:
    """Refuse a version much slower than the one it is to replace.

    Args:
        found_s: seconds of full batches of all blocks.
        current_s: the same of the current version.
        version: which that is.
        slowdown: how many times as long they may take.

    Raises:
        ConfigError: they take longer.
    """
    if found_s > slowdown * max(current_s, _ALWAYS_FAST_S):
        raise ConfigError(
            f"full batches of all blocks take {found_s:.3g} s, and {current_s:.3g} s with the "
            f"current version {version!r}, expected at most {slowdown:g} times as long "
            "(canary_slowdown)"
        )
