"""What the record of a run costs its generator, and what reading it back takes.

    python -m benchmarks.recording [--json FILE]

A shard's rows end as they do in a run, and its stream looks four times a second; what a look takes
is processor time beside the event loop, and the longest look is how long the loop can be kept from
the interpreter at worst. Then the run's end: Parquet, and a summary of it all.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import report
from edge.fleet import result
from edge.fleet.config import FleetConfig
from edge.fleet.counters import Counters
from edge.fleet.report import Run, summarise
from edge.fleet.store import PERIOD_S, RowStream, read_rows, stream_name, write_rows

_RATES = (100, 1_000, 10_000)
_LOOKS = 40
_WHOLE_ROWS = 1_000_000


def ended(count: int, rate: float, seed: int = 0) -> result.Table:
    """Rows of inferences that were answered 5 to 50 ms after they were due."""
    generator = np.random.default_rng(seed)
    table = np.zeros(count, result.COLUMNS)
    table["index"] = np.arange(count)
    table["device"] = generator.integers(0, 1000, count)
    table["scheduled_s"] = np.arange(count) / rate
    table["sent_s"] = table["scheduled_s"] + 0.001
    table["done_s"] = table["scheduled_s"] + 0.005 + generator.exponential(0.01, count)
    for column in ("queue_s", "compute_s", "mix_s", "demix_s", "lag_s"):
        table[column] = generator.exponential(0.001, count)
    table["status"], table["rounds"], table["rows"] = result.OK, 1, 4
    return table


def looks(folder: Path, rate: int) -> dict[str, object]:
    """Let a shard's rows end at ``rate`` per second and look at them."""
    per_look = int(rate * PERIOD_S)
    table = ended(per_look * _LOOKS, rate)
    begun = 0
    stream = RowStream(folder, rate, lambda: table, lambda: begun, dict)
    took_s, cpu_s = [], time.process_time()
    for number in range(1, _LOOKS + 1):
        begun = number * per_look
        started_s = time.perf_counter()
        stream.look()
        took_s.append(time.perf_counter() - started_s)
    cpu_s = time.process_time() - cpu_s
    stream.close()
    return {
        "inferences/s": rate,
        "CPU us per inference": 1e6 * cpu_s / len(table),
        "look ms": 1e3 * median(took_s),
        "longest look ms": 1e3 * max(took_s[1:]),
        "bytes per inference": (folder / stream_name(rate)).stat().st_size / len(table),
    }


def whole(folder: Path) -> dict[str, Any]:
    """Write, read and fold a run of a million inferences; seconds."""
    rate = 1000.0
    table = ended(_WHOLE_ROWS, rate)
    window_s = _WHOLE_ROWS / rate
    started_s = time.perf_counter()
    write_rows(folder, table)
    written_s = time.perf_counter()
    found = read_rows(folder)
    read_s = time.perf_counter()
    config = FleetConfig("http://cloud", workload="echo", rate=rate, duration_s=window_s)
    run = Run(
        config=config,
        model="echo",
        mode="echo",
        rounds=1,
        group_size=4,
        table=found,
        answered=np.zeros((int(window_s), 2), np.int64),
        counters=dict.fromkeys(Counters.__slots__, 0),
        cpu_s=[1.0],
        busy_ratios=[0.1],
        window_s=window_s,
        elapsed_s=window_s,
        interrupted=False,
        start_s=0.0,
        samples=[],
    )
    summarise(run)
    folded_s = time.perf_counter()
    return {
        "parquet_write_s": written_s - started_s,
        "parquet_read_s": read_s - written_s,
        "summarise_s": folded_s - read_s,
        "parquet_bytes_per_inference": (folder / "results.parquet").stat().st_size / len(table),
    }


def main() -> None:
    options = report.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        looks(Path(folder), 10)  # what is imported and allocated once
        rows = [looks(Path(folder), rate) for rate in _RATES]
        figures = whole(Path(folder))
    thousand = next(row for row in rows if row["inferences/s"] == 1_000)
    report.show(
        "What the record of a run costs its generator",
        rows,
        [
            f"the run that is written, read and folded whole has {_WHOLE_ROWS:,} inferences",
            "a look happens four times a second, in a thread beside the event loop",
        ],
        options.json,
        record_cpu_us_per_inference=float(str(thousand["CPU us per inference"])),
        longest_look_ms=max(float(str(row["longest look ms"])) for row in rows),
        **figures,
    )


if __name__ == "__main__":
    main()
