"""The live page: what a cluster does now, for people without Grafana.

A small server asks Prometheus once a second, however many look at it, and hands out a page that
needs nothing from elsewhere:

    /               the page, with its script, its style and uPlot
    /history.json   what the panels are, and the last minutes of each
    /live.json      the newest values, the alerts that fire, and how the cluster is
    /runbooks/NAME  the run-book of an alert, where they are at hand

It reads, and passes on no query of a caller's.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import httpx

from cluster.monitoring.board import Panel, fill, live_panels
from datamix.errors import ConfigError, Unavailable

State = Literal["ok", "no data", "cloud down", "no prometheus"]

STATES: Mapping[State, str] = {
    "ok": "The cluster answers.",
    "no data": "No data: Prometheus has seen no metric of DataMix in the last five minutes.",
    "cloud down": "Cloud down: Prometheus reaches none of the cluster's nodes.",
    "no prometheus": "Prometheus does not answer; what is shown is old.",
}
WINDOW = "30s"  # of rates: three scrapes at the shipped interval
HISTORY_S = 600.0
STEP_S = 5.0
_PERIOD_S = 1.0
_TIMEOUT_S = 5.0
_PAGE = Path(__file__).parent / "live"
_RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


@dataclass(frozen=True, slots=True)
class Series:
    """One series of a panel.

    Attributes:
        legend: how it is called.
        labels: of Prometheus, without its name.
        points: (time in Unix seconds, value), the oldest first; one of an instant query.
    """

    legend: str
    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


class Prometheus:
    """Prometheus' HTTP API, as far as it is needed here. Threads may share it."""

    def __init__(self, url: str) -> None:
        """Ask the server at ``url``; nobody is asked yet.

        Raises:
            ConfigError: ``url`` is no HTTP URL.
        """
        if not re.match(r"https?://[^/]", url):
            raise ConfigError(f"prometheus is {url!r}, expected a URL such as http://host:9090")
        self._http = httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant vector.

        Raises:
            Unavailable: it does not answer, or refuses.
        """
        found: list[dict[str, Any]] = self._get("query", {"query": expression})["result"]
        return found

    def query_range(
        self, expression: str, start_s: float, end_s: float, step_s: float
    ) -> list[dict[str, Any]]:
        """A matrix.

        Raises:
            Unavailable: it does not answer, or refuses.
        """
        asked = {"query": expression, "start": start_s, "end": end_s, "step": step_s}
        found: list[dict[str, Any]] = self._get("query_range", asked)["result"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that are pending or fire.

        Raises:
            Unavailable: it does not answer, or refuses.
        """
        found: list[dict[str, Any]] = self._get("alerts", {})["alerts"]
        return found

    def _get(self, what: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        try:
            reply = self._http.get(f"/api/v1/{what}", params=dict(asked))
            body = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable(f"Prometheus does not answer: {error!r}") from error
        if body.get("status") != "success":
            raise Unavailable(f"Prometheus refuses: {str(body.get('error'))[:200]}")
        data: dict[str, Any] = body["data"]
        return data


def expression(text: str, window: str = WINDOW) -> str:
    """An expression of the board for the whole cluster."""
    return fill(text, filters="", node="", cluster="", window=window)


class Live:
    """What the page is told, asked for once a period whoever looks. Threads may share it."""

    def __init__(
        self,
        prometheus: Prometheus,
        panels: tuple[Panel, ...] | None = None,
        *,
        window: str = WINDOW,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Show ``panels``, or what the board says."""
        self._prometheus = prometheus
        self._panels = live_panels() if panels is None else panels
        self._window = window
        self._clock = clock
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="live")
        self._asking = threading.Lock()
        self._asked_s = float("-inf")
        self._last: dict[str, Any] = {}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def now(self) -> dict[str, Any]:
        """The newest values; at most a period old."""
        with self._asking:
            now_s = self._clock()
            if now_s - self._asked_s >= _PERIOD_S:
                self._asked_s = now_s
                self._last = self._now(now_s)
            return self._last

    def history(self) -> dict[str, Any]:
        """The panels, and their last minutes."""
        end_s = self._clock()
        try:
            series = list(self._pool.map(lambda panel: self._past(panel, end_s), self._panels))
        except Unavailable:
            series = [[] for _ in self._panels]
        return {
            "period_s": _PERIOD_S,
            "history_s": HISTORY_S,
            "states": STATES,
            "panels": [
                {
                    "name": panel.name,
                    "title": panel.title,
                    "help": panel.help,
                    "unit": panel.unit,
                    "kind": panel.kind,
                    "series": [_plain(one) for one in found],
                }
                for panel, found in zip(self._panels, series, strict=True)
            ],
        }

    def values(self) -> dict[str, list[Series]]:
        """The newest values of every panel.

        Raises:
            Unavailable: Prometheus does not answer.
        """
        found = self._pool.map(self._newest, self._panels)
        return {panel.name: series for panel, series in zip(self._panels, found, strict=True)}

    def _now(self, now_s: float) -> dict[str, Any]:
        told: dict[str, Any] = {"time": now_s, "panels": {}, "alerts": []}
        try:
            told["state"] = self._state()
            told["alerts"] = [_alert(one) for one in self._prometheus.alerts()]
            found = self.values()
        except Unavailable:
            told["state"] = "no prometheus"
            return told
        told["panels"] = {name: [_plain(one) for one in series] for name, series in found.items()}
        return told

    def _state(self) -> State:
        up = [float(one["value"][1]) for one in self._prometheus.query('up{job!="prometheus"}')]
        if up and not any(up):
            return "cloud down"
        seen = self._prometheus.query("count(last_over_time(ray_datamix_open_streams[5m]))")
        return "ok" if seen else "no data"

    def _newest(self, panel: Panel) -> list[Series]:
        made = []
        for query in panel.queries:
            for one in self._prometheus.query(expression(query.expression, self._window)):
                made.append(_series(query.legend, one["metric"], [one["value"]]))
        return made

    def _past(self, panel: Panel, end_s: float) -> list[Series]:
        if panel.kind == "table":
            return []
        made = []
        for query in panel.queries:
            asked = expression(query.expression, self._window)
            for one in self._prometheus.query_range(asked, end_s - HISTORY_S, end_s, STEP_S):
                made.append(_series(query.legend, one["metric"], one["values"]))
        return made


def _series(legend: str, metric: Mapping[str, str], points: list[Any]) -> Series:
    labels = {key: value for key, value in metric.items() if key != "__name__"}
    name = re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), legend).strip()
    values = ((float(at), float(value)) for at, value in points)
    # JSON knows no NaN, which is what a rate over nothing is.
    kept = tuple((at, value) for at, value in values if abs(value) < float("inf"))
    return Series(name or legend, labels, kept)


def _plain(series: Series) -> dict[str, Any]:
    return {
        "legend": series.legend,
        "labels": dict(series.labels),
        "points": [list(point) for point in series.points],
    }


def _alert(alert: Mapping[str, Any]) -> dict[str, str]:
    labels, notes = alert["labels"], alert.get("annotations", {})
    name = labels.get("alertname", "")
    book = str(notes.get("runbook_url", "")).rstrip("/").rpartition("/")[2].removesuffix(".md")
    return {
        "name": name,
        "state": alert["state"],
        "severity": labels.get("severity", ""),
        "summary": notes.get("summary", ""),
        "since": alert.get("activeAt", ""),
        "runbook": book if (_RUNBOOKS / f"{book}.md").is_file() and book else "",
    }


# --- the server ---------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(live: Live, *, host: str = "127.0.0.1", port: int = 9400) -> Iterator[str]:
    """Serve the page while the block runs; yields its URL.

    Args:
        live: what is told.
        host: what to listen on. Whoever reaches it sees the cluster's figures.
        port: where; 0 for a free one.

    Raises:
        ConfigError: the port cannot be used.
    """

    class Handler(_Handler):
        source = live

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used ({error.strerror}), choose another"
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="page", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    source: Live

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        if path in ("/live.json", "/history.json"):
            told = self.source.now() if path == "/live.json" else self.source.history()
            self._reply(200, "application/json", json.dumps(told, allow_nan=False).encode())
            return
        found = _file(path)
        if found is None:
            self._reply(404, "text/plain; charset=utf-8", b"there is no such page\n")
            return
        kind = _KINDS.get(found.suffix, "text/plain; charset=utf-8")
        self._reply(200, kind, found.read_bytes())

    def log_message(self, *_: Any) -> None:
        """Say nothing: a page that asks every second would fill the terminal."""

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked has gone
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.send_header("cache-control", "no-store")
            self.send_header("content-security-policy", _POLICY)
            self.end_headers()
            self.wfile.write(body)


def _file(path: str) -> Path | None:
    """The file behind a path: one of the page's own, or a run-book."""
    if found := re.fullmatch(r"/runbooks/([a-z0-9-]{1,64})", path):
        book = _RUNBOOKS / f"{found[1]}.md"
        return book if book.is_file() else None
    name = path.removeprefix("/") or "index.html"
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]{0,63}", name):
        return None
    page = _PAGE / name
    return page if page.is_file() else None
