"""Profiles: good ones become engines, every bad one is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamix.errors import ConfigError
from deployments.config import Config
from deployments.emulated import Cost, EmulatedEngine
from deployments.model import build_engine
from deployments.profile import Profile, emulate, read_profile

GOOD: dict[str, Any] = {
    "schema_version": 1,
    "name": "some-machine",
    "machine": "4 cores of something",
    "engine": "torch:cpu:float32",
    "max_batch_rows": 64,
    "depth": 2,
    "blocks": [
        {"a_s": 0.001, "b_s": 0.0001, "copy_a_s": 0.0001, "copy_b_s": 0.00001, "fit_error": 0.1},
        {"a_s": 0.002, "b_s": 0.0002, "measured": [{"rows": 1, "compute_s": 0.0022}]},
    ],
}
SHAPES = [(2, 3, 3), (4, 1, 1)]


def write(folder: Path, profile: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(profile if isinstance(profile, str) else json.dumps(profile))
    return path


# --- reading ------------------------------------------------------------------------------------


def test_a_profile_is_read(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path, GOOD))
    assert (profile.name, profile.max_batch_rows, profile.depth) == ("some-machine", 64, 2)
    assert [block.cost for block in profile.blocks] == [
        Cost(0.001, 0.0001, 0.0001, 0.00001),
        Cost(0.002, 0.0002),
    ]
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"name": "a b"}, "name: String should match pattern"),
        ({"blocks": []}, "blocks: Tuple should have at least 1 item"),
        ({"blocks": [{"a_s": -1, "b_s": 0}]}, "blocks.0.a_s: Input should be greater than or"),
        ({"blocks": [{"a_s": 0}]}, "blocks.0.b_s: Field required"),
        ({"blocks": [{"a_s": 0, "b_s": "x"}]}, "blocks.0.b_s: Input should be a valid number"),
        ({"blocks": [{"a_s": 0, "b_s": 4000}]}, "blocks.0.b_s: Input should be less than or"),
        ({"blocks": [{"a_s": 0, "b_s": 0, "c": 0}]}, "blocks.0.c: Extra inputs are not permitted"),
        ({"max_batch_rows": 0}, "max_batch_rows: Input should be greater than or equal to 1"),
        ({"depth": 3}, "depth: Input should be 1 or 2"),
    ],
)
def test_bad_profiles(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = write(tmp_path, GOOD | change)
    with pytest.raises(ConfigError) as raised:
        read_profile(path)
    assert str(raised.value).startswith(f"profile {str(path)!r}: {sentence}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"a_s": NaN}', "\x00"])
def test_what_is_no_profile_at_all(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^profile '.*profile.json': "):
        read_profile(write(tmp_path, text))


def test_infinity_is_no_duration(tmp_path: Path) -> None:
    text = json.dumps(GOOD).replace("0.0002", "Infinity")
    with pytest.raises(ConfigError, match="blocks.1.b_s: Input should be"):
        read_profile(write(tmp_path, text))


def test_a_profile_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory$"):
        read_profile(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory$"):
        read_profile(tmp_path)
    with pytest.raises(ConfigError, match="has more than 1048576 bytes$"):
        read_profile(write(tmp_path, " " * ((1 << 20) + 1)))


# --- serving ------------------------------------------------------------------------------------


def test_an_engine_is_made_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = Config(
        engine=f"emulated:{path}", echo_shape=(2, 3, 3), max_batch_rows=64, max_request_rows=8
    )
    _, engine = build_engine(config, None)
    assert isinstance(engine, EmulatedEngine)
    assert (engine.name, engine.depth) == ("emulated:some-machine", 2)
    assert [block.input_shape for block in engine.blocks] == [(2, 3, 3)] * 2
    assert engine.costs[1] == Cost(0.002, 0.0002)


def test_it_has_to_fit() -> None:
    profile = Profile.model_validate(GOOD)
    assert emulate(profile, SHAPES, 64).blocks[1].input_shape == (4, 1, 1)
    with pytest.raises(ConfigError) as raised:
        emulate(profile, SHAPES[:1], 64)
    assert str(raised.value) == "profile 'some-machine' has 2 blocks, expected 1"
    with pytest.raises(ConfigError) as raised:
        emulate(profile, SHAPES, 65)
    assert str(raised.value) == (
        "max_batch_rows is 65, expected at most 64, the largest batch that profile 'some-machine' "
        "knows"
    )
