"""Settings: good ones are read, every bad one is refused in one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.config import Config

ECHO: dict[str, Any] = {"engine": "null", "echo_shape": (2, 3, 3)}


def refusal(**settings: Any) -> str:
    """What the one refusal says, after the name of the setting."""
    with pytest.raises(ValidationError) as raised:
        Config(**settings)
    errors = raised.value.errors()
    assert len(errors) == 1, errors
    place = ".".join(str(part) for part in errors[0]["loc"])
    message = errors[0]["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def test_defaults_serve_a_bundle_on_the_processor() -> None:
    config = Config(bundle="some/where")
    assert (config.engine, config.device, config.dtype) == ("torch", "cpu", "float32")
    assert config.max_request_rows <= config.max_batch_rows <= config.max_queue_rows


def test_settings_may_come_as_text() -> None:
    """`serve run deployments.app:app key=value` gives every value as a string."""
    config = Config.model_validate(
        {"bundle": "b", "max_batch_rows": "512", "channels_last": "true", "health_timeout_s": "2.5"}
    )
    assert (config.max_batch_rows, config.channels_last) == (512, True)
    assert Config.model_validate({"bundle": "b", "channels_last": "auto"}).channels_last == "auto"
    assert config.health_timeout_s == 2.5


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(device: str) -> None:
    assert Config(bundle="b", device=device).device == device


@pytest.mark.parametrize("engine", ["null", "emulated:0.01,0.0005", "emulated:0,0"])
def test_an_engine_without_a_network_needs_no_bundle(engine: str) -> None:
    assert Config(engine=engine, echo_shape=(2, 3, 3)).bundle is None
    assert Config(engine=engine, bundle="b").echo_shape is None


@pytest.mark.parametrize("name", ["", "a", "acme.example", "Acme-2_eu", "a" * 64])
def test_operators(name: str) -> None:
    assert Config(**ECHO, operator=name).operator == name


def test_a_config_cannot_be_changed() -> None:
    config = Config(**ECHO)
    with pytest.raises(ValidationError, match="frozen"):
        config.max_batch_rows = 2


@pytest.mark.parametrize("key", ["max_bach_rows", "token", "replicas"])
def test_unknown_keys_are_refused(key: str) -> None:
    assert refusal(**ECHO, **{key: 1}) == f"{key}: Extra inputs are not permitted"


NO_BUNDLE = "no bundle is given; only a null or emulated engine with echo_shape can do without"
OPERATOR = "'^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$'"
ENGINE = "expected torch, null, emulated:a_s,b_s in seconds or emulated:PATH.json"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, NO_BUNDLE),
        ({"engine": "torch", "echo_shape": (2, 3, 3)}, NO_BUNDLE),
        ({"engine": "null"}, NO_BUNDLE),
        ({"engine": "emulated:0.1,0.1"}, NO_BUNDLE),
        ({"bundle": "b", "engine": "onnx"}, f"engine is 'onnx', {ENGINE}"),
        ({"bundle": "b", "engine": "emulated:fast"}, f"engine is 'emulated:fast', {ENGINE}"),
        ({"bundle": "b", "engine": "emulated:-1,0"}, f"engine is 'emulated:-1,0', {ENGINE}"),
        (
            {"bundle": "b", "max_request_rows": 300},
            "max_request_rows is 300, expected at most max_batch_rows (256), as a request never "
            "splits",
        ),
        (
            {"bundle": "b", "max_queue_rows": 100},
            "max_request_rows is 128, expected at most max_queue_rows (100), or the largest "
            "requests would be shed for ever",
        ),
        (
            {"bundle": "b", "max_queue_bytes": 16 << 20, "max_request_bytes": (8 << 20) + 1},
            "max_queue_bytes is 16777216, expected at least twice max_request_bytes (8388609), "
            "or the largest requests would be shed for ever",
        ),
        (
            {"bundle": "b", "dtype": "float64"},
            "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        (
            {"bundle": "b", "dtype": "float16"},
            "dtype is 'float16', expected another one on the processor",
        ),
        ({"bundle": "b", "threads": 0}, "threads: Input should be greater than or equal to 1"),
        (
            {"bundle": "b", "max_request_bytes": 17 << 20},
            "max_request_bytes: Input should be less than or equal to 16777216",
        ),
        (
            {"bundle": "b", "max_request_bytes": 1023},
            "max_request_bytes: Input should be greater than or equal to 1024",
        ),
        (
            {"bundle": "b", "health_timeout_s": 0},
            "health_timeout_s: Input should be greater than 0",
        ),
        (
            {"bundle": "b", "health_timeout_s": float("inf")},
            "health_timeout_s: Input should be a finite number",
        ),
        *(
            ({"bundle": "b", key: 0}, f"{key}: Input should be greater than 0")
            for key in ("stream_idle_timeout_s", "slow_reader_timeout_s")
        ),
        (
            {"bundle": "b", "max_stream_buffer_bytes": 65535},
            "max_stream_buffer_bytes: Input should be greater than or equal to 65536",
        ),
        (
            {"bundle": "b", "tokens_file": ""},
            "tokens_file: String should have at least 1 character",
        ),
        *(
            ({"bundle": "b", "operator": name}, f"operator: String should match pattern {OPERATOR}")
            for name in ("-acme", "ac me", "acme\n", "acme;", "é", "a" * 65, "<b>")
        ),
        ({"engine": "null", "echo_shape": (2, 0)}, "echo_shape.1: Input should be greater than 0"),
        (
            {"engine": "null", "echo_shape": ()},
            "echo_shape: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            {"bundle": "b", "device": "gpu"},
            "engine device is 'gpu', expected cpu, cuda or cuda:N",
        ),
        *(
            ({"bundle": "b", key: 0}, f"{key}: Input should be greater than or equal to 1")
            for key in (
                "max_batch_rows",
                "max_queue_rows",
                "max_queue_bytes",
                "max_request_rows",
                "max_stream_requests",
            )
        ),
    ],
)
def test_refusals(settings: dict[str, Any], sentence: str) -> None:
    assert refusal(**settings) == sentence
