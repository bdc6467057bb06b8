"""What does a device install without torch, how large is it, how fast does it start, is it right?

In a clean virtual environment: the wheel of this checkout with its extra `device`, installed with
`--no-compile`, and nothing else. Measured there: one real inference through a replica that runs
here, its outputs compared with those of torch; then bytes by distribution (pip is not among them;
the bytecode that Python has written by then is), and the time of a fresh process for
`import edge.client, edge.onnx_device`. Then `python -m edge.slim` removes what a device never
loads, and all of it is measured again. Beside them: the same installation with the bytecode of
everything, which pip writes without that option; the mode split's extra; stem and head on both
runtimes, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from prometheus_client import CollectorRegistry

from benchmarks import report
from cluster.demo import default_bundle
from deployments.backbone import Backbone
from deployments.config import Config
from deployments.metrics import PrometheusBackend
from deployments.peers import NoPeers
from deployments.store import MemoryStore
from edge.client import ClientConfig, SyncClient
from edge.data import load_sample
from edge.device import open_device
from edge.export import export
from edge.session import Device

ROOT = Path(__file__).parents[1]
TARGET_BYTES, TARGET_S = 150_000_000, 1.0
IMPORT = "import edge.client, edge.onnx_device"
NOISE = "from datamix import noise; noise.gaussians(bytes(32), (2,))"
EXACT = ClientConfig(wire_dtype="float32")

Floats = npt.NDArray[np.float32]

# Run by the device's Python. Each distribution lists what it installed, with bytecode if pip wrote
# it; what Python wrote is listed by none.
_SIZES = """
import json, os, site, sys
from importlib.metadata import distributions
from importlib.util import find_spec
(folder,) = site.getsitepackages()
found, counted = {}, set()
for distribution in distributions(path=[folder]):
    for file in distribution.files or ():
        path = os.path.realpath(distribution.locate_file(file))
        if path.startswith(folder) and os.path.isfile(path):
            counted.add(path)
            name = distribution.metadata["Name"]
            found[name] = found.get(name, 0) + os.path.getsize(path)
for root, _, files in os.walk(folder):
    for file in files:
        path = os.path.join(root, file)
        if path not in counted:
            name = "bytecode" if path.endswith(".pyc") else "listed by none"
            found[name] = found.get(name, 0) + os.path.getsize(path)
present = [m for m in ("torch", "ray", "onnx", "pyarrow", "typer", "pip") if find_spec(m)]
json.dump({"sizes": found, "present": present}, sys.stdout)
"""
# In the order in which they are imported; each pays for what the ones before it have not.
_PARTS = ("asyncio", "numpy", "pydantic", "httpx", "picows", "onnxruntime", "ours")
_IMPORTS = """
import json, sys, time
spent, start = {}, time.perf_counter()
for part in sys.argv[1].split(","):
    exec(sys.argv[2] if part == "ours" else f"import {part}")
    now = time.perf_counter()
    spent[part], start = now - start, now
json.dump(spent, sys.stdout)
"""
_INFER = """
import sys
import numpy as np
from edge.client import ClientConfig, SyncClient
url, bundle, inputs, outputs = sys.argv[1:]
with SyncClient(url, bundle, config=ClientConfig(wire_dtype="float32")) as client:
    np.save(outputs, client.infer(np.load(inputs)))
