"""Stands before the real `pynvml` on the path of a test's cluster: a node with a GPU that lives."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_HERE = Path(__file__).parent
_spec = PathFinder.find_spec("pynvml", [p for p in sys.path if Path(p).resolve() != _HERE])
assert _spec is not None
assert _spec.loader is not None
_real = importlib.util.module_from_spec(_spec)
sys.modules["pynvml"] = _real  # whose constants and errors the fake takes
_spec.loader.exec_module(_real)

from tests.fake_nvml import FakeNvml, living  # noqa: E402

sys.modules["pynvml"] = living(FakeNvml())  # type: ignore[assignment]
