"""`datamix export`: what it writes computes what torch computes, or it writes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from cluster import cli
from datamix.bundle import BACKBONE, DEVICE, load_device, onnx_files, read_manifest
from datamix.errors import BundleError, ConfigError
from datamix.models import Architecture
from edge import export as export_module
from edge.export import default_output, export, trace
from edge.onnx_device import OnnxDevice
from edge.onnx_files import OPSET, check_program
from edge.runtime import TorchDevice
from tests.exported import OPTIONS, write_bundle

ARCHITECTURES = {
    "convnet, one round": Architecture("convnet", {**OPTIONS, "n_blocks": 1}),
    "convnet, four rounds": Architecture("convnet", {**OPTIONS, "n_blocks": 4}),
    "bridgenet, rich bridges": Architecture("bridgenet", {"neck": 16, "hidden": 32}),
    "resnet18, stem only": Architecture("resnet18", {"cut": 0}),
    "resnet18, large images": Architecture("resnet18", {"cut": 1, "image_size": 224}),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_part_computes_what_torch_computes(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / "bundle", ARCHITECTURES[name])
    manifest = export(tmp_path / "bundle", tmp_path / "device")
    exported, original = OnnxDevice(tmp_path / "device"), TorchDevice(tmp_path / "bundle")
    random = np.random.default_rng(7)
    for rows in (0, 1, manifest.group_size, 5):
        inputs = random.standard_normal((rows, *manifest.preprocessing.input_shape))
        inputs = inputs.astype(np.float32)
        pairs = [(exported.stem(inputs), original.stem(inputs))]
        for index, block in enumerate(manifest.blocks):
            features = random.standard_normal((rows, *block.output_shape)).astype(np.float32)
            if index < len(manifest.blocks) - 1:
                pairs.append((exported.bridge(index, features), original.bridge(index, features)))
        pairs.append((exported.head(features), original.head(features)))
        for found, expected in pairs:
            assert found.dtype == np.float32
            assert found.shape == expected.shape
            if rows:
                assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
                assert expected.std() > 0.001


def test_the_folder_holds_what_a_device_needs_and_nothing_else(
    bundle: Path, tmp_path: Path
) -> None:
    manifest = export(bundle, tmp_path / "device")
    names = {file.name for file in (tmp_path / "device").iterdir()}
    assert names == {"manifest.json", "stem.onnx", "bridge_0.onnx", "head.onnx"}
    assert read_manifest(tmp_path / "device") == manifest
    original = read_manifest(bundle)
    assert not original.has_onnx and manifest.has_onnx
    assert manifest.hashes.keys() - original.hashes.keys() == set(onnx_files(2))
    assert manifest.hashes[DEVICE] == original.hashes[DEVICE]
    # The cloud's file still belongs to it, and a whole bundle can be exported again.
    for file in (BACKBONE, DEVICE):
        (tmp_path / "device" / file).write_bytes((bundle / file).read_bytes())
    load_device(tmp_path / "device")
    assert export(tmp_path / "device", tmp_path / "again") == manifest


def test_batch_norms_are_folded_into_the_convolutions(bundle: Path, tmp_path: Path) -> None:
    export(bundle, tmp_path / "device")
    model = onnx.load(tmp_path / "device" / "stem.onnx")
    assert [opset.version for opset in model.opset_import] == [OPSET]
    operators = [node.op_type for node in model.graph.node]
    # Three follow a convolution; the last, behind a sum, cannot be folded.
    assert operators.count("Conv") == 3
    assert operators.count("BatchNormalization") == 1
    (rows, *shape) = model.graph.output[0].type.tensor_type.shape.dim
    assert rows.dim_param and [size.dim_value for size in shape] == [4, 14, 14]


def test_a_part_that_computes_something_else_is_not_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trace

    def wrong(file: str, module: nn.Module, inputs: tuple[int, ...]) -> bytes:
        body = real(file, module, inputs)
        if file != "head.onnx":
            return body
        model = onnx.load_from_string(body)
        bias = next(t for t in model.graph.initializer if list(t.dims) == [10])
        values = np.frombuffer(bias.raw_data, np.float32) + np.float32(1e-3)
        bias.raw_data = values.tobytes()
        forged: bytes = model.SerializeToString()
        return forged

    monkeypatch.setattr(export_module, "trace", wrong)
    with pytest.raises(BundleError, match="head.onnx: onnxruntime differs from torch by 0.00"):
        export(bundle, tmp_path / "device")
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sort(dim=1).values.reshape(x.shape)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        waves: Tensor = torch.special.bessel_j0(x)
        return waves


def test_parts_that_no_device_would_take_are_refused() -> None:
    with pytest.raises(BundleError, match="torch cannot export this part: .*bessel_j0") as caught:
        trace("stem.onnx", Unknown(), (1, 4, 4))
    assert "\n" not in str(caught.value)
    body = trace("stem.onnx", Sorting(), (1, 4, 4))
    with pytest.raises(BundleError, match="stem.onnx: has operator .* expected one of"):
        check_program("stem.onnx", body)


def test_nothing_is_replaced_and_a_bad_bundle_is_not_exported(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        export(bundle, bundle)
    (bundle / DEVICE).write_bytes(b"other")
    with pytest.raises(BundleError, match="sha256 differs"):
        export(bundle, tmp_path / "device")
    assert not (tmp_path / "device").exists()


def test_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "--bundle", str(bundle)])
    assert not end.value.code
    output = bundle.with_name("bundle-onnx")
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split(":")[0]) for line in lines] == [output / f for f in onnx_files(2)]
    OnnxDevice(output)
    with pytest.raises(ConfigError, match="is a URI, expected an output folder"):
        default_output("s3://bucket/bundle")
