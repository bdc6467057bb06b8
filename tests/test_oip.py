"""The Open Inference Protocol: what NVIDIA's client sees, and what hostile bodies get."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient as Client
from tritonclient.utils import InferenceServerException

from datamix.bundle import load_backbone
from datamix.errors import DataMixError, NonFinite, TooLarge, WireError
from deployments import oip
from deployments.config import Config
from deployments.engine import Block
from deployments.waiting import Computed, Timing
from tests.real_cloud import PATIENCE_S, SHAPE, Cloud, HttpPeer, Reply, http, rows_of, serving
from tests.served import Served

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "fashion-mnist-mix"
PAGE = (ROOT / "docs" / "oip.md").read_text()
ECHO = Config(
    engine="null",
    echo_shape=SHAPE,
    max_request_bytes=2 << 20,
    max_request_rows=8,
    max_batch_rows=16,
)
TORCH = Config(bundle=str(BUNDLE), threads=1, max_batch_rows=16, max_request_rows=8)
PATH = "/v2/models/echo/infer"
TIMING = Timing(queue_s=0.0012, compute_s=0.0345, batch_rows=6, close_reason="full")
DATATYPES = {np.dtype(np.float16): "FP16", np.dtype(np.float32): "FP32"}


def run(test: Callable[[Cloud], Awaitable[None]], config: Config = ECHO) -> None:
    """Run ``test`` against a replica behind a server."""

    async def go() -> None:
        async with serving(config) as cloud:
            await test(cloud)

    asyncio.run(go())


def run_client(test: Callable[[Client], None], config: Config = ECHO) -> None:
    """Run ``test`` with NVIDIA's client, in a thread beside the replica."""

    async def go(cloud: Cloud) -> None:
        def work() -> None:
            with Client(f"127.0.0.1:{cloud.port}") as client:
                test(client)

        await asyncio.to_thread(work)

    run(go, config)


def tensor_of(rows: np.ndarray[Any, Any], *, binary: bool = True) -> Any:
    tensor = triton.InferInput("features", list(rows.shape), DATATYPES[rows.dtype])
    return tensor.set_data_from_numpy(rows, binary_data=binary)


# --- NVIDIA's client ----------------------------------------------------------------------------


def test_tritonclient_lists_and_checks() -> None:
    def test(client: Client) -> None:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("echo") and client.is_model_ready("echo", "1")
        assert not client.is_model_ready("other") and not client.is_model_ready("echo", "2")
        assert {"binary_tensor_data", "model_configuration"} <= set(
            client.get_server_metadata()["extensions"]
        )
        metadata = client.get_model_metadata("echo", "1")
        assert (metadata["name"], metadata["versions"]) == ("echo", ["1"])
        config = client.get_model_config("echo")
        assert config == client.get_model_config("echo", "1")
        assert (config["name"], config["max_batch_size"]) == ("echo", 8)
        for way, ways in (("input", "inputs"), ("output", "outputs")):
            ((one,), (other,)) = (config[way], metadata[ways])
            assert (one["name"], one["data_type"]) == (other["name"], f"TYPE_{other['datatype']}")
            assert [-1, *one["dims"]] == other["shape"] == [-1, *SHAPE]
        assert client.get_model_repository_index() == [
            {"name": "echo", "version": "1", "state": "READY", "reason": ""}
        ]

    run_client(test)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_tritonclient_infers_on_echo(dtype: str, binary_in: bool, binary_out: bool) -> None:
    rows = rows_of(1, 3).astype(dtype)

    def test(client: Client) -> None:
        outputs = [triton.InferRequestedOutput("features", binary_data=binary_out)]
        result = client.infer("echo", [tensor_of(rows, binary=binary_in)], outputs=outputs)
        back = result.as_numpy("features")
        assert back.dtype == (dtype if binary_out else "float32")
        assert back.astype(dtype).tobytes() == rows.tobytes()

    if dtype == "float16" and not binary_in:
        with pytest.raises(InferenceServerException, match="FP16 has no JSON form"):
            run_client(test)
    else:
        run_client(test)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 1e-2)])
