"""What the demo asks for and says in each mode; the cluster itself is in tests/test_cluster.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import demo as module
from cluster.demo import ONE_MACHINE, OPERATORS, DemoConfig, default_bundle, demo
from datamix.bundle import read_manifest
from datamix.errors import ConfigError
from deployments.config import Config
from edge.fleet.config import FleetConfig
from edge.fleet.offline import OfflineTraffic
from edge.fleet.report import Summary, summarise
from edge.fleet.terms import Terms
from edge.promises import promise
from tests.test_fleet_report import make_run

ONE_ADDRESS = "both ends are at the address 127.0.0.1"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the demo deploys and simulates, in place of a cluster and a fleet."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def one(config: Config, **options: Any) -> Iterator[Any]:
        seen.append(("one", config))
        yield SimpleNamespace(url="http://cloud")

    @contextlib.contextmanager
    def several(config: Config, names: Any, **options: Any) -> Iterator[list[str]]:
        seen.append((tuple(names), config))
        yield [f"http://cloud/{name}" for name in names]

    def simulate(config: FleetConfig, on_progress: Any) -> Summary:
        seen.append(config)
        mode = config.mode or ""
        terms = Terms(
            promise(read_manifest(str(config.bundle)), mode),
            ONE_ADDRESS if mode == "split" else None,
        )
        offline = OfflineTraffic(20, 10, 0, 8, 0, 900, 90_000) if mode == "split" else None
        return summarise(replace(make_run(), mode=mode, terms=terms, offline=offline))

    monkeypatch.setattr(module, "local_cluster", one)
    monkeypatch.setattr(module, "local_operators", several)
    monkeypatch.setattr(module, "simulate", simulate)
    return seen


def run(folder: Path, mode: str | None) -> tuple[dict[str, Any], str]:
    config = DemoConfig(mode=mode, json_path=folder / "d.json", html_path=folder / "d.html")
    assert demo(config) == 0
    return json.loads((folder / "d.json").read_text()), (folder / "d.html").read_text()


def test_split_is_two_applications_on_one_machine_and_marked_so_everywhere(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = run(tmp_path, "split")
    (names, deployed), config = asked
    assert names == OPERATORS and deployed.dtype == "float32"
    assert (config.mode, config.allow_same_operator, config.rate) == ("split", True, 75)
    assert (config.url, config.second) == tuple(f"http://cloud/{name}" for name in OPERATORS)
    assert figures["not_private"] == ONE_ADDRESS and figures["mode"] == "split"
    assert figures["offline_bytes_down_per_input"] == 90_000 / 80
    printed = capsys.readouterr()
    assert ONE_MACHINE in printed.out and "NOT PRIVATE" in printed.out and "masks" in printed.out
    assert "there is one operator" in printed.err.replace("\n", " ")  # before anything starts
    assert ONE_MACHINE in page.replace("&#x27;", "'") and figures["promise"] in page


def test_mix_is_one_application_and_says_what_breaks_it(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = run(tmp_path, None)
    (kind, _), config = asked
    assert kind == "one"
    assert (config.mode, config.second, config.allow_same_operator) == ("mix", None, False)
    assert figures["not_private"] is None and figures["masks_fetched"] is None
    printed = capsys.readouterr().out
    assert "obfuscation" in printed and "NOT PRIVATE" not in printed
    assert figures["known_break"] in page and "NOT PRIVATE" not in page


def test_a_mode_the_bundle_was_not_made_for_starts_nothing(
    asked: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="was made for mix, split"):
        demo(DemoConfig(bundle=default_bundle(), mode="bounded", html_path=tmp_path / "d.html"))
    assert not asked
