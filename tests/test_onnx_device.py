"""Devices without torch: the same outputs, and no trust in what is on the disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from datamix import wire
from datamix.bundle import load_backbone
from datamix.errors import BundleError, ConfigError, DataMixError
from edge import device as device_module
from edge import installed as installed_module
from edge.client import Client, ClientConfig
from edge.device import open_device
from edge.export import export
from edge.onnx_device import OnnxDevice
from edge.onnx_files import MAX_ONNX_BYTES, OPSET, check_program
from edge.runtime import TorchDevice
from edge.transport import InProcessTransport
from tests.asynchronous import asynchronous
from tests.exported import edit, forge, write_bundle
from tests.fake_cloud import echo

Array = npt.NDArray[Any]
STEM = "stem.onnx"
EXACT = ClientConfig(wire_dtype="float32")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    write_bundle(path)
    return path


@pytest.fixture(scope="module")
def pristine(bundle: Path) -> Path:
    export(bundle, bundle.with_name("device"))
    return bundle.with_name("device")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """An exported folder that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "device"))


def images(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 28, 28), np.uint8)


# ------------------------------------------------------------------ the same answers


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 9), seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 2))
@asynchronous
async def test_a_whole_inference_is_the_same_on_both_runtimes(
    bundle: Path, pristine: Path, count: int, seed: int, threads: int
) -> None:
    _, blocks = load_backbone(bundle)

    async def cloud(message: bytes) -> bytes:
        request = wire.decode_request(message)
        rows = torch.from_numpy(wire.dequantise(request.features, request.scale))
        with torch.inference_mode():
            return echo(request, features=blocks[request.block](rows).numpy())

    outputs = []
    for device in (OnnxDevice(pristine, threads), TorchDevice(bundle)):
        async with Client(InProcessTransport(cloud), device, config=EXACT) as client:
            outputs.append(await client.infer(images(count, seed)))
    assert outputs[0].shape == (count, 10)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_preprocessing_is_shared_and_odd_arrays_are_fine(bundle: Path, pristine: Path) -> None:
    exported, original = OnnxDevice(pristine), TorchDevice(bundle)
    inputs = exported.preprocess(images(4))
    np.testing.assert_array_equal(inputs, original.preprocess(images(4)))
    frozen = inputs.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(exported.stem(frozen), exported.stem(inputs))
    np.testing.assert_allclose(exported.stem(inputs[::2]), exported.stem(inputs)[::2], atol=1e-6)
    np.testing.assert_allclose(
        exported.stem(inputs.astype(np.float64)), exported.stem(inputs), atol=1e-6
    )


def test_odd_calls_are_refused(pristine: Path) -> None:
    device = OnnxDevice(pristine)
    with pytest.raises(ConfigError, match="dtype int64, expected uint8 or float32"):
        device.preprocess(np.zeros((2, 1, 28, 28), np.int64))
    with pytest.raises(ConfigError, match="inputs have shape"):
        device.stem(np.zeros((1, 28, 28), np.float32))
    with pytest.raises(ConfigError, match="bridge 1 asked for, the bundle has 1"):
        device.bridge(1, np.zeros((4, 8, 7, 7), np.float32))
    with pytest.raises(ConfigError, match="features have shape"):
        device.bridge(0, np.zeros((4, 8, 7, 8), np.float32))
    with pytest.raises(ConfigError, match="features have shape"):
        device.head(np.zeros((4, 8, 7), np.float32))
    with pytest.raises(ConfigError, match="threads is 0"):
        OnnxDevice(pristine, threads=0)


# ------------------------------------------------------------------ which runtime


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    for place in (device_module, installed_module):
        monkeypatch.setattr(place, "installed", lambda module: module not in missing)


def test_auto_takes_onnx_where_it_can(
    bundle: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_device(pristine), OnnxDevice)
    assert isinstance(open_device(bundle), TorchDevice)
    assert isinstance(open_device(bundle, runtime="torch"), TorchDevice)
    without(monkeypatch, "torch")
    assert isinstance(open_device(pristine), OnnxDevice)
    with pytest.raises(ConfigError, match="has no ONNX files and torch is not installed"):
        open_device(bundle)
    with pytest.raises(ConfigError, match=r"torch is not installed.*datamix-cluster\[torch\]"):
        open_device(bundle, runtime="torch")
    with pytest.raises(BundleError, match="has no ONNX files, expected those of"):
        open_device(bundle, runtime="onnx")
    without(monkeypatch, "torch", "onnxruntime")
    with pytest.raises(ConfigError, match="neither onnxruntime nor torch is installed"):
        open_device(pristine)
    with pytest.raises(ConfigError, match=r"onnxruntime is not .*datamix-cluster\[device\]"):
        open_device(pristine, runtime="onnx")
    with pytest.raises(ConfigError, match="runtime is 'tflite', expected"):
        open_device(pristine, runtime="tflite")  # type: ignore[arg-type]


