import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from datamix.bundle import (
    BACKBONE,
    DEVICE,
    MANIFEST,
    ArchitectureSpec,
    BlockShape,
    BoundedSpec,
    ImagePreprocessing,
    LogMelPreprocessing,
    Manifest,
    SplitSpec,
    load_backbone,
    load_device,
    read_manifest,
    save_bundle,
)
from datamix.errors import BundleError
from datamix.models import Architecture, SplitModel, build

OPTIONS: dict[str, int | str] = {"n_blocks": 2, "stem_width": 4, "width": 8, "hidden": 16}


def small_model(seed: int = 0) -> SplitModel:
    torch.manual_seed(seed)
    return build(Architecture("convnet", OPTIONS)).eval()


def write(path: Path, model: SplitModel | None = None, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "small",
        "version": "1",
        "mode": "mix",
        "group_size": 4,
        "architecture": ArchitectureSpec(name="convnet", options=OPTIONS),
        "preprocessing": ImagePreprocessing(
            kind="image", input_shape=(1, 28, 28), mean=(0.25,), std=(0.5,)
        ),
        "class_names": tuple("abcdefghij"),
        "tolerance": 0.01,
        "metrics": {"accuracy_mixed": 0.5},
    }
    return save_bundle(path, model or small_model(), **(fields | changes))


LOG_MEL: dict[str, Any] = {
    "kind": "log-mel",
    "sample_rate": 16_000,
    "samples": 4_000,
    "n_fft": 400,
    "hop": 130,
    "n_mels": 28,
    "low_hz": 20.0,
    "high_hz": 8_000.0,
    "offset": 1e-6,
    "input_shape": [1, 28, 28],
    "mean": [-6.0],
    "std": [4.5],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(bundle: Path, change: Any) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def replace_weights(bundle: Path, file: str, body: bytes) -> None:
    """Swap a file and its hash: a forger would do both."""
    (bundle / file).write_bytes(body)
    edit(bundle, lambda m: m["hashes"].update({file: hashlib.sha256(body).hexdigest()}))


def test_both_sides_come_back_and_compute_the_same(bundle: Path) -> None:
    model = small_model()
    inputs = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    manifest, stem, bridges, head = load_device(bundle)
    other, blocks = load_backbone(bundle)
    assert manifest == other == read_manifest(bundle)
    assert manifest.blocks[0] == BlockShape(input_shape=(4, 14, 14), output_shape=(8, 7, 7))
    with torch.inference_mode():
        output = head(blocks[1](bridges[0](blocks[0](stem(inputs)))))
        assert torch.equal(output, model(inputs))
    for part in (stem, bridges, head, blocks):
        assert not any(module.training for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_each_side_needs_only_its_own_file(bundle: Path) -> None:
    (bundle / DEVICE).rename(bundle / "gone")
    load_backbone(bundle)
    with pytest.raises(BundleError, match="no device.safetensors in bundle"):
        load_device(bundle)
    (bundle / "gone").rename(bundle / DEVICE)
    (bundle / BACKBONE).unlink()
    load_device(bundle)
    with pytest.raises(BundleError, match="no backbone.safetensors in bundle"):
        load_backbone(bundle)


def test_the_cloud_file_holds_blocks_only(bundle: Path) -> None:
    assert all(name.startswith("blocks.") for name in load((bundle / BACKBONE).read_bytes()))
    assert not any(name.startswith("blocks.") for name in load((bundle / DEVICE).read_bytes()))


def test_uris_and_strings_read_like_paths(bundle: Path) -> None:
    assert read_manifest(bundle.as_uri()) == read_manifest(str(bundle)) == read_manifest(bundle)
    load_backbone(bundle.as_uri())
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest("nonsense://bucket/bundle")


names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
versions = st.from_regex(r"[0-9A-Za-z._-]{1,32}", fullmatch=True)
finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=names,
    version=versions,
    mode=st.sampled_from(["mix", "bounded", "split"]),
    group_size=st.integers(1, 1024),
    tolerance=st.floats(1e-6, 1),
    metrics=st.dictionaries(st.text(max_size=20), finite, max_size=5),
    sigma=st.floats(1e-3, 4096),
    mean=finite,
    std=st.floats(1e-3, 1e3),
)
def test_a_manifest_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    version: str,
    mode: str,
    group_size: int,
    tolerance: float,
    metrics: dict[str, float],
    sigma: float,
    mean: float,
    std: float,
) -> None:
    split = SplitSpec(sigma=sigma, wire_dtype="float32", tolerance=tolerance)
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    written = write(
        path,
        name=name,
        version=version,
        mode=mode,
        group_size=group_size,
        tolerance=tolerance,
        metrics=metrics,
        preprocessing=ImagePreprocessing(
            kind="image", input_shape=(1, 28, 28), mean=(mean,), std=(std,)
        ),
        split=split if mode == "split" else None,
        bounded=BoundedSpec(sigma=sigma) if mode == "bounded" else None,
    )
    assert read_manifest(path) == written
    assert written.modes == (mode,)
    assert (written.metrics, written.tolerance) == (metrics, tolerance)