def test_tritonclient_infers_on_torch(dtype: str, tolerance: float) -> None:
    manifest, modules = load_backbone(BUNDLE)

    def test(client: Client) -> None:
        name = manifest.name
        for index, (block, module) in enumerate(zip(manifest.blocks, modules, strict=True)):
            rows = rows_of(index, 5, block.input_shape).astype(dtype)
            result = client.infer(
                name,
                [tensor_of(rows)],
                model_version=manifest.version,
                request_id="über 7/8",
                timeout=60_000_000,
                priority=2,
                parameters={"block": index},
            )
            with torch.inference_mode():
                expected = module(torch.from_numpy(rows.astype(np.float32))).numpy()
            output = result.as_numpy("features")
            assert output.dtype == dtype
            np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance)
            response = result.get_response()
            assert (response["model_name"], response["model_version"]) == (name, manifest.version)
            assert response["id"] == "über 7/8"
            timings = response["parameters"]
            assert (timings["block"], timings["batch_rows"]) == (index, 5)
            assert timings["close_reason"] == "engine_free"
            assert timings["compute_us"] > 0 and timings["queue_us"] >= 0

    run_client(test, TORCH)


def test_tritonclient_in_parallel_gets_each_its_own() -> None:
    def test(client: Client) -> None:
        pending = [
            (seed, client.async_infer("echo", [tensor_of(rows_of(seed))])) for seed in range(20)
        ]
        for seed, request in pending:
            assert request.get_result().as_numpy("features").tobytes() == rows_of(seed).tobytes()

    run_client(test)


def test_tritonclient_reads_our_errors() -> None:
    rows = tensor_of(rows_of(0))
    calls: list[tuple[str, str, Callable[[Client], Any]]] = [
        ("404", "model is 'other'", lambda c: c.infer("other", [rows])),
        ("404", "version of 'echo' is '2'", lambda c: c.infer("echo", [rows], "2")),
        ("404", "block is 1", lambda c: c.infer("echo", [rows], parameters={"block": 1})),
        ("400", "request has 2 inputs", lambda c: c.infer("echo", [rows, rows])),
        ("413", "request has 9 rows", lambda c: c.infer("echo", [tensor_of(rows_of(0, 9))])),
        (
            "415",
            "content encoding is 'gzip'",
            lambda c: c.infer("echo", [rows], request_compression_algorithm="gzip"),
        ),
        (
            "400",
            "the request has an unknown parameter",
            lambda c: c.infer("echo", [rows], sequence_id=5, sequence_start=True),
        ),
        (
            "400",
            "the output has an unknown parameter",
            lambda c: c.infer(
                "echo", [rows], outputs=[triton.InferRequestedOutput("features", class_count=3)]
            ),
        ),
        ("404", "nothing is at '/v2/logging'", lambda c: c.get_log_settings()),
        ("404", "nothing is at", lambda c: c.get_inference_statistics("echo")),
        ("404", "nothing is at", lambda c: c.unload_model("echo")),
    ]

    def test(client: Client) -> None:
        for status, sentence, call in calls:
            with pytest.raises(InferenceServerException) as caught:
                call(client)
            assert caught.value.status() == status
            assert str(caught.value.message()).startswith(sentence)
            result = client.infer("echo", [rows], response_compression_algorithm="gzip")
            assert result.as_numpy("features").tobytes() == rows_of(0).tobytes()

    run_client(test)


@pytest.mark.cluster
def test_tritonclient_through_the_front_door(cluster: Served) -> None:
    """HAProxy and Serve hand the headers on, both ways."""
    manifest, modules = load_backbone(BUNDLE)
    rows = rows_of(0, 5, manifest.blocks[1].input_shape).astype(np.float32)
    with torch.inference_mode():
        expected = modules[1](torch.from_numpy(rows)).numpy()
    with Client(cluster.url.removeprefix("http://")) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready(manifest.name, manifest.version)
        assert client.get_model_repository_index()[0]["name"] == manifest.name
        for binary in (True, False):
            outputs = [triton.InferRequestedOutput("features", binary_data=binary)]
            tensor = tensor_of(rows[: 5 if binary else 1], binary=binary)
            result = client.infer(manifest.name, [tensor], outputs=outputs, parameters={"block": 1})
            output = result.as_numpy("features")
            np.testing.assert_allclose(output, expected[: len(output)], rtol=1e-4, atol=1e-4)
        with pytest.raises(InferenceServerException, match="^.404. model is 'other'"):
            client.infer("other", [tensor])


# --- the page -----------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_page_runs() -> None:
    (code,) = blocks("python")
    assert code.count("127.0.0.1:8000") == 1
    names: dict[str, Any] = {}

    async def test(cloud: Cloud) -> None:
        here = code.replace("127.0.0.1:8000", f"127.0.0.1:{cloud.port}")
        await asyncio.to_thread(exec, compile(here, "docs/oip.md", "exec"), names)

    run(test, TORCH)
    assert names["outputs"].shape == (4, 64, 7, 7)
    assert names["outputs"].dtype == np.float16


