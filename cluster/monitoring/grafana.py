"""Grafana's dashboards, made of :mod:`cluster.monitoring.board`.

python -m cluster.monitoring.grafana      # writes grafana/dashboards/*.json anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.monitoring.board import BOARDS, Board, Panel, fill

FOLDER = Path(__file__).parent / "grafana" / "dashboards"

# Label matchers by Grafana's variables. What a metric has no label for matches the empty end.
_FILTERS = 'SessionName=~"$cluster|",NodeAddress=~"$node|",model=~"$model|",version=~"$version|"'
_NODE = 'SessionName=~"$cluster|",NodeAddress=~"$node|"'
_CLUSTER = 'SessionName=~"$cluster|"'
_UNITS = {
    "ratio": "percentunit",
    "per_s": "cps",
    "seconds": "s",
    "bytes": "bytes",
    "bytes_per_s": "Bps",
    "rows": "short",
    "watts": "watt",
    "celsius": "celsius",
    "count": "short",
    "joules": "joule",
}
_TYPES = {"lines": "timeseries", "heat": "heatmap", "table": "table"}
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_COLUMNS, _HEIGHT = 24, 8


def expression(text: str) -> str:
    """An expression of the board with Grafana's variables in it."""
    return fill(text, filters=_FILTERS, node=_NODE, cluster=_CLUSTER, window="$__rate_interval")


def dashboard(board: Board) -> dict[str, Any]:
    """One dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in board.rows:
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        panels.append({"type": "row", "title": row.title, "collapsed": False, "gridPos": place})
        top += 1
        width = _COLUMNS // min(2, len(row.panels))
        for index, panel in enumerate(row.panels):
            across, down = index % 2, index // 2
            place = {"x": across * width, "y": top + down * _HEIGHT, "w": width, "h": _HEIGHT}
            panels.append(_panel(panel, place))
        top += _HEIGHT * -(-len(row.panels) // 2)
    for number, one in enumerate(panels, 1):
        one["id"] = number
    return {
        "uid": f"datamix-{board.name}",
        "title": board.title,
        "tags": ["datamix"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "links": _links(board),
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": _TYPES[panel.kind],
        "title": panel.title,
        "description": panel.help,
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": _UNITS[panel.unit]}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": expression(query.expression),
                "legendFormat": query.legend,
                "format": {"lines": "time_series", "heat": "heatmap", "table": "table"}[panel.kind],
                "instant": panel.kind == "table",
                "range": panel.kind != "table",
            }
            for number, query in enumerate(panel.queries)
        ],
    }
    if panel.kind == "heat":
        made["options"] = {"calculate": False, "yAxis": {"unit": _UNITS[panel.unit]}}
    return made


def _variables() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    ]
    served = "ray_datamix_served_versions"
    for name, label, query in (
        ("cluster", "Cluster", "label_values(ray_datamix_open_streams, SessionName)"),
        ("node", "Node", "label_values(ray_datamix_open_streams, NodeAddress)"),
        ("model", "Model", f"label_values({served}, model)"),
        ("version", "Version", f'label_values({served}{{model=~"$model"}}, version)'),
    ):
        made.append(
            {
                "name": name,
                "label": label,
                "type": "query",
                "datasource": _SOURCE,
                "definition": query,
                "query": {"query": query, "refId": name},
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            }
        )
    # Where the run-books are: `datamix monitor` serves them.
    where = "http://localhost:9400/runbooks"
    made.append(
        {
            "name": "runbooks",
            "label": "Run-books",
            "type": "textbox",
            "query": where,
            "current": {"text": where, "value": where},
        }
    )
    return made


def _links(board: Board) -> list[dict[str, Any]]:
    others = {"title": "DataMix", "type": "dashboards", "tags": ["datamix"], "asDropdown": True}
    books = [
        {"title": f"Run-book: {name}", "type": "link", "url": f"${{runbooks}}/{name}"}
        for name in board.runbooks
    ]
    return [others, *books]


def files() -> dict[Path, str]:
    """Every dashboard's file and what stands in it."""
    return {
        FOLDER / f"{board.name}.json": json.dumps(dashboard(board), indent=1) + "\n"
        for board in BOARDS
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
