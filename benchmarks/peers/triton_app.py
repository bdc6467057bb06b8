"""Echo on NVIDIA Triton: HTTP and dynamic batching in C++, a Python model behind shared memory.

The server comes out of the wheel of nvidia-pytriton. Its Python stub links against libpython, which
the dynamic linker does not find by itself where Python is not the system's own.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from benchmarks.peers import echo

CONFIG = """
name: "echo"
backend: "python"
max_batch_size: {batch}
input {{ name: "body", data_type: TYPE_UINT8, dims: [ -1 ], allow_ragged_batch: true }}
output {{ name: "answer", data_type: TYPE_UINT8, dims: [ -1 ] }}
instance_group {{ kind: KIND_CPU, count: {instances} }}
dynamic_batching {{ max_queue_delay_microseconds: {wait_us} }}
"""
# The stub's interpreter is isolated from its environment, so the path must be told.
MODEL = """import sys
sys.path[:0] = {path!r}
from benchmarks.peers.triton_model import TritonPythonModel
"""


def main() -> None:
    """Lay out a model repository in the current folder and become the server."""
    # Tried: batches of 16 and 64, a delay of 0.5 ms, two instances of the model, 1, 2 and 8 threads
    # for HTTP: the same within the noise; small batches and two instances are slower.
    settings = echo.settings(batch=64, wait_us=0, instances=1, threads=8)
    package = find_spec("pytriton")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("nvidia-pytriton is not installed, expected its wheel")
    site = Path(package.origin).parents[1]
    server = site / "pytriton" / "tritonserver"
    model = Path("models/echo")
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG.format(**vars(settings)))
    (model / "1" / "model.py").write_text(MODEL.format(path=[path for path in sys.path if path]))
    shutil.copytree(server / "backends", "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / version / stub, Path("backends/python") / stub)
    libraries = [sysconfig.get_config_var("LIBDIR"), site / "nvidia_pytriton.libs"]
    os.environ["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    os.execv(
        server / "bin" / "tritonserver",
        [
            "tritonserver",
            f"--model-repository={Path('models').absolute()}",
            f"--backend-directory={Path('backends').absolute()}",
            # Named after the folder, so that none is left behind if the server has to be killed.
            f"--backend-config=python,shm-region-prefix-name={Path.cwd().name}",
            "--http-address=127.0.0.1",
            f"--http-port={settings.port}",
            f"--http-thread-count={settings.threads}",
            "--allow-grpc=false",
            "--allow-metrics=false",
            "--log-info=false",
            "--disable-auto-complete-config",
        ],
    )


if __name__ == "__main__":
    main()
