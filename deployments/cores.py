"""How many cores this process may use, what they can do, and how its threads wait."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path


def let_threads_sleep(environ: MutableMapping[str, str] | None = None) -> bool:
    """Let threads that wait for others sleep rather than spin; whether that comes in time.

    The threads of a forward meet after every layer. By default they spin until the last one comes,
    which takes the core from it where it shares that with anybody: an event loop, a proxy, another
    replica. A forward of 2 threads on 2 busy cores then takes up to 50 times as long
    (`benchmarks/threads.py`). The OpenMP library reads its environment when torch is loaded, so
    this is to be called before; what is set already stays.
    """
    environ = os.environ if environ is None else environ
    if "GOMP_SPINCOUNT" not in environ:
        environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return "torch" not in sys.modules


def usable_cores(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> int:
    """Cores for one forward: the least of affinity, cgroup quota and ``OMP_NUM_THREADS``.

    A container's quota hides from torch, which would start a thread for every core of the host and
    wait for the slowest. ``OMP_NUM_THREADS`` is how Ray tells an actor how many CPUs it has.
    The event loop gets no core of its own: it needs a small part of one, and the engine can use
    what is left.

    Args:
        environ: the environment; None for this process's.
        root: where ``proc`` and ``sys`` are.
    """
    linux = hasattr(os, "sched_getaffinity")
    found = [float(len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1), *_quotas(root)]
    asked = (os.environ if environ is None else environ).get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked):
        found.append(float(asked))
    return max(1, math.floor(min(found)))


def _quotas(root: Path) -> list[float]:
    """Cores that this process's control group and those around it allow (cgroup v2, then v1)."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if kinds and "cpu" not in kinds.split(","):
            continue
        if kinds:
            base /= "cpu"
        folder = base / path.lstrip("/")
        # In a container the path may be the host's: then only the root of the tree is there.
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            if kinds:
                numbers = [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                numbers = _read(group / "cpu.max").split()
            if len(numbers) == 2 and all(number.strip().isdecimal() for number in numbers):
                found.append(int(numbers[0]) / int(numbers[1]))
    return [cores for cores in found if cores > 0]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def has_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether the processor multiplies bfloat16 itself: AVX-512 BF16, AMX or Arm's BF16.

    Others take longer for it than for float32.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``; None to read it. Where there is none, nothing is known.
    """
    text = _read(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    for line in text.splitlines():
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words.split())
    return False