def test_torch_runs_an_exported_bundle_where_onnxruntime_is_missing(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime")
    with pytest.raises(BundleError, match="no device.safetensors"):
        open_device(folder)
    shutil.copy(bundle / "device.safetensors", folder)
    assert isinstance(open_device(folder), TorchDevice)


def test_no_torch_is_loaded(pristine: Path) -> None:
    code = (
        "import sys; from edge.client import Client;"
        f"client = Client('http://127.0.0.1:1', {str(pristine)!r});"
        "import numpy; client.device.stem(numpy.zeros((1, 1, 28, 28)));"
        "sys.exit(bool({'torch', 'ray', 'onnx', 'pyarrow.fs', 'typer'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ------------------------------------------------------------------ hostile folders


def model(*nodes: onnx.NodeProto, **changes: Any) -> bytes:
    """An ONNX file of the stem's interface: (n, 1, 28, 28) -> (n, 4, 14, 14)."""
    kernel = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "kernel")
    fields: dict[str, Any] = {
        "inputs": [helper.make_tensor_value_info("inputs", 1, ["n", 1, 28, 28])],
        "outputs": [helper.make_tensor_value_info("outputs", 1, ["n", 4, 14, 14])],
        "initializer": [kernel],
        "opset": [helper.make_opsetid("", OPSET)],
    } | changes
    graph = helper.make_graph(
        list(nodes) or [conv()],
        "graph",
        fields["inputs"],
        fields["outputs"],
        fields["initializer"],
        sparse_initializer=fields.get("sparse"),
    )
    made = helper.make_model(graph, opset_imports=fields["opset"], ir_version=8)
    if "function" in fields:
        made.functions.append(fields["function"])
    body: bytes = made.SerializeToString()
    return body


def conv(**changes: Any) -> onnx.NodeProto:
    fields = {"strides": [2, 2], "pads": [1, 1, 1, 1]} | changes
    return helper.make_node("Conv", ["inputs", "kernel"], ["outputs"], **fields)


def outside() -> onnx.TensorProto:
    """Weights that lie in another file."""
    tensor = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "kernel")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../../etc/passwd"), ("offset", "0"), ("length", "144")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def kernel(values: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(values, "kernel")


def constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["spare"], value=tensor)


def info(name: str, dtype: int, shape: list[Any]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, dtype, shape)]


ONES = np.ones((4, 1, 3, 3), np.float32)
BRANCH = helper.make_graph([], "branch", [], info("outputs", 1, ["n", 4, 14, 14]))
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("kernel", 1, [1], [1.0]), helper.make_tensor("at", 7, [1], [0]), [4, 1, 3, 3]
)
FUNCTION = helper.make_function("own", "F", ["a"], ["b"], [], [helper.make_opsetid("", OPSET)])

