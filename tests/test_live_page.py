"""The live page: its server, and the page itself in a real browser."""

from __future__ import annotations

import contextlib
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster.monitoring.board import live_panels
from cluster.monitoring.live import STATES, Live, Prometheus, serving
from cluster.monitoring.top import render, watch
from datamix.errors import ConfigError
from tests.browser import find_chromium
from tests.fake_prometheus import FakePrometheus, prometheus

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE_MS = 20_000
ALERT = {
    "labels": {"alertname": "DatamixSloBurn", "severity": "page"},
    "annotations": {"summary": "the error budget burns", "runbook_url": "x/runbooks/slo-burn.md"},
    "state": "firing",
    "activeAt": "2026-01-01T00:00:00Z",
}


def busy(fake: FakePrometheus, level: float) -> None:
    """Something in every panel."""
    for panel in live_panels():
        if panel.kind == "heat":
            bounds = ("0.001", "0.01", "0.1", "+Inf")
            fake.values[panel.name] = [
                ({"le": bound}, level * (n + 1)) for n, bound in enumerate(bounds)
            ]
        else:
            label = panel.queries[0].legend.partition("{{")[2].partition("}}")[0] or "none"
            fake.values[panel.name] = [
                ({label: f"{panel.name}-{n}"}, level * (n + 1)) for n in (0, 1)
            ]


@contextlib.contextmanager
def page_of(fake: FakePrometheus) -> Iterator[tuple[str, Live]]:
    with (
        contextlib.closing(Prometheus(fake.url)) as server,
        contextlib.closing(Live(server)) as live,
        serving(live, port=0) as url,
    ):
        yield url, live