HUGE = {"input_shape": [65536, 65536, 65536], "output_shape": [1, 1, 1]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(schema_version=2), "schema_version"),
        (lambda m: m.pop("schema_version"), "schema_version: Field required"),
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m["blocks"][0].update(stride=2), "stride: Extra inputs"),
        (lambda m: m["architecture"].update(code="import os"), "code: Extra inputs"),
        (lambda m: m.update(name="../../etc"), "name: String should match"),
        (lambda m: m.update(name="a\n"), "name: String should match"),
        (lambda m: m.update(name="a" * 65), "name: String should match"),
        (lambda m: m.update(version=""), "version: String should match"),
        (lambda m: m.update(version="1/2"), "version: String should match"),
        (lambda m: m.update(mode="open"), "mode"),
        (lambda m: m.update(wire_dtype="pickle"), "wire_dtype"),
        (lambda m: m.update(group_size=0), "group_size"),
        (lambda m: m.update(group_size="4"), "group_size: Input should be a valid integer"),
        (lambda m: m.update(tolerance=float("nan")), "tolerance"),
        (lambda m: m.update(metrics={"accuracy": float("nan")}), "metrics.accuracy"),
        (lambda m: m.update(metrics={"accuracy": float("inf")}), "metrics.accuracy"),
        (lambda m: m.update(metrics={str(i): 0.0 for i in range(257)}), "metrics"),
        (lambda m: m.update(blocks=[]), "blocks"),
        (lambda m: m.update(blocks=[HUGE]), "more than 67108864 values"),
        (lambda m: m["blocks"][0].update(input_shape=[4, 14]), "blocks"),
        (lambda m: m["blocks"][0].update(input_shape=[4, 14, -14]), "blocks"),
        (lambda m: m["blocks"][0].update(input_shape=[4, 14, 10**30]), "blocks"),
        (lambda m: m["blocks"][1].update(output_shape=[8, 7, 8]), "blocks are .* expected"),
        (lambda m: m["blocks"].pop(), "blocks are .* expected"),
        (lambda m: m["architecture"].update(name="os.system"), "architecture is 'os.system'"),
        (lambda m: m["architecture"]["options"].update(width=10**9), "width is 1000000000"),
        (lambda m: m["architecture"]["options"].update(width=16), "blocks are .* expected"),
        (lambda m: m["preprocessing"].update(mean=[0.1, 0.2]), "one per channel"),
        (lambda m: m["preprocessing"].update(std=[0.0]), "std"),
        (lambda m: m["preprocessing"].update(input_shape=[1, 32, 32]), "input_shape is"),
        (lambda m: m["class_names"].pop(), "9 class_names, expected 10"),
        (lambda m: m["hashes"].pop(DEVICE), "hashes need"),
        (lambda m: m["hashes"].update({"../../evil.safetensors": "0" * 64}), "hashes"),
        (lambda m: m["hashes"].update({BACKBONE: "0" * 63}), "hashes"),
        (lambda m: m["hashes"].update({BACKBONE: "0" * 64}), "sha256 differs"),
    ],
)
def test_hostile_manifests_get_one_sentence(bundle: Path, change: Any, sentence: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=sentence) as caught:
        load_backbone(bundle)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_log_mel_manifest_is_read_back(tmp_path: Path) -> None:
    preprocessing = LogMelPreprocessing.model_validate_json(json.dumps(LOG_MEL))
    written = write(tmp_path / "bundle", preprocessing=preprocessing)
    found = read_manifest(tmp_path / "bundle").preprocessing
    assert found == written.preprocessing == preprocessing
    assert (found.raw_shape, found.input_shape) == ((4_000,), (1, 28, 28))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "mfcc"}, "preprocessing"),
        ({"kind": "image"}, "preprocessing"),
        ({"kind": None}, "preprocessing"),
        ({"hop": 0}, "hop"),
        ({"n_fft": 1 << 20}, "n_fft"),
        ({"n_fft": 4_001}, "a frame of 4001 is longer than 4000 samples"),
        ({"hop": 120}, "input_shape needs to be"),
        ({"input_shape": [1, 28, 27]}, r"input_shape needs to be \(1, 28, 28\)"),
        ({"high_hz": 8_001.0}, "need to ascend"),
        ({"low_hz": 8_000.0}, "need to ascend"),
        ({"offset": 0.0}, "offset"),
        ({"mean": [0.0, 0.0]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"std": [float("inf")]}, "std"),
        (
            {"samples": 65_000 + 16_384, "n_fft": 16_384, "hop": 1, "input_shape": [1, 28, 65_001]},
            "the frames of one input have more than 67108864 values",
        ),
    ],
)
def test_hostile_log_mel_gets_one_sentence(
    bundle: Path, change: dict[str, Any], sentence: str
) -> None:
    edit(bundle, lambda manifest: manifest.update(preprocessing=LOG_MEL))
    read_manifest(bundle)
    edit(bundle, lambda manifest: manifest["preprocessing"].update(change))
    with pytest.raises(BundleError, match=sentence):
        read_manifest(bundle)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_random_bytes_are_no_manifest(bundle: Path, body: bytes) -> None:
    (bundle / MANIFEST).write_bytes(body)
    with pytest.raises(BundleError):
        read_manifest(bundle)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b'{"a":' * 50_000])
