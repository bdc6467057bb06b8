"""Cores by affinity, quota and environment, on trees of files that stand for a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.cores import has_bfloat16, let_threads_sleep, usable_cores

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 32),
        # Version 2: a container sees its own group as the root of the tree.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 32),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        # A group around it may allow less.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "600000 100000\n",
            },
            6,
        ),
        # The path of the host, which the container does not see.
        ({"proc/self/cgroup": "0::/kube/x\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        # Version 1.
        (
            {
                "proc/self/cgroup": "9:memory:/m\n4:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            32,
        ),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert usable_cores({}, machine(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("value", "cores"), [("1", 1), ("7", 7), ("64", 32), ("4,2", 4), ("", 32), ("0", 32), ("x", 32)]
)
def test_the_environment_has_a_say(tmp_path: Path, value: str, cores: int) -> None:
    assert usable_cores({"OMP_NUM_THREADS": value}, tmp_path) == cores


def test_this_machine_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f avx512bw avx2\n", False),
        ("model name\t: avx512_bf16\nflags\t\t: fpu\n", False),
        ("", False),
    ],
)
def test_bfloat16(cpuinfo: str, has: bool) -> None:
    assert has_bfloat16(cpuinfo) == has


def test_what_is_set_for_waiting_threads_stays() -> None:
    for given in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        environ = dict(given)
        let_threads_sleep(environ)
        assert environ == given
    environ = {}
    let_threads_sleep(environ)
    assert environ == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_torch_hears_of_it_where_it_is_loaded_afterwards() -> None:
    """And the replica's module loads no torch by itself, so that it can be in time."""
    code = (
        "import deployments.backbone\n"
        "from deployments.cores import let_threads_sleep\n"
        "assert let_threads_sleep()\n"
        "import torch\n"
        "assert not let_threads_sleep()\n"
    )
    environ = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environ, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" in done.stderr:  # another OpenMP library says other things
        assert "GOMP_SPINCOUNT = '0'" in done.stderr