def get(url: str) -> tuple[int, str, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.headers["content-type"], reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["content-type"], error.read()


# --- the server ---------------------------------------------------------------------------------


def test_values_and_history_of_every_panel() -> None:
    with prometheus() as fake, page_of(fake) as (url, _):
        busy(fake, 0.25)
        now = json.loads(get(f"{url}/live.json")[2])
        past = json.loads(get(f"{url}/history.json")[2])
    assert now["state"] == "ok" and now["alerts"] == []
    assert set(now["panels"]) == {panel.name for panel in live_panels()}
    (first, second) = now["panels"]["engine_busy"]
    assert (first["legend"], first["points"][0][1]) == ("engine_busy-0", 0.25)
    assert second["points"][0][1] == 0.5
    told = {panel["name"]: panel for panel in past["panels"]}
    assert len(told["engine_busy"]["series"][0]["points"]) == 5
    assert told["versions"]["series"] == []  # of a table there is only what is now


def test_prometheus_is_asked_once_a_second_whoever_looks() -> None:
    now_s = 0.0
    with (
        prometheus() as fake,
        contextlib.closing(Prometheus(fake.url)) as server,
        contextlib.closing(Live(server, clock=lambda: now_s)) as live,
    ):
        live.now()
        asked = fake.queries
        for _ in range(20):
            live.now()
        assert fake.queries == asked
        now_s = 1.5
        live.now()
        assert fake.queries == 2 * asked


def test_it_says_how_the_cluster_is() -> None:
    with prometheus() as fake, contextlib.closing(Prometheus(fake.url)) as server:
        ticks = iter(range(0, 100, 2))
        with contextlib.closing(Live(server, clock=lambda: float(next(ticks)))) as live:
            assert live.now()["state"] == "ok"
            fake.up = [False, False]
            assert live.now()["state"] == "cloud down"
            fake.up, fake.seen = [True, False], False
            assert live.now()["state"] == "no data"
            fake.refuses = True
            assert live.now() | {"time": 0} == {
                "time": 0,
                "state": "no prometheus",
                "panels": {},
                "alerts": [],
            }


def test_values_that_json_does_not_know_are_left_out() -> None:
    with prometheus() as fake, page_of(fake) as (url, _):
        fake.values["predicted_wait"] = [({}, float("nan"))]
        fake.values["queue_rows"] = [({"model": "m"}, float("inf"))]
        status, _, body = get(f"{url}/live.json")
    assert status == 200
    assert json.loads(body)["panels"]["predicted_wait"][0]["points"] == []
    assert json.loads(body)["panels"]["queue_rows"][0]["points"] == []


@pytest.mark.parametrize(
    "path",
    [
        *("/api/v1/query?query=up", "/..", "/../top.py", "/%2e%2e/top.py", "/.hidden", "/live"),
        *("/runbooks/../privacy", "/runbooks/none", "/runbooks/", "//etc/passwd"),
    ],
)
def test_nothing_else_is_served(path: str) -> None:
    with prometheus() as fake, page_of(fake) as (url, _):
        assert get(url + path)[0] == 404
        assert fake.queries == 0


def test_the_page_comes_with_all_it_needs() -> None:
    with prometheus() as fake, page_of(fake) as (url, _):
        status, kind, body = get(url)
        assert status == 200 and kind.startswith("text/html") and b"://" not in body
        for name in ("live.js", "live.css", "uPlot.iife.min.js", "uPlot.min.css", "uPlot-LICENSE"):
            assert get(f"{url}/{name}")[0] == 200


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(ConfigError, match="prometheus is 'localhost:9090', expected a URL"):
        Prometheus("localhost:9090")
    with prometheus() as fake, page_of(fake) as (url, live):
        port = int(url.rpartition(":")[2])
        taken = pytest.raises(ConfigError, match=f"port {port} cannot be used")
        with taken, serving(live, port=port):
            pass


# --- the terminal -------------------------------------------------------------------------------


def text_of(live: Live) -> str:
    console = Console(file=io.StringIO(), width=150, force_terminal=False)
    watch(live, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_top_shows_the_same_figures() -> None:
    with prometheus() as fake, page_of(fake) as (_, live):
        busy(fake, 0.25)
        fake.alerts = [ALERT]
        said = text_of(live)
    for panel in live_panels():
        assert panel.title in said
    assert STATES["ok"] in said and "ALERT DatamixSloBurn: the error budget burns" in said
    assert "engine_busy-0" in said and "25.0%" in said


def test_top_says_that_there_is_no_data() -> None:
    with prometheus() as fake, page_of(fake) as (_, live):
        fake.refuses = True
        assert STATES["no prometheus"] in text_of(live)
    for state in STATES:
        Console(file=io.StringIO()).print(render({"state": state, "alerts": [], "panels": {}}))


# --- the page -----------------------------------------------------------------------------------

CHROMIUM = find_chromium()
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield made
        made.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page that may say nothing on its console."""
    said: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    try:
        yield page
        assert said == []
    finally:
        context.close()


def state_is(page: Page, name: str) -> None:
    page.wait_for_selector(f'#state[data-state="{name}"]')
    assert page.inner_text("#state") == STATES[name]  # type: ignore[index]


@pytest.mark.browser
@in_browser
def test_real_data_moves(browser: Browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    with prometheus() as fake, page_of(fake) as (url, _):
        busy(fake, 0.25)
        with opened(browser, url, viewport={"width": 1400, "height": 900}) as page:
            state_is(page, "ok")
            for panel in live_panels():
                place = page.locator(f"#panel-{panel.name}")
                assert place.locator("h2").inner_text() == panel.title
                assert not place.locator(".empty").is_visible()
            chart = page.locator("#panel-engine_busy .chart")
            assert "engine_busy-0 25%" in str(chart.get_attribute("aria-label"))
            busy(fake, 0.75)
            expect(chart).to_have_attribute(
                "aria-label", re.compile("engine_busy-0 75%"), timeout=PATIENCE_MS
            )
            for name in ("engine_busy", "queue_heat"):
                picture = tmp_path / f"{name}.png"
                page.locator(f"#panel-{name} .chart").screenshot(path=picture)
                with Image.open(picture) as image:
                    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
                assert len(np.unique(pixels, axis=0)) > 20, name  # lines or cells, and letters
            # A table has the newest values, and what has gone is gone.
            fake.values["versions"] = [({"model": "m", "version": "2", "state": "current"}, 3.0)]
            table = page.locator("#panel-versions tbody")
            expect(table).to_contain_text("m 2 current", timeout=PATIENCE_MS)
            expect(table).not_to_contain_text("versions-0", timeout=PATIENCE_MS)


@pytest.mark.browser
@in_browser
def test_the_page_says_what_is_wrong(browser: Browser) -> None:
    with prometheus() as fake, page_of(fake) as (url, _):
        fake.seen = False
        with opened(browser, url) as page:
            state_is(page, "no data")
            assert page.locator(".empty:visible").count() == len(live_panels())
            assert not page.is_visible("#alerts")
            fake.up = [False]
            state_is(page, "cloud down")
            fake.up, fake.seen, fake.alerts = [True], True, [ALERT, ALERT | {"state": "pending"}]
            busy(fake, 0.5)
            page.wait_for_selector("#alerts:visible")
            state_is(page, "ok")
            assert page.locator("#alerts li").count() == 1
            assert "DatamixSloBurn (page): the error budget burns" in page.inner_text("#alerts")
            fake.alerts = []
            page.wait_for_selector("#alerts", state="hidden")
            fake.refuses = True
            state_is(page, "no prometheus")
            # What was known stays on the screen.
            assert page.locator(".empty:visible").count() == 0


@pytest.mark.browser
@in_browser
def test_the_page_works_by_keyboard_on_a_phone_and_in_the_dark(browser: Browser) -> None:
    with prometheus() as fake, page_of(fake) as (url, _):
        busy(fake, 0.25)
        phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
        with opened(browser, url, **phone) as page:
            state_is(page, "ok")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert max(map(int, ground.strip("rgb()").split(","))) < 60
            toggle = page.locator("#panel-requests .toggle")
            toggle.focus()
            page.keyboard.press("Enter")
            assert toggle.get_attribute("aria-pressed") == "true"
            assert "requests-0" in page.inner_text("#panel-requests tbody")
            assert not page.is_visible("#panel-requests .chart")
            for panel in live_panels():
                place = page.locator(f"#panel-{panel.name}")
                assert place.get_attribute("aria-labelledby") == f"title-{panel.name}"
                assert place.get_attribute("tabindex") == "0"