def test_the_curl_of_the_page_is_answered() -> None:
    """Read as curl would read it; curl itself may not be on every machine."""
    commands = [
        shlex.split(line)
        for line in re.findall(r"^curl .*?^(?=curl)|^curl .*", "".join(blocks("sh")), re.M | re.S)
    ]
    assert [words[:2] for words in commands] == [["curl", "-s"]] * 2
    (_, _, url), (_, _, post_url, header, media, data, body) = commands
    assert (header, data) == ("-H", "-d")
    assert media == "Content-Type: application/json"

    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            metadata = (await peer.get(url.removeprefix("http://127.0.0.1:8000"))).json()
            assert metadata["inputs"][0]["shape"] == [-1, 1, 2, 2]
            path = post_url.removeprefix("http://127.0.0.1:8000")
            reply = await post(peer, body.encode(), path=path, media="application/json")
            assert reply.json()["outputs"] == [
                {
                    "name": "features",
                    "datatype": "FP32",
                    "shape": [1, 1, 2, 2],
                    "data": [1, 2, 3, 4.5],
                }
            ]

    run(test, ECHO.model_copy(update={"echo_shape": (1, 2, 2)}))


# --- bodies by hand -----------------------------------------------------------------------------


class Body(NamedTuple):
    """A body and the header that says where its JSON ends."""

    data: bytes
    json_length: str = ""


def body_of(
    rows: np.ndarray[Any, Any], *, binary: bool = True, nested: bool = False, **more: Any
) -> Body:
    """A good request, written without tritonclient; keys of ``more`` go to the top."""
    tensor: dict[str, Any] = {
        "name": "features",
        "datatype": DATATYPES[rows.dtype],
        "shape": list(rows.shape),
    }
    if binary:
        tensor["parameters"] = {"binary_data_size": rows.nbytes}
    else:
        tensor["data"] = (rows if nested else rows.ravel()).tolist()
    text = json.dumps({"inputs": [tensor]} | more).encode()
    return Body(text + rows.tobytes(), str(len(text))) if binary else Body(text)


def decode(body: Body) -> oip.Request:
    return oip.decode_request(body.data, body.json_length, max_rows=8)


async def post(
    peer: HttpPeer, body: bytes, json_length: str = "", *, path: str = PATH, media: str = ""
) -> Reply:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
    if media:
        lines.append(f"content-type: {media}")
    if json_length:
        lines.append(f"inference-header-content-length: {json_length}")
    peer.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    return await peer.reply()


ROWS = rows_of(0).astype(np.float32)  # (2, *SHAPE)
GOOD = body_of(ROWS)
GOOD_JSON = body_of(ROWS, binary=False)
FLAT = [float(value) for value in ROWS.ravel()]


def with_input(changes: dict[str, Any]) -> Body:
    """A JSON request, with keys of its input changed, or left out where the value is None."""
    tensor = json.loads(GOOD_JSON.data)["inputs"][0] | changes
    kept = {key: value for key, value in tensor.items() if value is not None}
    return Body(json.dumps({"inputs": [kept]}).encode())


def with_top(**changes: Any) -> Body:
    return Body(json.dumps(json.loads(GOOD_JSON.data) | changes).encode())


def spoiled(value: float, dtype: str, *, binary: bool) -> Body:
    rows = ROWS.astype(dtype)
    rows[1, 1, 2, 0] = value
    return body_of(rows, binary=binary)


def without_claim(body: Body, size: int) -> Body:
    """A binary request that declares ``size`` bytes."""
    old = b'"binary_data_size": %d' % ROWS.nbytes
    assert body.data.count(old) == 1
    new = b'"binary_data_size": %d' % size
    return Body(body.data.replace(old, new), str(int(body.json_length) + len(new) - len(old)))


class Fault(NamedTuple):
    """A bad body and what it gets."""

    body: Body
    status: int
    sentence: str  # its beginning