sys.exit(bool({"torch", "ray"} & set(sys.modules)))
"""


class Environment:
    """A virtual environment with an extra of this checkout and nothing else."""

    def __init__(self, folder: Path, extras: str = "device", *, bytecode: bool = False) -> None:
        """Build the wheel and install it, with the releases of constraints.txt.

        Args:
            folder: for all of it.
            extras: of our distribution.
            bytecode: have pip compile everything, and not Python what it imports.
        """
        folder.mkdir(exist_ok=True)
        self.python = folder / "venv/bin/python"
        run = [sys.executable, "-m"]
        _run([*run, "venv", "--without-pip", folder / "venv"])
        pip = [*run, "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
        _run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT])
        (wheel,) = folder.glob("datamix_cluster-*.whl")
        options = ["--constraint", ROOT / "constraints.txt"]
        options += ["--compile" if bytecode else "--no-compile"]
        _run([*pip, "--python", self.python, "install", *options, f"{wheel}[{extras}]"])

    def run(self, *arguments: Any) -> str:
        """Run the device's Python away from this checkout; its standard output."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return _run([self.python, *arguments], cwd=self.python.parent, env=clean)

    def sizes(self) -> dict[str, int]:
        """Bytes by distribution, the largest first.

        Raises:
            RuntimeError: something is installed that a device must do without.
        """
        found = json.loads(self.run("-c", _SIZES))
        if found["present"]:
            raise RuntimeError(f"{found['present']} are installed, expected none of them")
        return dict(sorted(found["sizes"].items(), key=lambda size: -size[1]))

    def import_s(self, rounds: int) -> float:
        """Median over fresh processes; the first one, which fills the caches, does not count."""
        code = f"import time; t = time.perf_counter(); {IMPORT}; print(time.perf_counter() - t)"
        return statistics.median([float(self.run("-c", code)) for _ in range(rounds + 1)][1:])

    def import_parts_s(self, rounds: int) -> dict[str, float]:
        """Medians of what each library adds, imported one after the other."""
        runs = [
            json.loads(self.run("-c", _IMPORTS, ",".join(_PARTS), IMPORT)) for _ in range(rounds)
        ]
        return {part: statistics.median(run[part] for run in runs) for part in _PARTS}

    def infer(self, url: str, bundle: Path, images: npt.NDArray[np.uint8], folder: Path) -> Floats:
        """One inference by the device's Python, which must not load torch."""
        np.save(folder / "inputs.npy", images)
        self.run("-c", _INFER, url, bundle, folder / "inputs.npy", folder / "outputs.npy")
        outputs: Floats = np.load(folder / "outputs.npy")
        return outputs


def _run(command: list[Any], **options: Any) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{words[:4]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return str(done.stdout)


@contextlib.contextmanager
def replica(bundle: Path) -> Iterator[str]:
    """A real replica on a free port of this machine, in a thread; yields its URL."""
    config = Config(bundle=str(bundle), max_batch_rows=64, max_request_rows=64)
    server: list[uvicorn.Server] = []

    async def serve() -> None:
        metrics = PrometheusBackend(CollectorRegistry())
        backbone = Backbone(config, metrics, MemoryStore(), NoPeers())
        settings = uvicorn.Config(
            backbone.__serve_build_asgi_app__(), port=0, log_config=None, lifespan="on"
        )
        server.append(uvicorn.Server(settings))
        await server[0].serve()
        await backbone.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        while not (server and server[0].started):
            thread.join(0.05)
            if not thread.is_alive():
                raise RuntimeError("the replica ended before it listened")
        yield f"http://127.0.0.1:{server[0].servers[0].sockets[0].getsockname()[1]}"
    finally:
        if server:
            server[0].should_exit = True
        thread.join()


def error(found: Floats, expected: Floats) -> float:
    """Largest difference, relative to ``max(1, |value|)``."""
    return float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())


