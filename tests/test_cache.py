"""The answer cache: a repeated input hits, everything else misses, and the oldest goes first."""

from __future__ import annotations

import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamix.bundle import Manifest
from datamix.errors import ConfigError
from edge.cache import AnswerCache
from tests.fake_device import FakeDevice

ROOT = Path(__file__).parents[1]
MANIFEST = FakeDevice().manifest
CLASSES = len(MANIFEST.class_names)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.db"


def images(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 6, 6), dtype=np.uint8)


def answers(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, CLASSES)).astype(np.float32)


def other(**changes: Any) -> Manifest:
    return MANIFEST.model_copy(update=changes)


def test_a_repeated_input_is_answered_even_after_a_restart(path: Path) -> None:
    x, y = images(5), answers(5)
    with AnswerCache(path, MANIFEST) as cache:
        hits, outputs = cache.lookup(x)
        assert not hits.any() and not outputs.any()
        assert (hits.shape, str(hits.dtype)) == ((5,), "bool")
        assert (outputs.shape, str(outputs.dtype)) == ((5, CLASSES), "float32")
        cache.store(x[1:4], y[1:4])
    with AnswerCache(path, MANIFEST) as cache:
        hits, outputs = cache.lookup(x[::-1])  # by content, not by place or memory layout
        assert hits.tolist() == [False, True, True, True, False]
        assert np.array_equal(outputs[1:4], y[3:0:-1])
        assert len(cache) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("manifest", "mode"),
    [
        (other(name="another"), None),
        (other(version="99"), None),
        (other(hashes=MANIFEST.hashes | {"device.safetensors": "f" * 64}), None),
        (MANIFEST, "split"),
    ],
)
def test_another_bundle_or_mode_does_not_hit(
    path: Path, manifest: Manifest, mode: str | None
) -> None:
    x, y = images(2), answers(2)
    with AnswerCache(path, MANIFEST) as cache, AnswerCache(path, manifest, mode=mode) as elsewhere:
        cache.store(x, y)
        assert not elsewhere.lookup(x)[0].any()
        elsewhere.store(x, y + 1)
        assert np.array_equal(cache.lookup(x)[1], y)
        assert np.array_equal(elsewhere.lookup(x)[1], y + 1)


def test_the_same_bytes_of_another_type_or_shape_do_not_hit(path: Path) -> None:
    x = images(2)
    with AnswerCache(path, MANIFEST) as cache:
        cache.store(x, answers(2))
        for changed in (x.view(np.int8), x.reshape(2, 1, 4, 9), x.reshape(2, -1), x ^ 1):
            assert not cache.lookup(changed)[0].any()
        assert cache.lookup(np.asfortranarray(x))[0].all()


def test_an_answer_that_is_there_stays(path: Path) -> None:
    x, y = images(1), answers(1)
    with AnswerCache(path, MANIFEST) as cache:
        cache.store(x, y)
        cache.store(x, y + 1)
        assert np.array_equal(cache.lookup(x)[1], y)


def test_the_least_recently_used_goes(path: Path) -> None:
    x, y = images(5), answers(5)
    with AnswerCache(path, MANIFEST, max_entries=3) as cache:
        cache.store(x[:3], y[:3])
        cache.lookup(x[:1])
        cache.store(x[3:4], y[3:4])
        assert cache.lookup(x)[0].tolist() == [True, False, True, True, False]
        cache.store(x[2:3], y[2:3])  # storing is using too
        cache.lookup(x[:1])
    with AnswerCache(path, MANIFEST, max_entries=3) as cache:
        cache.store(x[4:], y[4:])
        assert cache.lookup(x)[0].tolist() == [True, False, True, False, True]
    with AnswerCache(path, MANIFEST, max_entries=1) as cache:
        cache.store(x[:0], y[:0])
        assert cache.lookup(x)[0].tolist() == [False] * 4 + [True]
        cache.store(x, y)
        assert len(cache) == 1


STEPS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 5), max_size=4)), max_size=12)


@settings(max_examples=25, deadline=None)
@given(STEPS, st.integers(1, 4))
def test_it_is_a_dictionary_of_bounded_size(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, list[int]]], size: int
) -> None:
    """Against an ordered dictionary; any stores and look-ups, repeats within a batch."""
    x, y = images(6), answers(6)
    model: dict[int, None] = {}
    path = tmp_path_factory.mktemp("cache") / "answers.db"
    with AnswerCache(path, MANIFEST, max_entries=size) as cache:
        for stores, which in steps:
            if stores:
                cache.store(x[which], y[which])
            else:
                hits, outputs = cache.lookup(x[which])
                assert hits.tolist() == [index in model for index in which]
                assert np.array_equal(outputs, np.where(hits[:, None], y[which], 0))
            for index in which:
                if stores or index in model:
                    model.pop(index, None)
                    model[index] = None
            while len(model) > size:
                del model[next(iter(model))]
            assert len(cache) == len(model)