FORGED: dict[str, tuple[bytes, str]] = {
    "weights elsewhere": (model(initializer=[outside()]), "field 1[34] of a tensor is not"),
    "a constant elsewhere": (model(conv(), constant(outside())), "field 1[34] of a tensor"),
    "a branch": (
        model(helper.make_node("Relu", ["inputs"], ["x"], then_branch=BRANCH)),
        "field 6 of an attribute",
    ),
    "a loop": (model(helper.make_node("Loop", ["inputs"], ["outputs"])), "operator 'Loop'"),
    "a growing operator": (
        model(helper.make_node("Expand", ["inputs", "kernel"], ["outputs"])),
        "operator 'Expand'",
    ),
    "another domain": (
        model(helper.make_node("Relu", ["inputs"], ["outputs"], domain="com.microsoft")),
        "operator of another domain",
    ),
    "a function": (model(function=FUNCTION), "field 25 of the model"),
    "sparse weights": (model(sparse=[SPARSE]), "field 15 of the graph"),
    "huge pads": (model(conv(pads=[2**31] * 4)), "has pads .* expected 0 to 64"),
    "negative pads": (model(conv(pads=[-1] * 4)), "has pads .* expected 0 to 64"),
    "NaN": (model(initializer=[kernel(ONES * np.float32("nan"))]), "holds NaN or Inf"),
    "Inf": (
        model(initializer=[helper.make_tensor("kernel", 1, [4, 1, 3, 3], [np.inf] * 36)]),
        "holds NaN or Inf",
    ),
    "doubles": (model(initializer=[kernel(ONES.astype(np.float64))]), "tensor of type 11"),
    "an old operator set": (model(opset=[helper.make_opsetid("", 9)]), "operator sets"),
    "two operator sets": (
        model(opset=[helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]),
        "operator sets",
    ),
    "no operator set": (b"\x3a\x00", "operator sets"),
    "two graphs": (model() + b"\x3a\x00", "2 graphs"),
    "nothing": (b"", "0 graphs"),
    "cut off": (model()[:-3], "stem.onnx: is no ONNX file|operator sets"),
    "another file": (b"PK\x03\x04" + bytes(64), "stem.onnx"),
    "text": (b"not an ONNX file at all", "stem.onnx"),
    "an endless number": (b"\xff" * 64, "a number runs over its end"),
    "an input more": (
        model(inputs=info("inputs", 1, ["n", 1, 28, 28]) + info("more", 1, ["n"])),
        "input is .* expected one float tensor 'inputs'",
    ),
    "another name": (
        model(
            helper.make_node("Conv", ["x", "kernel"], ["outputs"], strides=[2, 2], pads=[1] * 4),
            inputs=info("x", 1, ["n", 1, 28, 28]),
        ),
        "input is .* expected one float tensor 'inputs'",
    ),
    "another type": (
        model(
            helper.make_node("Identity", ["inputs"], ["outputs"]),
            inputs=info("inputs", 7, ["n", 4, 14, 14]),
            outputs=info("outputs", 7, ["n", 4, 14, 14]),
        ),
        "input is .*int64.* expected one float",
    ),
    "another shape": (
        model(
            helper.make_node("Relu", ["inputs"], ["outputs"]),
            inputs=info("inputs", 1, ["n", 4, 14, 14]),
        ),
        r"input has shape \['n', 4, 14, 14\], expected \('n', 1, 28, 28\)",
    ),
    "a fixed batch": (
        model(inputs=info("inputs", 1, [4, 1, 28, 28]), outputs=info("outputs", 1, [4, 4, 14, 14])),
        "input has shape",
    ),
    "a shape that is no claim": (
        model(conv(strides=[1, 1]), outputs=info("outputs", 1, ["n", "c", "h", "w"])),
        "output has shape",
    ),
    "a shape that lies": (model(conv(strides=[1, 1])), "stem.onnx: "),
    "rows that get lost": (
        model(
            conv(),
            helper.make_node("Reshape", ["outputs", "flat"], ["x"]),
        ),
        "stem.onnx: onnxruntime cannot load it",
    ),
    "weights that do not fit": (
        model(initializer=[kernel(np.ones((4, 2, 3, 3), np.float32))]),
        "onnxruntime cannot",
    ),
    "no weights": (model(initializer=[]), "onnxruntime cannot load it"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_programs_get_one_sentence(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    body, sentence = FORGED[name]
    forge(folder, STEM, body)
    with pytest.raises(BundleError, match=sentence) as caught:
        OnnxDevice(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert capfd.readouterr().err == ""  # onnxruntime would write there too


def test_the_forger_can_succeed(folder: Path) -> None:
    """A program that stays within the rules runs: the hash is no signature."""
    forge(folder, STEM, model())
    assert OnnxDevice(folder).stem(np.ones((2, 1, 28, 28), np.float32)).max() == 9


def test_a_changed_file_is_not_even_looked_at(folder: Path) -> None:
    body = bytearray((folder / STEM).read_bytes())
    body[-1] ^= 1
    (folder / STEM).write_bytes(body)
    with pytest.raises(BundleError, match="stem.onnx: sha256 differs"):
        OnnxDevice(folder)


def test_a_file_too_large_is_not_read(folder: Path) -> None:
    with open(folder / STEM, "wb") as stream:
        stream.truncate(MAX_ONNX_BYTES + 1)  # sparse
    with pytest.raises(BundleError, match="stem.onnx has 268435457 bytes, expected at most"):
        OnnxDevice(folder)


HASHES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m["hashes"].pop("head.onnx"), "hashes need .* all or none"),
    (lambda m: m["hashes"].update({"bridge_1.onnx": "0" * 64}), "hashes need"),
    (lambda m: m["hashes"].update({"../head.onnx": "0" * 64}), "hashes"),
    (lambda m: m["hashes"].update({"bridge_0.onnx\n": "0" * 64}), "hashes"),
    (lambda m: m["class_names"].pop(), "head.onnx: output has shape"),
    (lambda m: m["blocks"][0].update(output_shape=[8, 7, 6]), "bridge_0.onnx: input has shape"),
]


@pytest.mark.parametrize(("change", "sentence"), HASHES)
def test_manifests_that_do_not_fit_the_files_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=sentence):
        OnnxDevice(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "bridge_0.onnx").unlink()
    with pytest.raises(BundleError, match="no bridge_0.onnx in bundle"):
        OnnxDevice(folder)


@settings(max_examples=200)
@given(body=st.binary(max_size=64))
def test_random_bytes_are_no_program(body: bytes) -> None:
    with pytest.raises(BundleError):
        check_program(STEM, body)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_programs_raise_nothing_but_our_errors(
    pristine: Path, at: int, value: int, cut: bool
) -> None:
    body = bytearray((pristine / STEM).read_bytes())
    at %= len(body)
    body[at] = value
    try:
        check_program(STEM, bytes(body[: at + 1] if cut else body))
    except DataMixError as error:
        assert "\n" not in str(error)