INPUT: dict[str, Any] = json.loads(GOOD_JSON.data)["inputs"][0]
REPEATED = GOOD_JSON.data.replace(b'{"name"', b'{"shape": [9], "name"')
FAULTS = {
    "nothing": Fault(Body(b""), 400, "the request is not JSON"),
    "not JSON": Fault(Body(b"hello, cloud"), 400, "the request is not JSON"),
    "half of it": Fault(Body(GOOD_JSON.data[:-9]), 400, "the request is not JSON"),
    "trailing bytes": Fault(Body(GOOD_JSON.data + b"\0"), 400, "the request is not JSON"),
    "tensor without the header": Fault(Body(GOOD.data), 400, "the request is not JSON"),
    "UTF-16": Fault(Body(GOOD_JSON.data.decode().encode("utf-16")), 400, "the request is not JSON"),
    "not UTF-8": Fault(Body(b'{"id": "\xff"}'), 400, "the request is not JSON"),
    "a digit too many": Fault(Body(b'{"inputs": ' + b"9" * 5000 + b"}"), 400, "the request is not"),
    "deep": Fault(Body(b"[" * 12_000), 400, "JSON is nested too deeply"),
    "deep objects": Fault(Body(b'{"a":' * 12_000), 400, "JSON is nested too deeply"),
    "too many lists": Fault(
        Body(b'{"inputs": [' + b"[]," * 20_000 + b"[]]}"), 413, "JSON has more"
    ),
    "too much JSON": Fault(Body(b" " * (1 << 20) + GOOD_JSON.data), 413, "JSON has"),
    "a list": Fault(Body(b"[]"), 400, "JSON is not an object"),
    "a number": Fault(Body(b"NaN"), 400, "JSON is not an object"),
    "key twice": Fault(Body(b'{"inputs": [], "inputs": []}'), 400, "JSON has the same key twice"),
    "inner key twice": Fault(Body(REPEATED), 400, "JSON has the same key twice"),
    "no inputs": Fault(Body(b"{}"), 400, "request has 0 inputs"),
    "inputs are an object": Fault(with_top(inputs={"a": 1}), 400, "inputs are not a list"),
    "inputs are numbers": Fault(with_top(inputs=[1]), 400, "inputs are not a list of objects"),
    "the input twice": Fault(with_top(inputs=[INPUT, INPUT]), 400, "request has 2 inputs"),
    "another input": Fault(with_input({"name": "pixels"}), 400, "the input has another name"),
    "no name": Fault(with_input({"name": None}), 400, "the input has another name"),
    "name is a list": Fault(with_input({"name": ["features"]}), 400, "the input has another name"),
    "unknown datatype": Fault(with_input({"datatype": "FP64"}), 400, "datatype of the input is"),
    "datatype is a list": Fault(with_input({"datatype": []}), 400, "datatype of the input is"),
    "no datatype": Fault(with_input({"datatype": None}), 400, "datatype of the input is"),
    "FP16 as JSON": Fault(with_input({"datatype": "FP16"}), 400, "FP16 has no JSON form"),
    "no shape": Fault(with_input({"shape": None}), 400, "shape of the input is not"),
    "shape of no axis": Fault(with_input({"shape": []}), 400, "shape of the input is not"),
    "shape of many axes": Fault(with_input({"shape": [1] * 17}), 400, "shape of the input is not"),
    "shape is negative": Fault(with_input({"shape": [-1, 36]}), 400, "shape of the input is not"),
    "shape is a float": Fault(with_input({"shape": [2.0, 18]}), 400, "shape of the input is not"),
    "shape is true": Fault(with_input({"shape": [True, 36]}), 400, "shape of the input is not"),
    "shape is NaN": Fault(with_input({"shape": [2, float("nan")]}), 400, "shape of the input is"),
    "shape is enormous": Fault(with_input({"shape": [2, 10**900]}), 400, "shape of the input is"),
    "shape's product is": Fault(with_input({"shape": [2, *[10**11] * 15]}), 400, "data has 36"),
    "no rows": Fault(with_input({"shape": [0, 18], "data": []}), 400, "the input is empty"),
    "empty rows": Fault(with_input({"shape": [2, 0], "data": []}), 400, "the input is empty"),
    "too many rows": Fault(body_of(np.ones((9, *SHAPE), np.float32)), 413, "request has 9 rows"),
    "other row shape": Fault(
        with_input({"shape": [2, 18]}), 400, "rows have shape (18,), expected"
    ),
    "no row shape": Fault(with_input({"shape": [2], "data": [1, 2]}), 400, "rows have shape ()"),
    "no data": Fault(with_input({"data": None}), 400, "the input has neither"),
    "data is a string": Fault(with_input({"data": "AAAA"}), 400, "the input has neither"),
    "a value missing": Fault(
        with_input({"data": FLAT[1:]}), 400, "data has 35 values, expected 36"
    ),
    "a value too many": Fault(with_input({"data": [*FLAT, 1]}), 400, "data has 37 values"),
    "a string": Fault(with_input({"data": ["1.5", *FLAT[1:]]}), 400, "data holds something"),
    "a boolean": Fault(with_input({"data": [True, *FLAT[1:]]}), 400, "data holds something"),
    "a null": Fault(with_input({"data": [*FLAT[1:], None]}), 400, "data holds something"),
    "a list late": Fault(with_input({"data": [*FLAT[1:], [1]]}), 400, "data holds something"),
    "half nested": Fault(with_input({"data": ROWS.reshape(2, 18).tolist()}), 400, "data is nested"),
    "nested otherwise": Fault(
        with_input({"data": ROWS.reshape(3, 2, 2, 3).tolist()}), 400, "data is nested otherwise"
    ),
    "ragged": Fault(
        with_input({"data": [ROWS[0].tolist(), ROWS[1, :1].tolist()]}), 400, "data is nested"
    ),
    "nested too deep": Fault(
        with_input({"data": [[[[[v] for v in w] for w in h] for h in c] for c in ROWS.tolist()]}),
        400,
        "data holds something",
    ),
    "a row missing": Fault(
        with_input({"data": ROWS[:1].tolist()}), 400, "data has 18 values, expected 36"
    ),
    "data and a binary size": Fault(
        with_input({"parameters": {"binary_data_size": 144}}), 400, "the input has both"
    ),
    "shared memory": Fault(
        with_input({"data": None, "parameters": {"shared_memory_region": "a"}}),
        400,
        "the input has an unknown parameter",
    ),
    "parameters are a list": Fault(
        with_input({"parameters": []}), 400, "the input's parameters are not an object"
    ),
    "size is a string": Fault(
        with_input({"data": None, "parameters": {"binary_data_size": "144"}}),
        400,
        "parameter binary_data_size is not a whole number",
    ),
    "size is true": Fault(
        with_input({"data": None, "parameters": {"binary_data_size": True}}),
        400,
        "parameter binary_data_size is not a whole number",
    ),
    "size without bytes": Fault(
        with_input({"data": None, "parameters": {"binary_data_size": 144}}),
        400,
        "0 bytes follow the JSON, expected 144",
    ),
    "size too small": Fault(without_claim(GOOD, 140), 400, "binary_data_size is 140, expected 144"),
    "size too large": Fault(without_claim(GOOD, 148), 400, "binary_data_size is 148, expected 144"),
    "size negative": Fault(without_claim(GOOD, -144), 400, "parameter binary_data_size is not"),
    "size enormous": Fault(without_claim(GOOD, 10**30), 400, "parameter binary_data_size is not"),
    "bytes missing": Fault(
        Body(GOOD.data[:-1], GOOD.json_length), 400, "143 bytes follow the JSON, expected 144"
    ),
    "bytes too many": Fault(
        Body(GOOD.data + b"\0", GOOD.json_length), 400, "145 bytes follow the JSON, expected 144"
    ),
    "bytes nobody claims": Fault(
        Body(GOOD_JSON.data + b"\0", str(len(GOOD_JSON.data))), 400, "1 bytes follow the JSON, but"
    ),
    "header beyond the body": Fault(
        Body(GOOD.data, "9999"), 400, "Inference-Header-Content-Length"
    ),
    "header negative": Fault(Body(GOOD.data, "-1"), 400, "Inference-Header-Content-Length is not"),
    "header zero": Fault(Body(GOOD.data, "0"), 400, "Inference-Header-Content-Length is 0"),
    "header enormous": Fault(Body(GOOD.data, "9" * 6000), 400, "Inference-Header-Content-Length"),
    "header no number": Fault(Body(GOOD.data, "0x10"), 400, "Inference-Header-Content-Length"),
    "header too short": Fault(Body(GOOD.data, "40"), 400, "the request is not JSON"),
    "NaN binary": Fault(spoiled(np.nan, "float32", binary=True), 422, "features hold NaN or Inf"),
    "Inf in FP16": Fault(spoiled(-np.inf, "float16", binary=True), 422, "features hold NaN or Inf"),
    "NaN in JSON": Fault(spoiled(np.nan, "float32", binary=False), 422, "features hold NaN or Inf"),
    "Inf in JSON": Fault(spoiled(np.inf, "float32", binary=False), 422, "features hold NaN or Inf"),
    "too large a float": Fault(with_input({"data": [1e39, *FLAT[1:]]}), 422, "features hold"),
    "too large for a float": Fault(
        with_input({"data": [10**400, *FLAT[1:]]}), 422, "features hold"
    ),
    "id is a number": Fault(with_top(id=7), 400, "id is not a string"),
    "id is long": Fault(with_top(id="x" * 257), 400, "id is not a string"),
    "request parameters are a list": Fault(
        with_top(parameters=[1]), 400, "the request's parameters"
    ),
    "unknown parameter": Fault(
        with_top(parameters={"blok": 1}), 400, "the request has an unknown parameter, expected only"
    ),
    "block is negative": Fault(with_top(parameters={"block": -1}), 400, "parameter block is not"),
    "block is a float": Fault(with_top(parameters={"block": 0.0}), 400, "parameter block is not"),
    "block is null": Fault(with_top(parameters={"block": None}), 400, "parameter block is not"),
    "block is enormous": Fault(with_top(parameters={"block": 10**99}), 400, "parameter block is"),
    "no such block": Fault(with_top(parameters={"block": 1}), 404, "block is 1, expected 0 to 0"),
    "timeout is negative": Fault(with_top(parameters={"timeout": -1}), 400, "parameter timeout is"),
    "timeout is a string": Fault(with_top(parameters={"timeout": "1"}), 400, "parameter timeout"),
    "priority too low": Fault(with_top(parameters={"priority": 3}), 400, "parameter priority is 3"),
    "binary is a number": Fault(
        with_top(parameters={"binary_data_output": 1}),
        400,
        "parameter binary_data_output is neither",
    ),
    "another output": Fault(
        with_top(outputs=[{"name": "logits"}]), 400, "outputs are not one named"
    ),
    "the output twice": Fault(with_top(outputs=[{"name": "features"}] * 2), 400, "outputs are not"),
    "outputs are numbers": Fault(with_top(outputs=[1]), 400, "outputs are not a list of objects"),
    "output's flag is null": Fault(
        with_top(outputs=[{"name": "features", "parameters": {"binary_data": None}}]),
        400,
        "parameter binary_data is neither",
    ),
    "output in shared memory": Fault(
        with_top(outputs=[{"name": "features", "parameters": {"shared_memory_region": "a"}}]),
        400,
        "the output has an unknown parameter",
    ),
}


