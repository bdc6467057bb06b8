"""The report as one HTML file that fetches nothing: table, pictures, sound."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from datamix.bundle import LogMelPreprocessing, Preprocessing
from datamix.errors import ConfigError
from edge.audit.audio import listen, wav_bytes
from edge.audit.observation import from_pictures
from edge.audit.png import png_bytes
from edge.audit.report import Exhibit, Report, Row

_MEMBERS = 8
_CLIPS = 3
_KINDS = (("original", "sent"), ("recovered", "recovered"), ("floor", "guessed (floor)"))
_HEAD = (
    "attack", "operator", "metric", "figure", "floor", "how the floor was found", "of",
    "bits at most", "seconds", "verdict", "notes",
)  # fmt: skip
_PREPROCESSING: TypeAdapter[Preprocessing] = TypeAdapter(Preprocessing)

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8886; padding: .3rem .7rem; text-align: left; vertical-align: top }
.wide { overflow-x: auto }
.leaks, .failed { color: #c22; font-weight: 600 }
.bounded { color: #a60; font-weight: 600 }
img { image-rendering: pixelated; width: 6rem; margin: 1px }
img.sound { width: 12rem }
audio { height: 2rem; width: 12rem }
"""  # noqa: E501


def write_page(path: Path, report: Report) -> None:
    """Write the page.

    Raises:
        ConfigError: it cannot be written, or an exhibit is broken.
    """
    page = render(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be written: {error.strerror}") from None


def render(report: Report) -> str:
    """The page; everything that comes from outside is escaped."""
    sound = _sound(report)
    title = f"Privacy audit of {report.bundle}, mode {report.mode}"
    scored = (
        f"{report.groups} inferences of groups of {report.k}"
        if report.scored
        else f"groups of {report.k}; the truth is not known, so claims are not scored"
    )
    facts = (
        ("Promise", report.promise),
        ("Known break", report.known_break),
        ("Data", f"{report.dataset}: {scored}, seed {report.seed}"),
        ("Budget", f"{report.budget_s:g} s for all attacks"),
        ("Capture", f"sha256 {report.capture_sha256}"),
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        "<table>",
        *(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts),
        "</table>",
        "<h2>Attacks</h2>",
        "<p>Each figure stands beside its floor: what an attacker without the observation reaches, "
        "matched by the same oracle. In brackets: 95% intervals. &ldquo;At the floor&rdquo; says "
        "that this attack told nothing that guessing does not; another may.</p>",
        _table(report.rows),
    ]
    if report.exhibits:
        parts.append("<h2>The first group, as sent and as recovered</h2>")
        parts += [_exhibit(shown, sound) for shown in report.exhibits]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def figure(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval; a dash where there is none."""
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    lines = [f'<div class="wide"><table><tr>{head}</tr>']
    for row in rows:
        kind = escape(row.verdict.split(" ")[0], quote=True)
        cells = (
            row.attack,
            row.operator,
            row.metric,
            figure(row.value, row.low, row.high),
            figure(row.floor, row.floor_low, row.floor_high),
            row.floor_is,
            f"{row.n:,}" if row.n else "-",
            "no bound" if row.bound_bits is None else f"{row.bound_bits:.3g}",
            f"{row.seconds:.1f}",
        )
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells))
        lines.append(f'<td class="{kind}">{escape(row.verdict)}</td><td>{escape(row.notes)}</td>')
        lines.append("</tr>")
    return "\n".join([*lines, "</table></div>"])


def _exhibit(shown: Exhibit, sound: LogMelPreprocessing | None) -> str:
    heading = f"<h3>{escape(shown.attack)}, operator {escape(shown.operator)}</h3>"
    lines = [heading, '<div class="wide"><table>']
    for which, label in _KINDS:
        cells = "".join(_cells(shown.pixels(which), sound, label))
        lines.append(f"<tr><th>{label}</th>{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])


def _cells(
    pixels: npt.NDArray[np.uint8], sound: LogMelPreprocessing | None, label: str
) -> Iterator[str]:
    for index, member in enumerate(pixels[:_MEMBERS]):
        if sound is None:
            yield f"<td>{_image(member, label, '')}</td>"
            continue
        # Low frequencies at the bottom, as spectrograms are drawn.
        spectrogram = _image(np.ascontiguousarray(member[:, ::-1]), label, ' class="sound"')
        player = _player(member, sound) if index < _CLIPS else ""
        yield f"<td>{spectrogram}<br>{player}</td>"


def _image(pixels: npt.NDArray[np.uint8], label: str, more: str) -> str:
    if len(pixels) not in (1, 3):
        pixels = pixels[:1]  # of other sensors: the first channel
    return f'<img alt="{escape(label)}"{more} src="{_data("image/png", png_bytes(pixels))}">'


def _player(member: npt.NDArray[np.uint8], sound: LogMelPreprocessing) -> str:
    features = from_pictures(sound, member.astype(np.float32) / 127.5 - 1)
    body = wav_bytes(listen(sound, features), sound.sample_rate)
    return f'<audio controls preload="none" src="{_data("audio/wav", body)}"></audio>'


def _data(media_type: str, body: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(body).decode()}"


def _sound(report: Report) -> LogMelPreprocessing | None:
    try:
        found = _PREPROCESSING.validate_python(report.preprocessing, strict=False)
    except ValidationError:
        raise ConfigError("the report's preprocessing is not one of a bundle") from None
    return found if isinstance(found, LogMelPreprocessing) else None
