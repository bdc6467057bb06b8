from __future__ import annotations

import base64
import io
import re
import wave
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamix.bundle import LogMelPreprocessing
from datamix.errors import ConfigError
from edge.audit.audio import listen, wav_bytes
from edge.audit.page import render, write_page
from edge.audit.png import png_bytes
from edge.audit.report import Report, Row, exhibit
from edge.data import load_sample
from edge.preprocess import preprocessor

HOSTILE = '<script>alert("1")</script>'


def row(**changes: object) -> Row:
    plain = Row(
        "ica", "mix", "A", "made-up", "ssim", 0.9, 0.85, 0.95, 0.2, 0.15, 0.25, "mean picture",
        "leaks", 4, 48, 1.25, None, "",
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def report(preprocessing: object, **changes: object) -> Report:
    plain = Report(
        bundle="small 1",
        mode="mix",
        promise="mix: obfuscation, no bound",
        known_break="source separation",
        dataset="made-up",
        groups=12,
        k=4,
        seed=0,
        budget_s=60.0,
        capture_sha256="ab" * 32,
        scored=True,
        preprocessing=preprocessing.model_dump(mode="json"),  # type: ignore[attr-defined]
        rows=(row(),),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


IMAGES = load_sample("fashion-mnist")
SPEECH = load_sample("speech-commands")


def sources(page: str) -> list[str]:
    return re.findall(r'(?:src|href)\s*=\s*"?([^"\s>]*)', page)


def test_a_page_says_what_matters_and_fetches_nothing(tmp_path: Path) -> None:
    shown = np.asarray(IMAGES.inputs[:4]) / 255
    found = report(
        IMAGES.preprocessing,
        exhibits=(exhibit("ica", "A", shown, shown, np.zeros_like(shown), (0, 1)),),
    )
    write_page(tmp_path / "deep" / "a.html", found)
    page = (tmp_path / "deep" / "a.html").read_text()
    for words in (
        "mix: obfuscation, no bound", "source separation", "0.900 (0.850 to 0.950)",
        "0.200 (0.150 to 0.250)", "leaks", "no bound", "mean picture",
    ):  # fmt: skip
        assert words in page
    found_sources = sources(page)
    assert len(found_sources) == 12
    assert all(source.startswith("data:image/png;base64,") for source in found_sources)
    assert "http" not in page and "@import" not in page and "url(" not in page
    pixels = unpack(base64.b64decode(found_sources[0].split(",")[1]))
    assert (pixels == np.asarray(IMAGES.inputs[:1])[0]).all()


def test_everything_from_outside_is_escaped() -> None:
    changes = dict.fromkeys(
        ("attack", "metric", "verdict", "notes", "floor_is", "operator"), HOSTILE
    )
    shown = np.zeros((1, 1, 28, 28))
    hostile = dict.fromkeys(("bundle", "mode", "promise", "known_break", "dataset"), HOSTILE)
    page = render(
        report(
            IMAGES.preprocessing,
            rows=(row(**changes),),
            exhibits=(exhibit(HOSTILE, HOSTILE, shown, shown, shown, (0, 1)),),
            capture_sha256=HOSTILE,
            **hostile,
        )
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_rows_without_figures_have_a_page() -> None:
    nothing = dict.fromkeys(("value", "low", "high", "floor", "floor_low", "floor_high"))
    page = render(
        report(
            IMAGES.preprocessing, rows=(row(**nothing, verdict="not scored", n=0),), scored=False
        )
    )
    assert "not scored" in page and "claims are not scored" in page


def test_speech_can_be_seen_and_heard() -> None:
    features = preprocessor(SPEECH.preprocessing)(np.asarray(SPEECH.inputs[:2])) / 3
    found = report(
        SPEECH.preprocessing,
        exhibits=(exhibit("ica", "A", features, features, features * 0, (-1, 1)),),
    )
    kinds = [source.split(";")[0] for source in sources(render(found))]
    assert kinds.count("data:image/png") == kinds.count("data:audio/wav") == 6


def test_an_exhibit_of_another_size_is_refused() -> None:
    shown = np.zeros((1, 1, 28, 28))
    broken = replace(exhibit("a", "A", shown, shown, shown, (0, 1)), shape=(2, 1, 28, 28))
    with pytest.raises(ConfigError):
        render(report(IMAGES.preprocessing, exhibits=(broken,)))
    with pytest.raises(ConfigError):
        render(replace(report(IMAGES.preprocessing), preprocessing={"kind": "smell"}))


# ------------------------------------------------------------------ files


def unpack(body: bytes) -> np.ndarray:
    """The pixels of a PNG, by its specification."""
    assert body[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(body[at : at + 4], "big") for at in (16, 20))
    channels = 1 if body[25] == 0 else 3
    at = body.index(b"IDAT")
    length = int.from_bytes(body[at - 4 : at], "big")
    data = body[at + 4 : at + 4 + length]
    assert zlib.crc32(b"IDAT" + data) == int.from_bytes(body[at + 4 + length :][:4], "big")
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_survive_png(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7)).astype(np.uint8)
    assert (unpack(png_bytes(pixels)) == pixels).all()


def test_png_agrees_with_a_library() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    found = np.asarray(image.open(io.BytesIO(png_bytes(pixels))))
    assert (found.transpose(2, 0, 1) == pixels).all()


def test_png_refuses() -> None:
    for pixels in (
        np.zeros((2, 3, 3), np.uint8),
        np.zeros((1, 3, 3)),
        np.zeros((1, 0, 3), np.uint8),
    ):
        with pytest.raises(ConfigError):
            png_bytes(pixels)  # type: ignore[arg-type]


def test_a_clip_that_is_listened_to_has_nearly_the_features_it_was_made_of() -> None:
    preprocessing = SPEECH.preprocessing
    assert isinstance(preprocessing, LogMelPreprocessing)
    transform = preprocessor(preprocessing)
    for raw in np.asarray(SPEECH.inputs[:3]):
        features = transform(raw[None])[0]
        clip = listen(preprocessing, features)
        again = transform(np.clip(clip, -1, 1).astype(np.float32)[None])[0]
        loud = features > features.mean()
        assert np.corrcoef(again[loud], features[loud])[0, 1] > 0.9
        assert np.abs(again - features)[loud].mean() < 0.35
    with pytest.raises(ConfigError):
        listen(preprocessing, np.zeros((1, 2, 3)))


def test_wav_is_what_a_player_reads() -> None:
    with wave.open(io.BytesIO(wav_bytes(np.array([0.0, 0.25, -0.5]), 16_000))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        assert list(np.frombuffer(file.readframes(3), "<i2")) == [0, 16384, -32767]
    assert wav_bytes(np.zeros(2), 8000)[-4:] == bytes(4)