def test_processes_share_it(path: Path) -> None:
    code = (
        "import sys; from tests.test_cache import *; i = int(sys.argv[2])\n"
        "with AnswerCache(sys.argv[1], MANIFEST) as cache:\n"
        "    for k in range(10): cache.store(images(3, 10 * i + k), answers(3, 10 * i + k))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(index)], cwd=ROOT)
        for index in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    with AnswerCache(path, MANIFEST) as cache:
        assert len(cache) == 60  # under one key, whoever drew it
        for seed in range(20):
            hits, outputs = cache.lookup(images(3, seed))
            assert hits.all() and np.array_equal(outputs, answers(3, seed))


def test_another_file_has_another_key_and_none_holds_an_input(tmp_path: Path) -> None:
    x, found = images(1), []
    for name in ("a", "b"):
        with AnswerCache(tmp_path / name, MANIFEST) as cache:
            cache.store(x, answers(1))
            assert "secret" not in repr(cache)
        connection = sqlite3.connect(tmp_path / name)
        found += connection.execute("SELECT key, digest FROM secret, answer").fetchall()
        connection.close()
        assert x.tobytes() not in (tmp_path / name).read_bytes()
    assert len({value for pair in found for value in pair}) == 4


def test_what_goes_is_overwritten(path: Path) -> None:
    x, y = images(40), answers(40)
    with AnswerCache(path, MANIFEST, max_entries=40) as cache:
        cache.store(x, y)
    assert y[0].tobytes() in path.read_bytes()
    with AnswerCache(path, MANIFEST, max_entries=1) as cache:
        cache.store(x[39:], y[39:])
    content = path.read_bytes()
    assert [row.tobytes() in content for row in y] == [False] * 39 + [True]


@pytest.mark.parametrize(
    ("inputs", "outputs", "sentence"),
    [
        (images(2), answers(3), "outputs have shape"),
        (images(2), answers(2)[:, 1:], "outputs have shape"),
        (images(2), np.full((2, CLASSES), np.nan), "outputs hold NaN or Inf"),
        (images(2)[0, 0, 0, 0], answers(1), "expected rows of numbers"),
        (np.array(["a", "b"]), answers(2), "expected rows of numbers"),
        (np.array([None, print]), answers(2), "expected rows of numbers"),
    ],
)
def test_bad_arrays(path: Path, inputs: Any, outputs: Any, sentence: str) -> None:
    with AnswerCache(path, MANIFEST) as cache:
        with pytest.raises(ConfigError, match=sentence):
            cache.store(np.asarray(inputs), outputs)
        assert len(cache) == 0


def test_bad_settings(path: Path) -> None:
    with pytest.raises(ConfigError, match="max_entries is 0, expected at least 1"):
        AnswerCache(path, MANIFEST, max_entries=0)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ledger.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    names: dict[str, Any] = {"inputs": images(3)}
    exec(compile(example, "docs/ledger.md", "exec"), names)
    assert not names["hits"].any() and names["outputs"].shape == (3, 10)
    assert names["spent"].unbounded == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("INSERT INTO secret SELECT zeroblob(32)", "it has 2 keys, expected one"),
        ("UPDATE answer SET outputs = zeroblob(4)", "an answer has 4 bytes, expected"),
        ("UPDATE answer SET outputs = unhex40('0000c07f')", "an answer holds NaN or Inf"),
        ("UPDATE secret SET key = zeroblob(31)", "its pages or rows do not fit together"),
        ("UPDATE answer SET used = -1", "its pages or rows do not fit together"),
    ],
)
def test_a_damaged_file(path: Path, change: str, sentence: str) -> None:
    x = images(1)
    with AnswerCache(path, MANIFEST) as cache:
        cache.store(x, answers(1))
    connection = sqlite3.connect(path)
    connection.create_function("unhex40", 1, lambda text: bytes.fromhex(text) * CLASSES)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute(change)
    connection.commit()
    connection.close()
    expected = pytest.raises(ConfigError, match=f"or no answer cache at all: {sentence}")
    with expected, AnswerCache(path, MANIFEST) as cache:
        cache.lookup(x)
