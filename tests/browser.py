"""A real Chromium, headless: what it says, what it shows, and where on the page it shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# As root in a container, without a network, with nothing kept.
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
# Boxes of all figures as a browser lays them out, and what the page is wide and high.
_PROBE = """<script>
const boxes = [...document.querySelectorAll('figure')].map(figure => {
  const box = figure.querySelector('svg').getBoundingClientRect();
  return {heading: figure.querySelector('h3').textContent,
          left: box.left + scrollX, top: box.top + scrollY, width: box.width, height: box.height};
});
const page = document.documentElement;
const probe = document.createElement('pre');
probe.id = 'probe';
probe.textContent = JSON.stringify(
  {boxes, width: page.scrollWidth, height: page.scrollHeight, window: innerWidth});
document.body.append(probe);
</script>"""


@dataclass(frozen=True)
class Layout:
    """How a page is laid out; lengths in CSS pixels.

    Attributes:
        boxes: of each figure's plot: heading, left, top, width, height.
        width: of all there is to scroll to.
        height: of all there is to scroll to.
        window: the window's width.
    """

    boxes: list[dict[str, Any]]
    width: int
    height: int
    window: int


def find_chromium() -> str | None:
    """Where Chromium is, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """Opens files; each time a new browser with an empty profile."""

    def __init__(self, program: str) -> None:
        self._program = program

    def console(self, page: Path) -> list[str]:
        """What the page says on its console: errors, and whatever it was not allowed to do."""
        _, said = self._run(page, "--dump-dom")
        return [line for line in said.splitlines() if "CONSOLE" in line]

    def layout(self, page: Path, width: int) -> Layout:
        """Lay a page out in a window of that width."""
        source = page.read_text(encoding="utf-8")
        # The page allows no script, so the copy that is measured has to.
        source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
        probed = page.with_suffix(".probed.html")
        probed.write_text(source.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
        dom, _ = self._run(probed, "--dump-dom", f"--window-size={width},1000")
        found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[-2000:]
        return Layout(**json.loads(unescape(found[1])))

    def picture(
        self, page: Path, size: tuple[int, int], dark: bool = False
    ) -> npt.NDArray[np.uint8]:
        """(height, width, 3) pixels of a page in a window of ``size``."""
        from PIL import Image

        target = page.with_suffix(".png")
        more = ["--blink-settings=preferredColorScheme=0"] if dark else []
        window = f"--window-size={size[0]},{size[1]}"
        self._run(page, f"--screenshot={target}", window, *more)
        with Image.open(target) as picture:
            return np.asarray(picture.convert("RGB"))

    def _run(self, page: Path, *options: str) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as profile:
            done = subprocess.run(
                [self._program, *_FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()],
                capture_output=True,
                text=True,
                timeout=90,
            )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr
