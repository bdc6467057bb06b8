"""What docs/networks.md shows runs, and its table of networks is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datamix.models import Architecture, build, count_flops

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/networks.md").read_text()


def test_the_python_runs() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^bridge 0 +device", done.stdout, re.MULTILINE)


def table() -> dict[str, tuple[float, float]]:
    """Name to millions of parameters and billions of multiply-adds."""
    found: dict[str, tuple[float, float]] = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[3].endswith(" M"):
            names = re.findall(r"`(\w+)`", cells[0])
            parameters = [float(x) for x in cells[3].removesuffix(" M").split(",")]
            billions = [float(x) for x in cells[4].removesuffix(" G").split(",")]
            found |= dict(zip(names, zip(parameters, billions, strict=True), strict=True))
    return found


def test_every_network_has_a_row() -> None:
    built_in = sys.modules["datamix.models.build"]._BUILT_IN
    assert set(table()) == set(built_in)


@pytest.mark.parametrize("name", sorted(table()))
def test_the_table_is_true(name: str) -> None:
    published = name not in ("convnet", "bridgenet", "audionet")
    options: dict[str, int | str] = {"image_size": 224, "classes": 1000} if published else {}
    with torch.device("meta"):
        model = build(Architecture(name, options))
    flops = count_flops(model)
    parameters, billions = table()[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        parameters, abs=0.005 if published else 0.05
    )
    assert (flops.edge + flops.cloud) / 2e9 == pytest.approx(
        billions, rel=0.1 if billions < 0.1 else 0.015
    )