def assert_plain(sentence: str) -> None:
    """One sentence, which tells nothing of the replica's inside nor of the values."""
    assert len(sentence) < 300
    assert not re.search(r"Traceback|\n|\.py|Error\b|object at|/work|/home|hello", sentence)


@pytest.mark.timeout(120)
def test_faults_get_their_status_and_touch_nothing_else() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for name, fault in FAULTS.items():
                reply = await post(peer, *fault.body)
                assert reply.status == fault.status, (name, reply.body)
                assert reply.headers["content-type"] == "application/json"
                assert reply.error.startswith(fault.sentence), name
                assert_plain(reply.error)
                good = await post(peer, *GOOD_JSON)
                assert good.json()["outputs"][0]["data"] == FLAT, name
            assert cloud.outcomes["ok"] == len(FAULTS)
            assert cloud.outcomes.total() == 2 * len(FAULTS)
            assert not cloud.queued

    run(test)


def test_a_body_over_the_limit_is_not_read() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            line = "content-length: 3000000\r\ncontent-type: application/json\r\n\r\n"
            peer.writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\n{line}".encode())
            reply = await peer.reply()
            assert reply.status == 413
            assert reply.error == "body has 3000000 bytes, expected at most 2097152"

    run(test)


def test_media_types() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            for media in ("application/json", "Application/JSON; charset=utf-8", ""):
                assert (await post(peer, *GOOD_JSON, media=media)).status == 200
            for media in ("application/octet-stream", "text/plain", ""):
                assert (await post(peer, *GOOD, media=media)).status == 200
            reply = await post(peer, *GOOD_JSON, media="text/plain")
            assert reply.status == 415
            assert reply.error.startswith("content type is 'text/plain', expected")
            # The wire stays the wire, whatever other headers say.
            media = "application/vnd.apache.arrow.stream"
            assert (await post(peer, *GOOD, media=media)).error.startswith("body is not a complete")

    run(test)


