"""Who may import whom: the trust boundary, held by ast, and imports that must stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"datamix", "edge", "deployments", "cluster", "tests", "benchmarks"}
# What each room may import of the project and, besides, whether it may import Ray.
ALLOWED = {
    "datamix": {"datamix"},
    "edge": {"datamix", "edge"},
    "deployments": {"datamix", "deployments", "ray"},
    "cluster": {"datamix", "edge", "deployments", "cluster", "ray"},
}
# Modules that devices and load generators start by the thousand, or that every process imports.
LIGHT = ["datamix.errors", "datamix.wire", "datamix.bundle", "edge.client", "cluster.cli"]
LIGHT += ["edge.ledger", "edge.cache"]
# A device without torch preprocesses and reads files.
LIGHT += ["edge.preprocess", "edge.files", "edge.data", "edge.augment"]
# The fleet runs real stems in `inputs` only, which it imports when asked for real inputs.
LIGHT += [
    f"edge.fleet.{path.stem}"
    for path in sorted((ROOT / "edge/fleet").glob("[!_]*.py"))
    if path.stem != "inputs"
]


def violations(room: str, source: str) -> list[str]:
    """The imports in ``source``, a module of ``room``, that the floors forbid."""
    forbidden = (ROOMS | {"ray"}) - ALLOWED[room]
    return [name for name in imported(ast.parse(source), room) if name in forbidden]


def imported(tree: ast.AST, room: str) -> Iterator[str]:
    """Top-level names of all imports, wherever they stand; ``import_module("x")`` counts too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]
            case ast.ImportFrom(level=level) if level > 1:
                yield from ROOMS - {room}  # a relative import that climbs out of its room
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module.split(".")[0]


@pytest.mark.parametrize("room", ALLOWED)
def test_the_floors_hold(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py"))
    assert paths, f"{room}/ has no Python file"
    assert {
        str(p.relative_to(ROOT)): found for p in paths if (found := violations(room, p.read_text()))
    } == {}


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("datamix", "from edge.mixing import haar", ["edge"]),
        ("datamix", "import numpy, deployments.app", ["deployments"]),
        ("datamix", "def f():\n    import ray.serve", ["ray"]),
        ("edge", "from deployments import engine", ["deployments"]),
        ("edge", "import importlib\nimportlib.import_module('ray')", ["ray"]),
        ("deployments", "if TYPE_CHECKING:\n    from edge.mixing import Coefficients", ["edge"]),
        ("deployments", "import cluster.cli", ["cluster"]),
        ("cluster", "from tests.conftest import cluster", ["tests"]),
        ("deployments", "import ray\nfrom datamix import wire\nfrom . import engine", []),
        ("edge", "import rayon, edges\nfrom datamix.wire import Request", []),
    ],
)
def test_the_checker_can_fail(room: str, source: str, found: list[str]) -> None:
    assert violations(room, source) == found


def test_climbing_out_of_a_room_is_found() -> None:
    assert "edge" in violations("deployments", "from .. import edge")


def heavy(modules: list[str]) -> list[str]:
    """Those of ``modules`` that load torch, Ray or matplotlib in a fresh interpreter."""
    code = (
        "import sys, {}; sys.exit(3 if {{'torch', 'ray', 'matplotlib'}} & set(sys.modules) else 0)"
    )
    running = {
        m: subprocess.Popen([sys.executable, "-c", code.format(m)], cwd=ROOT) for m in modules
    }
    codes = {module: process.wait(timeout=60) for module, process in running.items()}
    assert set(codes.values()) <= {0, 3}, f"some do not import at all: {codes}"
    return [module for module, code in codes.items() if code == 3]


def test_imports_are_light() -> None:
    assert heavy(LIGHT) == []


def test_a_heavy_import_is_seen() -> None:
    assert heavy(["datamix.models", "datamix.errors"]) == ["datamix.models"]


def test_a_message_imports_nothing_more() -> None:
    """An import within somebody's first message holds up all others of the process."""
    code = (
        "import sys, numpy as np; from datamix import wire; before = set(sys.modules);"
        "rows = np.zeros((2, 3, 4, 4), np.float32);"
        "parts = [wire.encode_request(rows.astype(t), request_id='a', model='m', **more)"
        " for t, more in ((np.float16, {}), (np.float32, {}))];"
        "[wire.decode_request(part) for part in parts];"
        "late = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "sys.exit(', '.join(late & {'pandas', 'torch', 'ray', 'scipy', 'matplotlib'}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
