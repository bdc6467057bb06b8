"""The page and the live view: everything said, nothing fetched."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from datamix.errors import ConfigError
from edge.fleet import view
from edge.fleet.page import Entry, write_page, write_report
from edge.fleet.report import Run, summarise
from edge.fleet.run import FleetProgress
from tests.fleet_runs import lively
from tests.test_fleet_report import COUNTERS, make_run

PROGRESS = FleetProgress(
    phase="running",
    elapsed_s=3.2,
    duration_s=20,
    devices=2000,
    connected=1999,
    in_flight=12,
    counters=COUNTERS | {"begun": 40, "ok": 30, "failed": 1},
    requests_per_s=123.4,
    offered_per_s=130.0,
    latencies_s=[0.012],
    p50_s=0.012,
    p99_s=None,
    batch_rows_mean=None,
    engine_busy_ratio=0.5,
    generator_cpu_ratio=0.31,
)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("href", "src", "xlink:href", "data", "action")
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.alts += [value or "" for name, value in attrs if name == "aria-label" and tag == "svg"]
        self.links += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(folder: Path, run: Run, **options: Any) -> Reader:
    summary = summarise(run)
    write_page(folder / "report.html", summary, summary.series, **options)
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    return reader


def test_the_page_shows_every_plot_and_figure_and_fetches_nothing(tmp_path: Path) -> None:
    reader = read_page(tmp_path, make_run(), extra=[("accuracy <here>", "91%")])
    text = " ".join(reader.text)
    assert reader.tags.count("svg") == 7
    for name, figure in [("accuracy <here>", "91%"), *view.rows(summarise(make_run()))]:
        assert name in text and figure in text
    assert "No inference failed" in text
    assert all(link.startswith("#") for link in reader.links), reader.links
    # For those who do not see the plots: a sentence and the numbers.
    assert len(reader.alts) == reader.tags.count("details") == 7
    assert "Latency over time: latency in ms over time in s; p99 20; p50 20." in reader.alts
    assert {"script", "link", "img", "iframe"}.isdisjoint(reader.tags)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", source)


def test_the_page_of_a_load_test_says_that_there_was_nothing_to_protect(tmp_path: Path) -> None:
    assert "there was nothing to protect" in " ".join(read_page(tmp_path, make_run()).text)


def test_many_runs_share_a_page(tmp_path: Path) -> None:
    """A plot's names are its own, its colours the page's, and nobody's name becomes a tag."""
    entries = [
        Entry(f"<script>{rate}", summarise(lively(rate, rate=rate)), about=[("cores", "<2>")])
        for rate in (40, 80)
    ]
    entries[1].summary.series.failures.clear()
    write_report(tmp_path / "many.html", entries, "Two <runs>")
    source = (tmp_path / "many.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(source)
    assert "script" not in reader.tags and "<script>40" in reader.text
    assert reader.tags.count("svg") == 3 + 9 + 8
    assert len(set(reader.ids)) == len(reader.ids) > 20
    # Every plot refers to what stands in the page.
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(reader.ids)
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}", drawings)) == set()
    declared = set(re.findall(r"(--[a-z]+):", source))
    assert set(re.findall(r"var\((--[a-z]+)\)", drawings)) <= declared
    text = " ".join(reader.text)
    for word in ("uplink", "network, waiting", "microcontroller", "warm-up", "SLO", "p99.9"):
        assert word in text
    assert "not enough samples" in text and "(" in text


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        write_report(tmp_path / "none.html", [], "None")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(tmp_path, [Entry("", summarise(make_run(duration_s=1)))], "A folder")


def test_an_invalid_run_says_so_first(tmp_path: Path) -> None:
    run = make_run()
    run.table["lag_s"] = 1.0
    text = " ".join(read_page(tmp_path, run).text)
    assert "INVALID: generator lag p99 is 1000 ms" in text


def test_a_run_without_statistics_leaves_those_plots_out(tmp_path: Path) -> None:
    reader = read_page(tmp_path, replace(make_run(), samples=[]))
    assert reader.tags.count("svg") == 5


@pytest.mark.parametrize("terminal", [False, True])
def test_the_live_view_shows_progress(terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with view.live_view(console) as show:
        show(PROGRESS)
    text = screen.getvalue()
    assert "running" in text and "12.0 ms" in text and "123" in text
    assert ("\x1b" in text) == terminal


def test_intervals_are_said_with_their_unit_once() -> None:
    assert view.interval(0.0123, 0.0456) == "12.3 to 45.6 ms"
    assert view.interval(0.5, 1.5) == "0.50 to 1.50 s"
    figures = dict(view.rows(summarise(lively(1))))
    assert re.search(r"p50 [\d.]+ ms \([\d.]+ to [\d.]+ ms\)", figures["latency from schedule"])
    assert figures["latency from send"].endswith("p99.9: not enough samples")
    assert "first 2 s are in no latency" in figures["warm-up"]
    assert "within 100.0 ms" in figures["goodput"] and "beside the offered" in figures["retried"]


def test_the_terminal_report_names_what_it_does_not_know() -> None:
    screen = io.StringIO()
    run = make_run(rate=5)
    view.show(summarise(run), Console(file=screen, width=120))
    text = screen.getvalue()
    assert "p99 p99.9: not enough samples" in text
    assert "50 of 50" in text