def stem_and_head_s(devices: dict[str, Device], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds per group of stem and of bridges with head, the runtimes in turn."""
    random = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in devices}
    for number in range(rounds + 5):
        for name, device in devices.items():
            manifest = device.manifest
            shapes = [manifest.preprocessing.input_shape]
            shapes += [block.output_shape for block in manifest.blocks]
            inputs, *features = (
                random.standard_normal((manifest.group_size, *shape)).astype(np.float32)
                for shape in shapes
            )
            start = time.perf_counter()
            device.stem(inputs)
            middle = time.perf_counter()
            for index, rows in enumerate(features[:-1]):
                device.bridge(index, rows)
            device.head(features[-1])
            end = time.perf_counter()
            if number >= 5:  # caches and pools are filled
                found[name].setdefault("stem", []).append(middle - start)
                found[name].setdefault("bridges and head", []).append(end - middle)
    return {
        name: {part: statistics.median(times) for part, times in parts.items()}
        for name, parts in found.items()
    }


def main() -> None:
    """Install, measure and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path(default_bundle()))
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes per import time")
    options = parser.parse_args()
    images = load_sample().inputs[:64]
    with tempfile.TemporaryDirectory() as name, replica(options.bundle) as url:
        folder = Path(name)
        export(options.bundle, folder / "device")
        torch_device = open_device(options.bundle, runtime="torch")
        with SyncClient(url, torch_device, config=EXACT) as client:
            expected = client.infer(images)
        environment = Environment(folder)
        states = {}
        for state in ("plain", "slim"):
            if state == "slim":
                environment.run("-m", "edge.slim", "--bundle", folder / "device")
            outputs = environment.infer(url, folder / "device", images, folder)
            states[state] = {
                "sizes": environment.sizes(),
                "import_s": environment.import_s(options.rounds),
                "error": error(outputs, expected),
            }
        compiled = Environment(folder / "bytecode", bytecode=True)
        split = Environment(folder / "split", "device,split")
        split.run("-c", NOISE)
        split.infer(url, folder / "device", images, folder)
        others_mb: dict[str, Any] = {
            "bytecode_mb": sum(compiled.sizes().values()) / 1e6,
            "split_mb": sum(split.sizes().values()) / 1e6,
        }
        parts = environment.import_parts_s(options.rounds)
        devices = {
            "torch": torch_device,
            "onnx": open_device(folder / "device", runtime="onnx"),
        }
        times = stem_and_head_s(devices, 200)
    _report(states, others_mb, parts, times, options.json)


def _report(
    states: dict[str, dict[str, Any]],
    others_mb: dict[str, Any],
    parts: dict[str, float],
    times: dict[str, dict[str, float]],
    path: Path | None,
) -> None:
    totals = {state: sum(found["sizes"].values()) for state, found in states.items()}
    plain, slim = states["plain"], states["slim"]
    names = [name for name, size in plain["sizes"].items() if size >= 1_000_000]
    rows: list[dict[str, Any]] = [
        {
            "installed": name,
            "plain, MB": plain["sizes"][name] / 1e6,
            "slim, MB": slim["sizes"].get(name, 0) / 1e6,
        }
        for name in names
    ]
    rest = {
        state: (totals[state] - sum(found["sizes"].get(name, 0) for name in names)) / 1e6
        for state, found in states.items()
    }
    count = len(plain["sizes"]) - len(names)
    rows += [
        {"installed": f"{count} others", "plain, MB": rest["plain"], "slim, MB": rest["slim"]},
        {"installed": "all", "plain, MB": totals["plain"] / 1e6, "slim, MB": totals["slim"] / 1e6},
    ]
    notes = [
        f"targets: under {TARGET_BYTES / 1e6:g} MB and {TARGET_S:g} s; 1 MB is 10^6 bytes",
        "plain: what `pip install --no-compile` installs, and the bytecode of what Python imported;"
        " slim: after `python -m edge.slim`, which runs an inference",
        "bytecode_mb: without `--no-compile`; split_mb: with the extra `split` beside `device`",
        "imports one after the other, ms: "
        + ", ".join(f"{part} {spent_s * 1e3:.0f}" for part, spent_s in parts.items()),
        *(
            f"per group on {name}, one thread, ms: "
            + ", ".join(f"{part} {spent_s * 1e3:.2f}" for part, spent_s in found.items())
            for name, found in times.items()
        ),
    ]
    figures: dict[str, Any] = {
        f"{part.replace(' ', '_')}_{name}_ms": spent_s * 1e3
        for name, found in times.items()
        for part, spent_s in found.items()
    }
    report.show(
        "a device's installation without torch",
        rows,
        notes,
        path,
        plain_mb=totals["plain"] / 1e6,
        slim_mb=totals["slim"] / 1e6,
        **others_mb,
        import_s=plain["import_s"],
        import_slim_s=slim["import_s"],
        largest_error_plain=plain["error"],
        largest_error_slim=slim["error"],
        **figures,
    )


if __name__ == "__main__":
    main()