def test_an_answer_says_where_its_json_ends() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as peer:
            body = body_of(ROWS, id="7", parameters={"binary_data_output": True})
            reply = await post(peer, *body)
            assert reply.headers["content-type"] == "application/octet-stream"
            length = int(reply.headers["inference-header-content-length"])
            message = json.loads(reply.body[:length])
            assert reply.body[length:] == ROWS.tobytes()
            assert message["id"] == "7"
            assert message["outputs"][0]["parameters"] == {"binary_data_size": ROWS.nbytes}
            assert "inference-header-content-length" not in (await post(peer, *GOOD)).headers

    run(test)


def test_a_request_too_late_is_not_computed() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as first, http(cloud) as second:
            cloud.gate.close()
            ahead = asyncio.create_task(post(first, *GOOD_JSON))
            await cloud.gate.batch()
            late = asyncio.create_task(post(second, *with_top(parameters={"timeout": 1})))
            async with asyncio.timeout(PATIENCE_S):
                while not (cloud.queued or late.done()):
                    await asyncio.sleep(0.001)
            cloud.gate.open()
            assert (await ahead).status == 200
            assert (await late).status == 408
            assert len(cloud.gate.batches) == 1

    run(test)


def test_what_the_parameters_ask_for_reaches_the_batcher() -> None:
    async def test(cloud: Cloud) -> None:
        async with http(cloud) as first, http(cloud) as second:
            cloud.gate.close()
            ahead = asyncio.create_task(post(first, *GOOD_JSON))
            await cloud.gate.batch()
            asked = with_top(parameters={"priority": 2, "timeout": 60_000_000})
            low = asyncio.create_task(post(second, *asked))
            await cloud.until_queued(1)
            (job,) = cloud.queued
            assert job.priority == 1
            assert job.deadline is not None
            assert 0 < job.deadline - cloud.backbone.clock() <= 60
            cloud.gate.open()
            assert [(await reply).status for reply in (ahead, low)] == [200, 200]

    run(test)


