"""An attack sees an Observation and nothing else: held by its types, and here by its imports."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from edge.audit.attack import Attack, Budget
from edge.audit.attacks import suite
from edge.audit.observation import Group, Message, Observation, Public

ATTACKS = Path(__file__).parents[1] / "edge" / "audit" / "attacks"
# Mathematics, and nothing that opens, runs or looks around in this process.
ALLOWED = {
    "__future__", "collections", "collections.abc", "dataclasses", "enum", "functools", "hashlib",
    "itertools", "math", "operator", "typing", "numpy", "torch", "datamix",
}  # fmt: skip
# Tools that attacks share; the guard holds for them as well.
TOOLS = (
    "decoder",
    "features",
    "floor",
    "matching",
    "observation",
    "recovery",
    "separation",
    "ssim",
)
ALLOWED_OF_EDGE = (
    *(f"edge.audit.{name}" for name in ("attack", "attacks", *TOOLS)),
    "edge.data", "edge.logmel", "edge.preprocess",
)  # fmt: skip
# This one finds the others, so it imports by name.
FINDER = ATTACKS / "__init__.py"
FORBIDDEN_CALLS = {"__import__", "eval", "exec", "open", "compile", "globals", "vars", "getattr"}
FORBIDDEN_NAMES = {
    "importlib", "sys", "gc", "inspect", "_getframe", "__globals__", "__closure__", "load",
    "fromfile", "memmap", "loadtxt", "genfromtxt", "DataSource", "load_library",
}  # fmt: skip


def allowed(name: str) -> bool:
    if name.split(".")[0] == "edge":
        return any(name == room or name.startswith(room + ".") for room in ALLOWED_OF_EDGE)
    return name in ALLOWED or name.split(".")[0] in {"numpy", "torch", "datamix"}


def violations(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if not allowed(alias.name))
            case ast.ImportFrom(level=level) if level:
                yield "a relative import"
            case ast.ImportFrom(module=str(module), names=names) if module in (
                "edge",
                "edge.audit",
            ):
                whole = (f"{module}.{alias.name}" for alias in names)
                yield from (name for name in whole if not allowed(name))
            case ast.ImportFrom(module=str(module)) if not allowed(module):
                yield module
            case ast.ImportFrom(names=names):
                yield from (alias.name for alias in names if alias.name in FORBIDDEN_NAMES)
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                yield name
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in FORBIDDEN_NAMES:
                yield name


def guarded() -> list[Path]:
    tools = (ATTACKS.parent / f"{name}.py" for name in TOOLS)
    found = [*sorted(ATTACKS.rglob("*.py")), *(path for path in tools if path.exists())]
    return [path for path in found if path != FINDER]


@pytest.mark.parametrize("path", guarded(), ids=lambda path: path.stem)
def test_attacks_import_nothing_that_knows(path: Path) -> None:
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from edge.mixing import haar",
        "from edge import mixing",
        "from edge.audit import truth",
        "from edge.audit.truth import Truth",
        "import edge.audit.capture",
        "from edge.audit.record import record",
        "from edge.audit.scoring import Scorer",
        "import edge.client",
        "from edge.modes import Mix",
        "from edge.masks import Mask",
        "from edge.session import infer_group",
        "from ..truth import Truth",
        "import sys",
        "import importlib\nimportlib.import_module('edge.mixing')",
        "def run(self, o, b):\n    return __import__('edge.mixing')",
        "open('a.truth.npz')",
        "import numpy as np\nnp.load('a.truth.npz')",
        "from numpy import load",
        "b.report.__closure__",
        "import os, pickle",
    ],
)
def test_the_guard_can_fail(source: str) -> None:
    assert list(violations(source)) != []


def test_the_guard_lets_mathematics_through() -> None:
    source = (
        "import math, numpy as np, torch\nfrom torch import nn\nfrom datamix import wire\n"
        "from edge.audit.observation import requests\nfrom edge.audit import ssim\n"
    )
    assert list(violations(source)) == []


def test_an_observation_holds_what_crossed_the_wire_and_what_is_public() -> None:
    names = {kind: {f.name for f in fields(kind)} for kind in (Message, Observation, Public, Group)}
    assert names == {
        Message: {"operator", "direction", "at_s", "body"},
        Observation: {"mode", "operator", "messages", "public"},
        Public: {"manifest", "model", "training", "gallery", "gallery_labels"},
        Group: {"request_ids", "rounds", "answers", "at_s"},
    }


def test_attacks_take_an_observation_and_a_budget() -> None:
    assert [p for p in inspect.signature(Attack.run).parameters] == [
        "self",
        "observation",
        "budget",
    ]
    for attack in suite():
        hints = get_type_hints(type(attack).run)
        assert (hints["observation"], hints["budget"]) == (Observation, Budget)
        assert attack.modes <= {"mix", "bounded", "split"} and attack.modes
        assert attack.operators <= {"A", "B"} and attack.operators
