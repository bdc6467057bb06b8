"""The one description of what is shown: asks for metrics that exist, in PromQL that is valid."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from cluster.monitoring import grafana
from cluster.monitoring.board import BOARDS, live_panels
from cluster.monitoring.live import expression
from cluster.monitoring.run import FOLDER
from deployments.metrics import TABLE

PANELS = [(board.name, panel) for board in BOARDS for panel in board.panels]


def known() -> set[str]:
    """Names of all series that Prometheus can have of the table, and by our rules."""
    names = {
        rule["record"]
        for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
        for rule in group["rules"]
    }
    for metric in TABLE:
        name = f"ray_{metric.name}"
        names |= {f"{name}_bucket"} if metric.kind == "histogram" else {name}
    return names


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=lambda one: getattr(one, "name", one))
def test_a_panel_asks_for_metrics_that_exist(board: str, panel: object) -> None:
    asked = set(re.findall(r"(?:ray_datamix_|datamix:)[\w:]+", json.dumps(repr(panel))))
    assert asked and asked <= known()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus)")
def test_every_query_is_promql(tmp_path: Path) -> None:
    texts = [
        made
        for _, panel in PANELS
        for query in panel.queries
        for made in (
            expression(query.expression),
            # Grafana's variables, as it would put them in.
            re.sub(r"\$__rate_interval", "1m", grafana.expression(query.expression)),
        )
    ]
    rules = [{"record": f"panel:{n}", "expr": text} for n, text in enumerate(texts)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(texts)} rules found" in done.stdout + done.stderr


def test_the_dashboards_are_those_of_the_board() -> None:
    for path, text in grafana.files().items():
        assert path.read_text() == text, "python -m cluster.monitoring.grafana writes them anew"
    assert set(grafana.FOLDER.glob("*.json")) == set(grafana.files())


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_a_dashboard_has_all_panels_and_no_two_in_one_place(board: object) -> None:
    made = grafana.dashboard(board)  # type: ignore[arg-type]
    panels = [one for one in made["panels"] if one["type"] != "row"]
    assert [one["title"] for one in panels] == [one.title for one in board.panels]  # type: ignore[attr-defined]
    taken: set[tuple[int, int]] = set()
    for one in made["panels"]:
        place = one["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not taken & cells and max(x for x, _ in cells) < 24
        taken |= cells
    assert len({one["id"] for one in made["panels"]}) == len(made["panels"])
    names = {one["name"] for one in made["templating"]["list"]}
    assert {"cluster", "model", "version", "node"} <= names


def lost(had: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Where ``kept`` lacks something that ``had`` has, or has something else there."""
    if isinstance(had, dict) and isinstance(kept, dict):
        for key, value in had.items():
            yield from lost(value, kept.get(key), f"{path}/{key}")
    elif isinstance(had, list) and isinstance(kept, list) and len(had) == len(kept):
        for number, (one, other) in enumerate(zip(had, kept, strict=True)):
            yield from lost(one, other, f"{path}/{number}")
    elif had != kept:
        yield path


def unread(made: dict[str, Any]) -> list[str]:
    """What of a dashboard Grafana's own models do not know, and would leave out."""
    register_default_plugins()
    kept = json.loads(json.dumps(Dashboard.from_json(made), cls=JSONEncoder))
    # The models lack it; Grafana writes it into every variable that it saves, beside the query.
    return [path for path in lost(made, kept) if not path.endswith("/definition")]


@pytest.mark.parametrize("path", grafana.files(), ids=lambda path: path.stem)
def test_grafanas_models_read_all_of_a_dashboard(path: Path) -> None:
    assert unread(json.loads(path.read_text())) == []


def test_grafanas_models_find_what_is_misspelled() -> None:
    made = grafana.dashboard(BOARDS[0])
    panel = next(number for number, one in enumerate(made["panels"]) if one["type"] != "row")
    made["panels"][panel]["fieldConfg"] = made["panels"][panel].pop("fieldConfig")
    made["panels"][panel]["targets"][0]["exprs"] = "up"
    assert unread(made) == [
        f"/panels/{panel}/targets/0/exprs",
        f"/panels/{panel}/fieldConfg",
    ]


def test_names_are_unique_and_the_live_page_shows_what_it_must() -> None:
    for board in BOARDS:
        names = [panel.name for panel in board.panels]
        assert len(set(names)) == len(names)
    assert {panel.name for panel in live_panels()} >= {
        *("engine_busy", "gpu_utilisation", "requests", "queue_heat", "close_reasons"),
        *("queue_rows", "versions", "replicas", "streams", "autoscaler"),
    }