def test_odd_json_is_no_manifest(bundle: Path, body: bytes) -> None:
    (bundle / MANIFEST).write_bytes(body)
    with pytest.raises(BundleError):
        read_manifest(bundle)


def test_a_manifest_too_large_is_not_read(bundle: Path) -> None:
    with open(bundle / MANIFEST, "wb") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(BundleError, match="expected at most 1048576"):
        read_manifest(bundle)


def test_weights_too_large_are_not_read(bundle: Path) -> None:
    with open(bundle / BACKBONE, "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BundleError, match="backbone.safetensors has 1099511627776 bytes"):
        load_backbone(bundle)


def test_one_changed_bit_is_seen(bundle: Path) -> None:
    body = bytearray((bundle / BACKBONE).read_bytes())
    body[-1] ^= 1
    (bundle / BACKBONE).write_bytes(body)
    with pytest.raises(BundleError, match="sha256 differs"):
        load_backbone(bundle)
    load_device(bundle)


def test_forged_weights_are_refused(bundle: Path) -> None:
    tensors = load((bundle / BACKBONE).read_bytes())
    first = min(tensors)
    forged = {
        "unknown tensor 'stem.spy'": {**tensors, "stem.spy": torch.zeros(1)},
        "is missing": {key: value for key, value in tensors.items() if key != first},
        "expected": {**tensors, first: torch.zeros(2, 3)},
        "F16": {**tensors, first: tensors[first].half()},
        "holds NaN": {**tensors, first: tensors[first] * float("nan")},
    }
    for sentence, content in forged.items():
        replace_weights(bundle, BACKBONE, save(content))
        with pytest.raises(BundleError, match=sentence):
            load_backbone(bundle)
    replace_weights(bundle, BACKBONE, save(tensors))
    load_backbone(bundle)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 60_000) + b"[" * 60_000,
    ],
)
def test_bytes_that_are_no_safetensors_are_refused(bundle: Path, body: bytes) -> None:
    replace_weights(bundle, BACKBONE, body)
    with pytest.raises(BundleError, match="not valid safetensors"):
        load_backbone(bundle)


def test_offsets_that_lie_are_refused(bundle: Path) -> None:
    body = (bundle / BACKBONE).read_bytes()
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    first = min(key for key in header if key != "__metadata__")
    header[first]["data_offsets"] = [0, 2**40]
    forged = json.dumps(header).encode()
    replace_weights(bundle, BACKBONE, struct.pack("<Q", len(forged)) + forged + body[8 + length :])
    with pytest.raises(BundleError, match="not valid safetensors"):
        load_backbone(bundle)


def test_saving_never_replaces_and_leaves_nothing_half_done(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    with pytest.raises(BundleError, match="exists already"):
        write(bundle, small_model(1))
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left"):
        write(bundle.parent / "second")
    assert [file.name for file in bundle.parent.iterdir()] == ["bundle"]


def test_saving_checks_what_it_is_given(tmp_path: Path) -> None:
    for changes, sentence in (
        ({"name": "Bad Name"}, "String should match"),
        ({"class_names": ("a",)}, "1 class_names, expected 10"),
        ({"metrics": {"x": float("nan")}}, "finite"),
        ({"architecture": ArchitectureSpec(name="convnet")}, "blocks are"),
    ):
        with pytest.raises(BundleError, match=sentence):
            write(tmp_path / "bundle", **changes)
    assert not list(tmp_path.iterdir())


def test_importing_and_reading_a_manifest_needs_no_torch(bundle: Path) -> None:
    code = (
        "import sys; from datamix.bundle import read_manifest;"
        f"read_manifest({str(bundle)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
