"""The page in a real browser: silent console, every plot on the screen, light, dark and narrow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge.fleet.page import Entry, write_report
from edge.fleet.report import summarise
from tests.browser import Browser, Layout, find_chromium
from tests.fleet_runs import lively

pytestmark = pytest.mark.browser

PLOTS = [
    "Percentiles against load",
    "Goodput against load",
    "Use against load",
    "Latency over time",
    "How many wait how long",
    "Offered, answered, retried",
    "Where the time goes",
    "Rows per batch",
    "Batch sizes",
    "Engine use",
    "Failures by kind",
    "Devices by profile",
]
WIDE, PHONE = 1200, 500  # a headless Chromium's window is no narrower than 500


@pytest.fixture(scope="module")
def browser() -> Browser:
    program = find_chromium()
    if program is None:
        pytest.skip("NO CHROMIUM HERE: the page was not opened (on Debian: apt install chromium)")
    return Browser(program)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    runs = [(f"rate-{rate} <b>", lively(rate, rate=rate)) for rate in (50, 100)]
    entries = [Entry(name, summarise(run), about=[("cores", "2")]) for name, run in runs]
    write_report(path, entries, "DataMix: two runs")
    return path


@pytest.fixture(scope="module")
def wide(browser: Browser, page: Path) -> Layout:
    return browser.layout(page, WIDE)


def test_the_console_is_silent(browser: Browser, page: Path, tmp_path: Path) -> None:
    assert browser.console(page) == []
    # Were it not, it would be heard: a script, a picture from elsewhere, an error.
    noisy = tmp_path / "noisy.html"
    body = "<script>1</script><img src='http://127.0.0.1:9/x.png'></body>"
    noisy.write_text(page.read_text().replace("</body>", body))
    said = browser.console(noisy)
    assert len(said) == 2 and all("Content Security Policy" in line for line in said), said


def test_every_plot_has_its_place(wide: Layout) -> None:
    assert [box["heading"] for box in wide.boxes] == [*PLOTS[:3], *PLOTS[3:], *PLOTS[3:]]
    for box in wide.boxes:
        assert box["width"] > 300 and box["height"] > 150, box
        assert box["left"] >= 0 and box["left"] + box["width"] <= WIDE, box
    assert wide.width == wide.window == WIDE


@pytest.mark.parametrize("dark", [False, True])
def test_every_plot_is_drawn(browser: Browser, page: Path, wide: Layout, dark: bool) -> None:
    pixels = browser.picture(page, (WIDE, wide.height), dark).astype(int)
    paper = pixels[5, 5]
    assert (paper.max() < 60) if dark else (paper.min() > 240)
    for box in wide.boxes:
        top, left = int(box["top"]), int(box["left"])
        plot = pixels[top : top + int(box["height"]), left : left + int(box["width"])]
        away = np.abs(plot - paper).max(axis=2)
        inked = away > 100  # lines, text: what a reader sees at once
        assert 0.005 < inked.mean() < 0.5, (box["heading"], inked.mean())
        # Not only in one corner: something in each third, across and down.
        for axis in (0, 1):
            parts = np.array_split(inked.any(axis=1 - axis), 3)
            assert all(part.mean() > 0.1 for part in parts), box["heading"]
        # The plot's own lines or bars, in a colour; in grey they stay apart from the paper.
        coloured = plot.max(axis=2) - plot.min(axis=2) > 60
        assert coloured.sum() > 100, box["heading"]
        grey = plot @ np.array([0.299, 0.587, 0.114])
        ground = paper @ np.array([0.299, 0.587, 0.114])
        assert np.abs(grey[coloured] - ground).mean() > 60, box["heading"]


def test_a_phone_scrolls_down_and_never_sideways(browser: Browser, page: Path) -> None:
    narrow = browser.layout(page, PHONE)
    assert narrow.width == narrow.window == PHONE
    lefts = {round(box["left"]) for box in narrow.boxes}
    assert len(lefts) == 1  # one column
    assert all(box["width"] > 0.9 * (PHONE - 40) for box in narrow.boxes)