def test_the_index_can_be_of_ready_models_only() -> None:
    async def test(cloud: Cloud) -> None:
        path = "/v2/repository/index"
        async with http(cloud) as peer:
            assert len((await post(peer, b'{"ready": true}', path=path)).json()) == 1
            cloud.backbone.ready = False
            assert (await post(peer, b'{"ready": true}', path=path)).json() == []
            (model,) = (await post(peer, b"", path=path)).json()
            assert (model["name"], model["state"]) == ("echo", "UNAVAILABLE")
            for body in (b"[]", b'{"ready": 1}', b"{"):
                reply = await post(peer, body, path=path)
                assert reply.status == 400
                assert_plain(reply.error)

    run(test)


# --- the codec alone ----------------------------------------------------------------------------

FEATURES = hnp.arrays(
    st.sampled_from([np.float16, np.float32]),
    st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4)),
    elements=st.floats(-60000, 60000, width=16),
)


@given(FEATURES, st.booleans(), st.booleans(), st.integers(0, 9), st.text(max_size=20))
def test_requests_come_through(
    rows: np.ndarray[Any, Any], binary: bool, nested: bool, block: int, request_id: str
) -> None:
    if not binary:
        rows = rows.astype(np.float32)
    body = body_of(rows, binary=binary, nested=nested, id=request_id, parameters={"block": block})
    request = decode(body)
    assert request.wire.features.dtype == rows.dtype
    assert request.wire.features.shape == rows.shape
    assert request.wire.features.tobytes() == rows.tobytes()
    assert request.wire.features.flags.aligned
    assert (request.wire.request_id, request.wire.block) == (request_id, block)
    assert not request.binary


@given(FEATURES, st.booleans(), st.text(max_size=20))
def test_responses_come_through_tritonclient(
    rows: np.ndarray[Any, Any], binary: bool, request_id: str
) -> None:
    body = body_of(rows, id=request_id, parameters={"binary_data_output": binary})
    answer = oip.encode_response(decode(body), Computed(rows, TIMING), model="m", version="3")
    result = triton.InferResult.from_response_body(answer.body, header_length=answer.json_length)
    output = result.as_numpy("features")
    assert output.dtype == (rows.dtype if binary else np.float32)
    assert output.astype(rows.dtype).tobytes() == rows.tobytes()
    response = result.get_response()
    assert response.get("id", "") == request_id
    assert ("id" in response) == bool(request_id)
    assert response["parameters"] == {
        "block": 0,
        "batch_rows": 6,
        "queue_us": 1200,
        "compute_us": 34500,
        "close_reason": "full",
    }


def test_defaults() -> None:
    request = decode(GOOD)
    plain = request.wire
    assert (plain.request_id, plain.block, plain.deadline_s, plain.priority) == ("", 0, None, 0)
    assert (plain.model, plain.model_version, plain.scale) == (None, None, None)
    assert not request.binary
    nulls = with_top(id=None, parameters=None, outputs=None, model_name="of no account")
    assert decode(nulls).wire.features.tobytes() == ROWS.tobytes()


@pytest.mark.parametrize(("sent", "read"), [(0, 0), (1, 0), (2, 1)])
def test_priorities_are_tritons(sent: int, read: int) -> None:
    assert decode(with_top(parameters={"priority": sent})).wire.priority == read


@pytest.mark.parametrize(("sent", "read"), [(0, None), (1, 1e-6), (2_500_000, 2.5)])
def test_timeouts_are_microseconds(sent: int, read: float | None) -> None:
    assert decode(with_top(parameters={"timeout": sent})).wire.deadline_s == read


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("one", [None, False, True])
def test_the_output_decides_how_it_travels(whole: bool, one: bool | None) -> None:
    parameters = {} if one is None else {"parameters": {"binary_data": one}}
    outputs = [{"name": "features"} | parameters]
    body = with_top(parameters={"binary_data_output": whole}, outputs=outputs)
    assert decode(body).binary == (whole if one is None else one)


