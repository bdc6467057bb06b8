"""A Prometheus that answers what a test tells it to, for the expressions of the live page."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cluster.monitoring.board import live_panels
from cluster.monitoring.live import expression

Values = list[tuple[dict[str, str], float]]


class FakePrometheus:
    """Set what is there while it runs.

    Attributes:
        values: of each panel, by its name: labels and value of the series of its first query.
        up: targets, and whether they are reached.
        seen: whether it has seen a metric of ours lately.
        alerts: that fire or are pending.
        refuses: whether all queries fail.
        queries: how many it was asked.
    """

    def __init__(self) -> None:
        self.values: dict[str, Values] = {}
        self.up: list[bool] = [True]
        self.seen = True
        self.alerts: list[dict[str, Any]] = []
        self.refuses = False
        self.queries = 0
        self.url = ""
        self._panels = {
            expression(panel.queries[0].expression): panel.name for panel in live_panels()
        }
        self._others = {
            expression(query.expression) for p in live_panels() for query in p.queries[1:]
        }

    def answer(self, path: str, asked: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        self.queries += 1
        if self.refuses:
            return 503, {"status": "error", "error": "the test says so"}
        if path == "/api/v1/alerts":
            return 200, {"status": "success", "data": {"alerts": self.alerts}}
        found = self._vector(asked["query"][0])
        if path == "/api/v1/query":
            result = [{"metric": m, "value": [time.time(), str(v)]} for m, v in found]
        else:
            end = float(asked["end"][0])
            result = [
                {"metric": m, "values": [[end - 20 + 5 * n, str(v)] for n in range(5)]}
                for m, v in found
            ]
        return 200, {"status": "success", "data": {"result": result}}

    def _vector(self, query: str) -> Values:
        if query.startswith("up{"):
            return [({"instance": str(n)}, float(up)) for n, up in enumerate(self.up)]
        if query.startswith("count(last_over_time("):
            return [({}, 1.0)] if self.seen else []
        if query in self._panels:
            return self.values.get(self._panels[query], [])
        assert query in self._others, query
        return []


@contextlib.contextmanager
def prometheus() -> Iterator[FakePrometheus]:
    """One on a free port of this machine."""
    fake = FakePrometheus()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            status, told = fake.answer(parts.path, parse_qs(parts.query))
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
