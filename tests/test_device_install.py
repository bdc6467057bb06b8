"""A device's installation in a clean virtual environment: what is there, and that it infers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.device_install import IMPORT, TARGET_BYTES, TARGET_S, Environment, error, replica
from edge import slim
from edge.client import ClientConfig, SyncClient
from edge.export import export
from edge.runtime import TorchDevice
from tests.exported import write_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("device"))


def installed(device: Environment) -> dict[str, int]:
    """Sizes of all but the bytecode that Python goes on writing as it imports more."""
    return {**device.sizes(), "bytecode": 0}


@pytest.mark.timeout(300)  # pip downloads some 50 MB where they are not cached
def test_a_device_infers_without_torch_ray_and_pyarrow(device: Environment, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    export(tmp_path / "bundle", tmp_path / "device")
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 28, 28), dtype=np.uint8)
    with replica(tmp_path / "bundle") as url:
        exact = ClientConfig(wire_dtype="float32")
        with SyncClient(url, TorchDevice(tmp_path / "bundle"), config=exact) as client:
            expected = client.infer(images)
        assert error(device.infer(url, tmp_path / "device", images, tmp_path), expected) < 1e-4
        plain = device.sizes()  # which raises where torch, Ray, pyarrow or a command line is there
        assert plain.keys() >= {"datamix-cluster", "numpy", "onnxruntime", "picows", "pydantic"}
        assert "cryptography" not in plain  # the mode split's
        assert sum(plain.values()) < TARGET_BYTES
        # Something that is needed is put back, and all is as it was.
        code = (
            "from edge import slim; slim.UNUSED = {'numpy': ('linalg',), 'onnxruntime': ('tools',)}"
            "\ntry: slim.slim(None)\nexcept slim.ConfigError as error: print(error)"
        )
        assert "the SDK does not work without them, all is as before" in device.run("-c", code)
        assert installed(device) == {**plain, "bytecode": 0}
        removed = device.run("-m", "edge.slim", "--bundle", tmp_path / "device")
        assert float(removed.split()[1]) > 10
        assert error(device.infer(url, tmp_path / "device", images, tmp_path), expected) < 1e-4
    assert sum(installed(device).values()) < sum(plain.values()) - 10_000_000


@pytest.mark.timeout(300)
def test_a_device_starts_within_a_second_of_processor_time(device: Environment) -> None:
    # Of the processor: a machine that does other things as well proves nothing about this one.
    code = f"import time; t = time.process_time(); {IMPORT}; print(time.process_time() - t)"
    assert min(float(device.run("-c", code)) for _ in range(5)) < TARGET_S


@pytest.mark.timeout(300)
def test_without_a_command_line_datamix_says_so(device: Environment) -> None:
    command = device.python.with_name("datamix")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("install datamix-cluster[cli]\n")
    assert done.stderr.count("\n") == 1


def test_only_a_devices_environment_is_slimmed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge.slim"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == "edge.slim: torch is installed here, expected a device's environment\n"


def test_what_is_unused_is_found_once(tmp_path: Path) -> None:
    kept = ["numpy/core.py", "onnxruntime/capi/state.so", "other/tests/test_x.py"]
    gone = ["numpy/tests/test_a.py", "numpy/lib/tests/data/tests/x.pyi", "numpy/a.pyi"]
    for name in [*kept, *gone]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [str(path.relative_to(tmp_path)) for path in slim.unused(tmp_path)]
    assert found == ["numpy/a.pyi", "numpy/lib/tests", "numpy/tests"]
