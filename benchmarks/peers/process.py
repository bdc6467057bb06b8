"""Start a peer's program in the peers' environment, wait until it answers, take all of it down."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psutil

from benchmarks import accounting
from cluster.local import free_port
from datamix import wire

ROOT = Path(__file__).resolve().parents[2]
# What is served where.
PATHS = {
    "mosec": "/inference",
    "litserve": "/predict",
    "bentoml": "/infer",
    "triton": "/v2/models/echo/infer",
}
# What a peer must be told beside the body: Triton, that all of it is the tensor.
HEADERS = {"triton": {"inference-header-content-length": "0"}}
# Those that take CPU time when they have nothing to do: stopped while others have their turn.
POLLING = {"litserve"}
# Distributions that are not called like their peer.
DISTRIBUTIONS = {"triton": "nvidia-pytriton"}


def python(venv: Path) -> Path:
    """The interpreter of the peers' environment.

    Raises:
        FileNotFoundError: there is none.
    """
    found = venv / "bin" / "python"
    if not found.exists():
        raise FileNotFoundError(
            f"{found} is not there, expected the peers' environment as "
            "benchmarks/peers/requirements.txt says how to make it"
        )
    return found


def versions(venv: Path) -> dict[str, str]:
    """Releases of the peers, as installed in their environment."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    output = subprocess.run(
        [python(venv), "-c", code, *(DISTRIBUTIONS.get(peer, peer) for peer in PATHS)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, str] = json.loads(output)
    return found


def polls(peer: str) -> bool:
    """Whether ``peer`` takes CPU time when it has nothing to do."""
    return peer.split(":")[0] in POLLING


def headers(peer: str) -> dict[str, str]:
    """What goes with every request to ``peer``."""
    return {"content-type": wire.MEDIA_TYPE, **HEADERS.get(peer.split(":")[0], {})}


@contextlib.contextmanager
def start(
    peer: str, venv: Path, message: bytes, batch: int, timeout_s: float = 60
) -> Iterator[str]:
    """Serve the echo on a peer; yields the URL to post to; its mark is ``peer``.

    Args:
        peer: its name, and settings of its program other than the tuned ones:
            ``mosec`` or ``mosec:workers=2:batch=32``.
        venv: the peers' environment.
        message: what it must echo before it counts as started.
        batch: the largest batch, in messages, where ``peer`` says no other.
        timeout_s: how long it may take to start.

    Raises:
        RuntimeError: it ended, or did not echo ``message`` in ``timeout_s``.
    """
    port = free_port()
    name, *settings = peer.split(":")
    url = f"http://127.0.0.1:{port}{PATHS[name]}"
    request = urllib.request.Request(url, message, headers(peer))
    environment = accounting.environment(peer) | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryDirectory(prefix="dmx-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    python(venv),
                    "-m",
                    f"benchmarks.peers.{name}_app",
                    f"--port={port}",
                    f"--batch={batch}",
                    *(f"--{setting}" for setting in settings),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment | {"TMPDIR": folder},
                start_new_session=True,
            )
        try:
            _wait(process, request, log, timeout_s)
            yield url
        finally:
            _stop(process, peer)
            for shared in Path("/dev/shm").glob(f"{Path(folder).name}*"):
                shared.unlink()


def _wait(
    process: subprocess.Popen[bytes], request: urllib.request.Request, log: Path, timeout_s: float
) -> None:
    """Wait until the request is answered with the rows that it holds."""
    rows = wire.decode_request(cast(bytes, request.data)).features.tobytes()
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if rows in answer.read():
                    return
                last = "an answer without the rows of the request"
        except OSError as error:
            last = str(error)
        time.sleep(0.2)
    said = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{request.full_url} did not serve ({last}); it said: {said}")


@contextlib.contextmanager
def frozen(mark: str) -> Iterator[None]:
    """Stop the processes of a server in the block, so that an idle one takes no CPU time at all."""
    stopped = accounting.processes(mark)
    _signal(stopped, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(stopped, signal.SIGCONT)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the peer and whatever it started."""
    # The first process ends its own children; Triton removes its shared memory after that.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    left = accounting.processes(mark)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)
    process.wait(5)