def test_a_binary_tensor_is_not_copied() -> None:
    rows = rows_of(0)
    for pad in range(4):
        good = body_of(rows, id="x" * pad)
        features = decode(good).wire.features
        in_place = np.shares_memory(features, np.frombuffer(good.data, np.uint8))
        assert in_place == (int(good.json_length) % 2 == 0)  # else it would not be aligned


@pytest.mark.parametrize("binary", [True, False])
def test_an_output_that_is_not_finite(binary: bool) -> None:
    request = decode(body_of(rows_of(0), parameters={"binary_data_output": binary}))
    output = np.full((2, 3), np.inf, np.float32)
    with pytest.raises(NonFinite, match="^the output of block 0 is not finite as float"):
        oip.encode_response(request, Computed(output, TIMING), model="m", version="1")


def test_an_output_too_large_for_float16() -> None:
    output = np.full((2, 3), 1e5, np.float32)
    for binary in (True, False):
        request = decode(body_of(rows_of(0), parameters={"binary_data_output": binary}))
        if binary:
            with pytest.raises(NonFinite, match="is not finite as float16$"):
                oip.encode_response(request, Computed(output, TIMING), model="m", version="1")
        else:
            answer = oip.encode_response(request, Computed(output, TIMING), model="m", version="1")
            assert json.loads(answer.body)["outputs"][0]["data"] == [1e5] * 6


def test_an_output_too_large_for_json() -> None:
    output = np.zeros((1, (1 << 15) + 1), np.float32)
    for binary in (True, False):
        request = decode(body_of(ROWS, parameters={"binary_data_output": binary}))
        if binary:
            answer = oip.encode_response(request, Computed(output, TIMING), model="m", version="1")
            assert answer.body[answer.json_length :] == output.tobytes()
        else:
            with pytest.raises(TooLarge, match=r"^the output has 32769 values, expected at most"):
                oip.encode_response(request, Computed(output, TIMING), model="m", version="1")


def test_the_configuration_is_of_the_first_block() -> None:
    blocks = [Block((16, 14, 14), (64, 7, 7)), Block((64, 7, 7), (3,))]
    config = oip.model_config("m", blocks, 9)
    assert (config["input"][0]["dims"], config["output"][0]["dims"]) == ([16, 14, 14], [64, 7, 7])
    assert (config["name"], config["max_batch_size"]) == ("m", 9)


# --- mutants ------------------------------------------------------------------------------------

SEEDS = [
    GOOD,
    GOOD_JSON,
    body_of(ROWS, binary=False, nested=True, id="r", parameters={"block": 0, "timeout": 9}),
    body_of(rows_of(1), outputs=[{"name": "features", "parameters": {"binary_data": True}}]),
]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"-",
    b"1e999",
    b"NaN",
    b"null",
    b"\0",
    b"9" * 40,
]


def mutant(seed: int) -> Body:
    """One of the seeds, with a few bytes changed, cut out, doubled or put in."""
    chance = random.Random(seed)
    data, json_length = chance.choice(SEEDS)
    mutable = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(mutable) + 1)
        stop = min(len(mutable), start + chance.randint(0, 8))
        match chance.randrange(4):
            case 0:
                mutable[start:stop] = chance.randbytes(stop - start)
            case 1:
                del mutable[start:stop]
            case 2:
                mutable[start:start] = mutable[start:stop]
            case _:
                mutable[start:stop] = chance.choice(TOKENS)
    if json_length and chance.random() < 0.5:
        json_length = str(max(0, int(json_length) + len(mutable) - len(data)))
    return Body(bytes(mutable), json_length)


def test_mutants_are_refused_or_right() -> None:
    outcomes = {"good": 0, "refused": 0}
    for seed in range(20_000):
        try:
            request = decode(mutant(seed))
        except DataMixError as error:
            assert isinstance(error, WireError | TooLarge | NonFinite)
            assert_plain(str(error))
            outcomes["refused"] += 1
        else:
            features = request.wire.features
            assert np.isfinite(features).all()
            assert 1 <= len(features) <= 8
            outcomes["good"] += 1
    assert min(outcomes.values()) > 1000, outcomes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "block"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(["id", "inputs", "outputs", "parameters"]), JSON)
def test_any_json_at_the_top(key: str, value: Any) -> None:
    try:
        decode(with_top(**{key: value}))
    except (WireError, TooLarge, NonFinite) as error:
        assert_plain(str(error))


@given(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON)
def test_any_json_in_the_input(key: str, value: Any) -> None:
    try:
        features = decode(with_input({key: value})).wire.features
    except (WireError, TooLarge, NonFinite) as error:
        assert_plain(str(error))
    else:
        assert features.size == ROWS.size
