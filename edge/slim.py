"""Remove from a device's environment what a device never loads: ``python -m edge.slim``.

    python -m edge.slim --bundle FOLDER     prove it with this exported bundle
    python -m edge.slim                     prove it without one

Test suites, training tools and a second copy of onnxruntime's library are put aside, then a fresh
process imports the SDK, encodes and decodes messages and runs each part of the bundle. Only when
that has worked they are deleted; otherwise they are put back. ``pip install --force-reinstall``
brings them back too. It changes other people's packages, so it only works in a virtual environment
without torch and Ray: one that is a device's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from datamix import wire
from datamix.errors import ConfigError, DataMixError
from edge.client import Client

# By package, what a device never loads: patterns within its folder.
UNUSED: dict[str, tuple[str, ...]] = {
    # The Python module holds the library; this copy is for programs in C.
    "onnxruntime": (
        "capi/libonnxruntime.so*",
        "transformers",
        "tools",
        "quantization",
        "datasets",
        "backend",
        "ThirdPartyNotices.txt",
    ),
    "numpy": ("**/tests", "f2py", "_core/include", "_core/lib", "**/*.pyi", "**/*.a"),
    "pydantic": ("v1", "mypy.py"),
    "edge": ("samples",),
}
_HEAVY = ("torch", "ray")


def unused(site: Path) -> list[Path]:
    """Files and folders of :data:`UNUSED` that are there, none within another."""
    found = sorted(
        path
        for package, patterns in UNUSED.items()
        for pattern in patterns
        for path in (site / package).glob(pattern)
    )
    kept: list[Path] = []
    for path in found:  # a folder comes before what lies in it
        if not any(parent in path.parents for parent in kept):
            kept.append(path)
    return kept


def slim(bundle: str | None) -> int:
    """Remove what is unused from this environment, once it is proven to be.

    Returns:
        Bytes removed.

    Raises:
        ConfigError: this is no device's environment, or the SDK would not work without them.
    """
    if sys.prefix == sys.base_prefix:
        raise ConfigError("this Python is no virtual environment, expected a device's own")
    if heavy := [module for module in _HEAVY if find_spec(module)]:
        raise ConfigError(f"{heavy[0]} is installed here, expected a device's environment")
    site = Path(sysconfig.get_path("platlib"))
    aside = Path(tempfile.mkdtemp(prefix=".slim.", dir=site))
    moved: list[tuple[Path, Path]] = []
    try:
        for path in unused(site):
            target = aside / str(len(moved))
            path.rename(target)
            moved.append((path, target))
        _check(bundle)
        moved_bytes = size(aside)
        moved.clear()
        return moved_bytes
    finally:
        for path, target in reversed(moved):
            target.rename(path)
        shutil.rmtree(aside)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check(bundle: str | None) -> None:
    command = [sys.executable, "-m", "edge.slim", "--prove"]
    command += ["--bundle", bundle] if bundle else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"the SDK does not work without them, all is as before: {last[:300]}")


def prove(bundle: str | None) -> None:
    """Do what a device does but for the network.

    Raises:
        BundleError: a bundle that can't be read or trusted.
    """
    import onnxruntime

    if not onnxruntime.get_available_providers():
        raise ConfigError("onnxruntime has no providers, expected its CPU's")
    features = np.random.default_rng(0).standard_normal((4, 16, 14, 14)).astype(np.float32)
    for dtype in wire.DTYPES:
        message = wire.encode_request(features, request_id="r-1", dtype=dtype)
        wire.decode_request(message)
    if bundle is None:
        return
    device = Client("http://127.0.0.1:1", bundle).device
    manifest = device.manifest
    shape = manifest.preprocessing.raw_shape
    device.stem(device.preprocess(np.zeros((manifest.group_size, *shape), np.float32)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 1 and one sentence where nothing could be removed."""
    parser = argparse.ArgumentParser(prog="python -m edge.slim", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--bundle", help="exported bundle to prove it with")
    parser.add_argument("--prove", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.prove:
            prove(options.bundle)
        else:
            print(f"removed {slim(options.bundle) / 1e6:.1f} MB")
    except DataMixError as error:
        print(f"edge.slim: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
